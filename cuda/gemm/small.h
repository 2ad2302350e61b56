// out = a b^T for few rows of a, as when decoding. The rows of b take the place of the 64 rows of a wgmma and those of
// a that of its columns, which come in 16s: no tensor core works on rows that do not exist. All time goes into reading
// b once, so the blocks of a cluster share a tile of it along k, and add their parts in the order of k: the same bits
// on every run.
//
//   warpgroup 0  multiplies
//   warp 4       copies tiles of b and a into a ring of stages
//   warp 5       copies their scales
#pragma once

#include "cuda/gemm/schedule.h"

namespace jaxkern::cuda::kernels {

template <typename Schedule, typename Out>
struct SmallParams {
  TensorMap a, b;  // matrices of a batch each: [batch, m, k], [b_batch, n, k]
  Global<const float> a_scales, b_scales;
  Global<const Out> accumulator;  // empty: none
  Global<Out> out;
  int m, n, k_blocks;
  int parts;  // the cluster's blocks
  typename Schedule::Params schedule;
};

// tile_m: the most rows of a in a tile; a group's tile multiplies 16, 32 or all of them.
template <typename Schedule, int tile_m, typename Format, typename Out>
struct Small {
  static constexpr bool scaled = Format::scaled, b_rows = Format::b_rows;
  static_assert(tile_m % 16 == 0 && tile_m <= 64);
  static constexpr int tile_n = 64;
  static constexpr int box_rows = Schedule::edges ? 16 : tile_m;  // of a that one copy brings
  static constexpr int threads = warpgroup_size + 2 * warp_size;
  static constexpr int stages = tile_m <= 32 ? 8 : 5;  // two blocks fit on a multiprocessor
  static std::string name() { return instance_name("Small", Schedule::name, {tile_m}, Format::name, sizeof(Out) == 4); }

  using Params = SmallParams<Schedule, Out>;
  using Walk = typename Schedule::template Walk<tile_m, tile_n>;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_n * block_k> b[stages];
    Tile<tile_m * block_k> a[stages];
    Shared<float> part[tile_m][tile_n + 4];  // this block's sums, out's way round; 4 more spread the banks
    Shared<float> a_scales[stages][scaled ? tile_m : 1];
    Shared<float> b_scales[stages][b_rows ? tile_n : 1];
    Barrier full[stages], empty[stages];
    typename Schedule::Smem schedule;
  };

  // A role's way through its tiles, of each this block's part of k: f gets the work and the stage to go on with.
  template <typename F>
  DEVICE static void for_tiles(const Params& p, const Smem& s, F&& f) {
    Walk walk(p.schedule, s.schedule);
    Work w;
    At at;
    for (int tile = block_index() / p.parts; walk.find(tile, w); tile += grid_size() / p.parts) {
      if (p.parts > 1) {
        int rank = cluster_rank(), blocks = w.k_blocks;
        w.first_k = static_cast<int>(int64_t(blocks) * rank / p.parts);
        w.k_blocks = static_cast<int>(int64_t(blocks) * (rank + 1) / p.parts) - w.first_k;
      }
      f(w, at);
    }
  }

  // The rows that a tile multiplies: what wgmma offers that is not less than it has.
  DEVICE static int rows_of(Work w) {
    if (!Schedule::edges) return tile_m;
    int rows = w.row_end - w.row;
    return rows <= 16 ? 16 : rows <= 32 ? 32 : tile_m;
  }

  DEVICE static void run(const Params& p, Smem& s) {
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
    if (warp == 0) Schedule::prepare(p.schedule, s.schedule);
    bar_sync(0, threads);
    if (warp == 4) {
      if (elect()) for_tiles(p, s, [&](Work w, At& at) { produce_tiles(p, s, w, at); });
      syncwarp();
    } else if (warp == 5) {
      if constexpr (scaled) {
        for_tiles(p, s, [&](Work w, At& at) { produce_scales(p, s, w, at); });
        cp_async_commit_group();
        cp_async_wait_group<0>();
      }
    } else {
      for_tiles(p, s, [&](Work w, At& at) {
        int rows = rows_of(w);
        if (rows == tile_m)
          multiply<tile_m>(p, s, w, at);
        else if (tile_m > 16 && rows == 16)
          multiply<16>(p, s, w, at);
        else if (tile_m > 32)
          multiply<32>(p, s, w, at);
        if (p.parts == 1) {
          bar_sync(1, warpgroup_size);
          store_rows<false>(p, s, w);
          bar_sync(1, warpgroup_size);
        }
      });
    }
    if (p.parts == 1) return;
    // Along k every block has one tile, whose parts are added up when all of them are there.
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (warp < 4) for_tiles(p, s, [&](Work w, At&) { store_rows<true>(p, s, w); });
    barrier_cluster_arrive();  // nobody leaves while its part is read
    barrier_cluster_wait();
  }

  DEVICE static void produce_tiles(const Params& p, Smem& s, Work w, At& at) {
    int rows = rows_of(w);
    for (int k = w.first_k; k < w.first_k + w.k_blocks; ++k, at.advance()) {
      mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
      mbarrier_arrive_expect_tx(s.full[at.stage], (rows + tile_n) * block_k);
      cp_async_bulk_tensor<3>(&s.b[at.stage], p.b, {k * block_k, w.column, w.b_batch}, s.full[at.stage]);
      for (int row = 0; row < rows; row += box_rows)
        cp_async_bulk_tensor<3>(s.a[at.stage].data + row * block_k, p.a, {k * block_k, w.row + row, w.a_batch},
                                s.full[at.stage]);
    }
  }

  DEVICE static void produce_scales(const Params& p, Smem& s, Work w, At& at) {
    for (int k = w.first_k; k < w.first_k + w.k_blocks; ++k, at.advance()) {
      mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
      copy_scales(s.a_scales[at.stage], p.a_scales, int64_t(w.a_batch) * p.k_blocks + k, w.row, p.m);
      if constexpr (b_rows)
        copy_scales(s.b_scales[at.stage], p.b_scales, int64_t(w.b_batch) * p.k_blocks + k, w.column, p.n);
      cp_async_mbarrier_arrive(s.full[at.stage]);
    }
  }

  // The scale of the tile's 64 rows of b.
  DEVICE static float block_scale(const Params& p, Work w, int k) {
    int64_t row = int64_t(w.b_batch) * ceil_div(p.n, 128) + w.column / 128;
    return load_global<float>(p.b_scales, row * p.k_blocks + k);
  }

  template <int rows>
  DEVICE static void multiply(const Params& p, Smem& s, Work w, At& at) {
    float totals[rows / 2];
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) totals[i] = 0;
    if constexpr (scaled)
      add_scaled(p, s, w, at, totals);
    else
      add(s, w, at, totals);
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) store(s.part[fragment_column(i)][fragment_row(i)], totals[i]);
  }

  template <int count>
  DEVICE static void add_scaled(const Params& p, Smem& s, Work w, At& at, float (&totals)[count]) {
    constexpr int rows = count * 2;
    float next = 0;
    int last_k = w.first_k + w.k_blocks;
    if (!b_rows && w.k_blocks > 0) next = block_scale(p, w, w.first_k);
    for (int k = w.first_k; k < last_k; ++k, at.advance()) {
      float upper = next, lower = next;
      if (!b_rows) next = block_scale(p, w, k + 1 < last_k ? k + 1 : k);  // a stage ahead of its use
      mbarrier_wait(s.full[at.stage], at.phase);
      float sums[count];
      multiply_stage<Format, rows>(sums, operand<Format>(&s.b[at.stage]), operand<Format>(&s.a[at.stage]));
      if constexpr (b_rows) {
        upper = load(s.b_scales[at.stage][fragment_row(0)]);
        lower = load(s.b_scales[at.stage][fragment_row(2)]);
      }
      Pack<float, 2> columns[rows / 8];
#pragma unroll
      for (int j = 0; j < rows / 8; ++j) columns[j] = load_pack<2>(s.a_scales[at.stage][fragment_column(4 * j)]);
      wgmma_wait_group<0>(sums);
      release(s.empty[at.stage]);
#pragma unroll
      for (int i = 0; i < count; ++i) totals[i] += (i / 2 % 2 ? lower : upper) * columns[i / 4].item[i % 2] * sums[i];
    }
  }

  template <int count>
  DEVICE static void add(Smem& s, Work w, At& at, float (&totals)[count]) {
    for (int k = 0; k < w.k_blocks; ++k, at.advance()) {
      mbarrier_wait(s.full[at.stage], at.phase);
      multiply_stage<Format, count * 2>(totals, operand<Format>(&s.b[at.stage]), operand<Format>(&s.a[at.stage]));
      wgmma_wait_group<0>(totals);
      release(s.empty[at.stage]);
    }
  }

  // The sums of all blocks of the cluster, each block its share of the rows: a warp takes a row, a lane two
  // neighbouring columns.
  template <bool of_cluster>
  DEVICE static void store_rows(const Params& p, Smem& s, Work w) {
    int rank = of_cluster ? cluster_rank() : 0, parts = of_cluster ? p.parts : 1;
    for (int i = rank * 4 + thread_index() / warp_size; i < tile_m; i += parts * 4) {
      int row = w.row + i, j = lane_index() * 2, column = w.column + j;
      if (row >= w.row_end || column >= p.n) continue;
      float low = 0, high = 0;
      for (int r = 0; r < parts; ++r) {
        Pack<float, 2> part;
        if constexpr (of_cluster)
          part = load_cluster<2>(s.part[i][j], r);
        else
          part = load_pack<2>(s.part[i][j]);
        low += part.item[0];
        high += part.item[1];
      }
      int64_t at = (int64_t(w.batch) * p.m + row) * p.n + column;
      if (p.accumulator.size) {
        Pair<Out> pair = load_pair(p.accumulator, at);
        low += low_of(pair);
        high += high_of(pair);
      }
      store_global(p.out, at, pack(low, high, Out{}));
    }
  }
};

}  // namespace jaxkern::cuda::kernels
