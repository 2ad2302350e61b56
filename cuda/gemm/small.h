// The groups of at most 64 rows, as when decoding: out = a b^T of each. The rows of b take the place of the 64 rows of
// a wgmma and those of a that of its columns, which come in 16s: no tensor core works on rows that do not exist. All
// time goes into reading b once.
//
//   warpgroup 0  multiplies
//   warp 4       copies tiles of b and a into a ring of stages
//   warp 5       copies their scales
#pragma once

#include "cuda/gemm/few.h"

namespace jaxkern::cuda::kernels {

template <typename Format, typename Out>
struct Small {
  static constexpr bool scaled = Format::scaled, b_rows = Format::b_rows;
  static constexpr int tile_m = 64, tile_n = 64;
  static constexpr int box_rows = 16;  // of a that one copy brings
  static constexpr int threads = warpgroup_size + 2 * warp_size;
  static constexpr int resident = 2, stages = 5;
  static std::string name() { return instance_name("Small", "", {}, Format::name, sizeof(Out) == 4); }

  using Params = FewParams<RowGroups, Out>;
  using Walk = RowGroups::Walk<tile_m, tile_n>;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_n * block_k> b[stages];
    Tile<tile_m * block_k> a[stages];
    Shared<float> sums[tile_m][tile_n + 4];  // out's way round; 4 more spread the banks
    Shared<float> a_scales[stages][scaled ? tile_m : 1];
    Shared<float> b_scales[stages][b_rows ? tile_n : 1];
    Barrier full[stages], empty[stages];
    RowGroups::Smem schedule;
  };

  DEVICE static void run(const Params& p, Smem& s) {
    griddepcontrol_launch_dependents();
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.a);
      prefetch_tensormap(p.b);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], scaled ? 1 + warp_size : 1);  // the copies of tiles and of scales
        mbarrier_init(s.empty[i], 4);                          // the math warps
      }
      fence_mbarrier_init();
    }
    if (warp == 0) RowGroups::prepare(p.schedule, s.schedule);
    bar_sync(0, threads);
    At at;  // in the role's way
    if (warp == 4) {
      if (elect()) for_tiles(Walk(p.schedule, s.schedule), [&](Work w) { produce_tiles(p, s, w, at); });
      syncwarp();
    } else if (warp == 5) {
      if constexpr (scaled) {
        for_tiles(Walk(p.schedule, s.schedule), [&](Work w) { produce_scales<Format>(p, s, w, at); });
        cp_async_commit_group();
        cp_async_wait_group<0>();
      }
    } else {
      for_tiles(Walk(p.schedule, s.schedule), [&](Work w) {
        int rows = rows_of(w);
        if (rows == 16)
          multiply<16>(s, w, at);
        else if (rows == 32)
          multiply<32>(s, w, at);
        else
          multiply<tile_m>(s, w, at);
        bar_sync(1, warpgroup_size);
        store_rows(p, s, w);
        bar_sync(1, warpgroup_size);
      });
    }
  }

  // The rows that a tile multiplies: what wgmma offers that is not less than it has.
  DEVICE static int rows_of(Work w) {
    int rows = w.row_end - w.row;
    return rows <= 16 ? 16 : rows <= 32 ? 32 : tile_m;
  }

  DEVICE static void produce_tiles(const Params& p, Smem& s, Work w, At& at) {
    int rows = rows_of(w);
    for (int k = 0; k < w.k_blocks; ++k, at.advance()) {
      mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
      mbarrier_arrive_expect_tx(s.full[at.stage], (rows + tile_n) * block_k);
      cp_async_bulk_tensor<3>(&s.b[at.stage], p.b, {k * block_k, w.column, w.b_batch}, s.full[at.stage]);
      for (int row = 0; row < rows; row += box_rows)
        cp_async_bulk_tensor<3>(s.a[at.stage].data + row * block_k, p.a, {k * block_k, w.row + row, w.a_batch},
                                s.full[at.stage]);
    }
  }

  template <int rows>
  DEVICE static void multiply(Smem& s, Work w, At& at) {
    float totals[rows / 2];
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) totals[i] = 0;
    if constexpr (scaled) {
      overlap<rows>(
          w.k_blocks,
          [&](Product<rows>& product) {
            int stage = product.stage = at.stage;
            mbarrier_wait(s.full[stage], at.phase);
            multiply_stage<Format, rows>(product.sums, operand<Format>(&s.b[stage]), operand<Format>(&s.a[stage]));
            at.advance();
          },
          [&](const Product<rows>& product) { add(s, product, totals); });
    } else {
      for (int k = 0; k < w.k_blocks; ++k, at.advance()) {
        mbarrier_wait(s.full[at.stage], at.phase);
        multiply_stage<Format, rows>(totals, operand<Format>(&s.b[at.stage]), operand<Format>(&s.a[at.stage]));
        wgmma_wait_group<0>(totals);
        release(s.empty[at.stage]);
      }
    }
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) store(s.sums[fragment_column(i)][fragment_row(i)], totals[i]);
  }

  // totals += the sums of a stage, times both scales.
  template <int rows>
  DEVICE static void add(Smem& s, const Product<rows>& product, float (&totals)[rows / 2]) {
    int stage = product.stage;
    float upper = load(s.b_scales[stage][b_rows ? fragment_row(0) : 0]);
    float lower = b_rows ? load(s.b_scales[stage][fragment_row(2)]) : upper;
#pragma unroll
    for (int i = 0; i < rows / 2; i += 4) {
      Pack<float, 2> columns = load_pack<2>(s.a_scales[stage][fragment_column(i)]);
#pragma unroll
      for (int j = i; j < i + 4; ++j) totals[j] += (j / 2 % 2 ? lower : upper) * columns.item[j % 2] * product.sums[j];
    }
    release(s.empty[stage]);
  }

  // Four neighbouring columns by each thread.
  DEVICE static void store_rows(const Params& p, Smem& s, Work w) {
    constexpr int fours = tile_n / 4;
    for (int i = thread_index(); i < tile_m * fours; i += warpgroup_size) {
      int row = w.row + i / fours, column = w.column + i % fours * 4;
      if (row >= w.row_end || column >= p.n) continue;
      store_global(p.out, int64_t(row) * p.n + column, round_to<Out>(load_pack<4>(s.sums[i / fours][i % fours * 4])));
    }
  }
};

}  // namespace jaxkern::cuda::kernels
