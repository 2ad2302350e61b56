// out = a b^T for few rows of a, as when decoding: tiles of 64 rows and so few columns that every multiprocessor reads
// its share of b. Nothing is split along k but between the warpgroups of a block.
//
//   warpgroups 0, 1  multiply every second stage each; their sums are added up at the end: the same bits on every run
//   warp 8           copies tiles of a and b into a ring of stages
//   warp 9           copies their scales
#pragma once

#include "cuda/gemm/few.h"

namespace jaxkern::cuda::kernels {

template <int tile_n, typename Format, typename Out>
struct Narrow {
  static constexpr bool b_rows = Format::b_rows;
  static_assert(Format::scaled && tile_n % 16 == 0 && 128 % tile_n == 0);
  static constexpr int tile_m = 64, math_groups = 2, math_threads = math_groups * warpgroup_size;
  static constexpr int threads = math_threads + 2 * warp_size;
  static constexpr int part_row = tile_n + 8;  // 8 more spread the banks
  static constexpr int stage_bytes = (tile_m + tile_n) * block_k + (tile_m + (b_rows ? tile_n : 1)) * 4 + 16;
  static constexpr int most_stages = (max_shared_bytes - math_groups * tile_m * part_row * 4 - 256) / stage_bytes;
  static constexpr int stages = most_stages < 16 ? most_stages : 16;
  static std::string name() { return instance_name("Narrow", "", {tile_n}, Format::name, sizeof(Out) == 4); }

  using Params = FewParams<Batches, Out>;
  using Walk = Batches::Walk<tile_m, tile_n>;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_m * block_k> a[stages];
    Tile<tile_n * block_k> b[stages];
    Shared<float> part[math_groups][tile_m][part_row];  // each warpgroup's sums
    Shared<float> a_scales[stages][tile_m];
    Shared<float> b_scales[stages][b_rows ? tile_n : 1];
    Barrier full[stages], empty[stages];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    constexpr int math_warps = math_threads / warp_size;
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.a);
      prefetch_tensormap(p.b);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], 1 + warp_size);              // the copies of tiles and of scales
        mbarrier_init(s.empty[i], math_warps / math_groups);  // one warpgroup reads it
      }
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
    At at;  // in the role's way
    if (warp == math_warps) {
      if (elect()) for_tiles(Walk(p.schedule, {}), [&](Work w) { produce_tiles(p, s, w, at); });
      syncwarp();
    } else if (warp == math_warps + 1) {
      for_tiles(Walk(p.schedule, {}), [&](Work w) { produce_scales<Format>(p, s, w, at); });
      cp_async_commit_group();
      cp_async_wait_group<0>();
    } else {
      clear_rows(p, s);
      for_tiles(Walk(p.schedule, {}), [&](Work w) {
        multiply(s, w, at, warp / 4);
        bar_sync(1, math_threads);
        store_rows(p, s, w);
        bar_sync(1, math_threads);
      });
    }
  }

  // The rows of a's stages that no copy writes: products read them, though nothing of that is stored.
  DEVICE static void clear_rows(const Params& p, Smem& s) {
    int first = box_rows(p.m) * swizzle_row;
    for (int stage = 0; stage < stages; ++stage)
      for (int i = first + thread_index() * 16; i < tile_m * swizzle_row; i += math_threads * 16)
        store_shared(shared_address(s.a[stage].data) + i, Pack<uint32_t, 4>{0, 0, 0, 0});
    fence_proxy_async();
    bar_sync(1, math_threads);
  }

  // Of a that one copy brings. Rows beyond the matrix would take the copy engine longer than others.
  HOST_DEVICE static int box_rows(int m) { return m < tile_m ? m : tile_m; }

  DEVICE static void produce_tiles(const Params& p, Smem& s, Work w, At& at) {
    for (int k = 0; k < w.k_blocks; ++k, at.advance()) {
      mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
      mbarrier_arrive_expect_tx(s.full[at.stage], (box_rows(p.m) + tile_n) * block_k);
      cp_async_bulk_tensor<3>(&s.b[at.stage], p.b, {k * block_k, w.column, w.b_batch}, s.full[at.stage]);
      cp_async_bulk_tensor<3>(&s.a[at.stage], p.a, {k * block_k, w.row, w.a_batch}, s.full[at.stage]);
    }
  }

  DEVICE static void multiply(Smem& s, Work w, At& at, int group) {
    float totals[tile_n / 2];
#pragma unroll
    for (int i = 0; i < tile_n / 2; ++i) totals[i] = 0;
    At own = at;
    own.advance(group);
    at.advance(w.k_blocks);
    auto start = [&](Product<tile_n>& product) {
      product.stage = own.stage;
      mbarrier_wait(s.full[own.stage], own.phase);
      multiply_stage<Format, tile_n>(product.sums, operand<Format>(&s.a[own.stage]), operand<Format>(&s.b[own.stage]));
      own.advance(math_groups);
    };
    overlap<tile_n>((w.k_blocks - group + math_groups - 1) / math_groups, start,
                    [&](const Product<tile_n>& product) { add(s, product, totals); });
#pragma unroll
    for (int i = 0; i < tile_n / 2; i += 2)
      store_shared(shared_address(&s.part[group][fragment_row(i)][fragment_column(i)]),
                   Pack<float, 2>{totals[i], totals[i + 1]});
  }

  // totals += the sums of a stage, times both scales.
  DEVICE static void add(Smem& s, const Product<tile_n>& product, float (&totals)[tile_n / 2]) {
    int stage = product.stage;
    float rows[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rows[j] = load(s.a_scales[stage][fragment_row(2 * j)]);
      if constexpr (!b_rows) rows[j] *= load(s.b_scales[stage][0]);
    }
#pragma unroll
    for (int i = 0; i < tile_n / 2; i += 4) {
      Pack<float, 2> columns = {1, 1};
      if constexpr (b_rows) columns = load_pack<2>(s.b_scales[stage][fragment_column(i)]);
#pragma unroll
      for (int j = i; j < i + 4; ++j) totals[j] += rows[j / 2 % 2] * columns.item[j % 2] * product.sums[j];
    }
    release(s.empty[stage]);
  }

  // Four neighbouring columns by each thread.
  DEVICE static void store_rows(const Params& p, Smem& s, Work w) {
    constexpr int fours = tile_n / 4;
#pragma unroll
    for (int i = thread_index(); i < tile_m * fours; i += math_threads) {
      int row = i / fours, column = i % fours * 4;
      if (w.row + row >= w.row_end || w.column + column >= p.n) continue;
      Pack<float, 4> sums = load_pack<4>(s.part[0][row][column]);
      add_to(sums, load_pack<4>(s.part[1][row][column]));
      int64_t at = (int64_t(w.batch) * p.m + w.row + row) * p.n + w.column + column;
      if (p.accumulator.size) add_to(sums, to_floats(load_global<Four<Out>>(p.accumulator, at)));
      store_global(p.out, at, round_to<Out>(sums));
    }
  }

  DEVICE static void add_to(Pack<float, 4>& sums, const Pack<float, 4>& more) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.item[i] += more.item[i];
  }
};

}  // namespace jaxkern::cuda::kernels
