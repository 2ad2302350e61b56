// out = a b^T for many rows: a persistent block for each multiprocessor walks over tiles of the result.
//
//   warp 0 of the last warpgroup   copies tiles of a and b and their scales into a ring of stages, with the copy engine
//   warp 1 of the last warpgroup   copies the scales where the copy engine cannot
//   the other warpgroups           multiply; each keeps the float32 sums of its 64 or 128 rows of the tile, and stores
//                                  them while the producers fetch the next tile
//
// The two blocks of a cluster take tiles one above the other, which need the same rows of b: each fetches half of them
// for both. A pair whose second tile lies beyond m is computed all the same, on zeros: no block ever waits for one that
// is gone.
#pragma once

#include "cuda/gemm/tile.h"

namespace jaxkern::cuda::kernels {

template <typename Out>
struct DenseParams {
  TensorMap a, b, out;  // [batch, m, k], [b_batch, n, k], [batch, m, n]
  TensorMap a_scales_map, b_scales_map;
  Global<const float> a_scales, b_scales;
  Global<const Out> accumulator;  // empty: none
  int m, n, k_blocks, batch, b_batch;
  int m_tiles, n_tiles, band;  // m_tiles is a multiple of the cluster
  bool scales_by_copy_engine;  // else by the threads of a warp: the rows of a's scales are not aligned
};

// Tiles one after the other, in bands of `band` rows of tiles: what runs at one time shares rows of a and of b in L2.
struct TilePosition {
  int batch, m_tile, n_tile;
};

template <typename Params>
DEVICE TilePosition tile_position(const Params& p, int tile) {
  int per_batch = p.m_tiles * p.n_tiles, in_batch = tile % per_batch;
  int first = in_batch / (p.band * p.n_tiles) * p.band;
  int rows = p.m_tiles - first < p.band ? p.m_tiles - first : p.band;
  int in_band = in_batch - first * p.n_tiles;
  return {tile / per_batch, first + in_band % rows, in_band / rows};
}

// b_rows: the scales of b are 1 x 128, else 128 x 128.
template <int tile_m, int tile_n, int cluster, bool b_rows, typename Out>
struct Dense {
  static_assert(tile_m % 64 == 0 && tile_n % 64 == 0 && (tile_n <= 128 || !b_rows));
  static constexpr int math_groups = tile_m == 64 ? 1 : 2;
  static constexpr int slabs = tile_m / math_groups / 64;  // of 64 rows, for each warpgroup
  static constexpr int threads = warpgroup_size * (math_groups + 1);
  static constexpr int registers = math_groups == 2 ? 168 : 0;
  static constexpr int strip = swizzle_row / sizeof(Out);  // columns of one store
  static constexpr int strips = tile_n / strip;
  static constexpr int staged = tile_m == 256 ? 1 : strips;  // at a time; of the large tile few, to have a fourth stage
  static constexpr int stage_bytes = (tile_m + tile_n) * block_k + tile_m * 4 + (b_rows ? tile_n * 4 : 0);
  static constexpr int staging_bytes = math_groups * staged * 64 * swizzle_row;
  static constexpr int most_stages = (max_shared_bytes - staging_bytes - 2048) / stage_bytes;
  static constexpr int stages = most_stages < 8 ? most_stages : 8;
  static_assert(stages >= 3);
  static std::string name() { return instance_name("Dense", {tile_m, tile_n, cluster}, b_rows, sizeof(Out) == 4); }

  using Params = DenseParams<Out>;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_m * block_k> a[stages];
    Tile<tile_n * block_k> b[stages];
    Tile<64 * swizzle_row> staging[math_groups][staged];
    Shared<float> a_scales[stages][tile_m];
    Shared<float> b_scales[stages][b_rows ? tile_n : 1];
    Barrier full[stages], empty[stages];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.a);
      prefetch_tensormap(p.b);
      prefetch_tensormap(p.out);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], p.scales_by_copy_engine ? 1 : 1 + warp_size);
        mbarrier_init(s.empty[i], cluster * math_groups * 4);  // every math warp that reads it, of every block
      }
      fence_mbarrier_init();
    }
    sync_all();
    if (warp >= math_groups * 4) {
      if constexpr (registers > 0) setmaxnreg_dec<40>();
      if (warp == math_groups * 4) {
        if (elect()) produce_tiles(p, s);
      } else if (warp == math_groups * 4 + 1 && !p.scales_by_copy_engine) {
        produce_scales(p, s);
      }
      syncwarp();
    } else {
      if constexpr (registers > 0) setmaxnreg_inc<232>();
      multiply(p, s, warp / 4);
    }
    if constexpr (cluster > 1) {  // nobody leaves while a neighbour may still arrive at its barriers
      barrier_cluster_arrive();
      barrier_cluster_wait();
    }
  }

  DEVICE static void sync_all() {
    if constexpr (cluster > 1) {
      barrier_cluster_arrive();
      barrier_cluster_wait();
    } else {
      bar_sync(0, threads);
    }
  }

  DEVICE static int tiles(const Params& p) { return p.batch * p.m_tiles * p.n_tiles; }

  DEVICE static void produce_tiles(const Params& p, Smem& s) {
    At at;
    for (int tile = block_index(); tile < tiles(p); tile += grid_size()) {
      TilePosition t = tile_position(p, tile);
      int b_batch = p.b_batch == 1 ? 0 : t.batch;
      for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
        mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
        int scale_bytes = p.scales_by_copy_engine ? tile_m * 4 + (b_rows ? tile_n * 4 : 0) : 0;
        mbarrier_arrive_expect_tx(s.full[at.stage], (tile_m + tile_n) * block_k + scale_bytes);
        if (p.scales_by_copy_engine) {
          cp_async_bulk_tensor<2>(&s.a_scales[at.stage], p.a_scales_map, {t.m_tile * tile_m, t.batch * p.k_blocks + k},
                                  s.full[at.stage]);
          if constexpr (b_rows)
            cp_async_bulk_tensor<2>(&s.b_scales[at.stage], p.b_scales_map,
                                    {t.n_tile * tile_n, b_batch * p.k_blocks + k}, s.full[at.stage]);
        }
        cp_async_bulk_tensor<3>(&s.a[at.stage], p.a, {k * block_k, t.m_tile * tile_m, t.batch}, s.full[at.stage]);
        if constexpr (cluster == 1) {
          cp_async_bulk_tensor<3>(&s.b[at.stage], p.b, {k * block_k, t.n_tile * tile_n, b_batch}, s.full[at.stage]);
        } else {
          constexpr int part = tile_n / cluster;
          int rank = cluster_rank();
          cp_async_bulk_tensor_multicast<3>(s.b[at.stage].data + rank * part * block_k, p.b,
                                            {k * block_k, t.n_tile * tile_n + rank * part, b_batch}, s.full[at.stage],
                                            (1 << cluster) - 1);
        }
      }
    }
  }

  DEVICE static void produce_scales(const Params& p, Smem& s) {
    At at;
    for (int tile = block_index(); tile < tiles(p); tile += grid_size()) {
      TilePosition t = tile_position(p, tile);
      for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
        mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
        copy_scales(s.a_scales[at.stage], p.a_scales, int64_t(t.batch) * p.k_blocks + k, t.m_tile * tile_m, p.m);
        if constexpr (b_rows)
          copy_scales(s.b_scales[at.stage], p.b_scales, int64_t(p.b_batch == 1 ? 0 : t.batch) * p.k_blocks + k,
                      t.n_tile * tile_n, p.n);
        cp_async_mbarrier_arrive(s.full[at.stage]);
      }
    }
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }

  DEVICE static void multiply(const Params& p, Smem& s, int group) {
    At at;
    if (math_groups == 2 && group == 1) bar_arrive(turn, 2 * warpgroup_size);  // the first turn is the other's
    for (int tile = block_index(); tile < tiles(p); tile += grid_size()) {
      TilePosition t = tile_position(p, tile);
      float totals[slabs][tile_n / 2];
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab)
#pragma unroll
        for (int i = 0; i < tile_n / 2; ++i) totals[slab][i] = 0;

      BlockScales<tile_n> next;
      if constexpr (!b_rows) next.load(p, t, 0);
      for (int k = 0; k < p.k_blocks; ++k, at.advance()) {
        BlockScales<tile_n> b_scales = next;
        if constexpr (!b_rows) next.load(p, t, k + 1 < p.k_blocks ? k + 1 : k);  // a stage ahead of its use
        mbarrier_wait(s.full[at.stage], at.phase);
#pragma unroll
        for (int slab = 0; slab < slabs; ++slab) {
          int row = (group * slabs + slab) * 64;
          float sums[tile_n / 2];
          if constexpr (math_groups == 2) bar_sync(turn + group, 2 * warpgroup_size);
          multiply_stage<tile_n>(sums, s.a[at.stage].data + row * block_k, &s.b[at.stage]);
          if constexpr (math_groups == 2) bar_arrive(turn + 1 - group, 2 * warpgroup_size);
          float upper = load(s.a_scales[at.stage][row + fragment_row(0)]);
          float lower = load(s.a_scales[at.stage][row + fragment_row(2)]);
          Pack<float, 2> columns[b_rows ? tile_n / 8 : 1];
          if constexpr (b_rows)
#pragma unroll
            for (int j = 0; j < tile_n / 8; ++j)
              columns[j] = load_pack<2>(s.b_scales[at.stage][fragment_column(4 * j)]);
          wgmma_wait_group<0>(sums);
          if (slab == slabs - 1) release(s.empty[at.stage]);
#pragma unroll
          for (int i = 0; i < tile_n / 2; ++i) {
            float scale = i / 2 % 2 ? lower : upper;
            if constexpr (b_rows)
              totals[slab][i] += scale * columns[i / 4].item[i % 2] * sums[i];
            else
              totals[slab][i] += scale * b_scales.value[i / 4 * 8 / BlockScales<tile_n>::width] * sums[i];
          }
        }
      }
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab) store(p, s, t, group, slab, totals[slab]);
    }
    if (math_groups == 2 && group == 0) bar_sync(turn, 2 * warpgroup_size);  // the other's last turn
    if (thread_index() % warpgroup_size == 0) bulk_wait_group<0>();
  }

  // The two math warpgroups take turns at the tensor cores, so that one multiplies while the other promotes its sums.
  // Left to themselves they fall into step, and the tensor cores idle while both promote.
  static constexpr int turn = 4;  // and 5: named barriers

  // The scales of a tile's columns, one for each `width` of them.
  template <int columns>
  struct BlockScales {
    static constexpr int width = columns % 128 == 0 ? 128 : 64;
    float value[columns / width];

    DEVICE void load(const Params& p, TilePosition t, int k) {
#pragma unroll
      for (int i = 0; i < columns / width; ++i) {
        int block = (t.n_tile * columns + i * width) / 128, last = (p.n - 1) / 128;
        int64_t row = int64_t(p.b_batch == 1 ? 0 : t.batch) * (last + 1) + (block < last ? block : last);
        value[i] = load_global<float>(p.b_scales, row * p.k_blocks + k);
      }
    }
  };

  DEVICE static void release(Barrier& empty) {
    // In every block that a copy of the next round into this stage may come from.
    syncwarp();
    if (lane_index() < cluster) {
      if constexpr (cluster == 1)
        mbarrier_arrive(empty);
      else
        mbarrier_arrive_cluster(empty, lane_index());
    }
  }

  DEVICE static void store(const Params& p, Smem& s, TilePosition t, int group, int slab, float (&totals)[tile_n / 2]) {
    int first_row = t.m_tile * tile_m + (group * slabs + slab) * 64, first_column = t.n_tile * tile_n;
    if (p.accumulator.size) {
#pragma unroll
      for (int i = 0; i < tile_n / 2; i += 2) {
        int row = first_row + fragment_row(i), column = first_column + fragment_column(i);
        if (row < p.m && column < p.n) {
          Pair<Out> pair = load_pair(p.accumulator, (int64_t(t.batch) * p.m + row) * p.n + column);
          totals[i] += low_of(pair);
          totals[i + 1] += high_of(pair);
        }
      }
    }
    bool first = thread_index() % warpgroup_size == 0;
#pragma unroll
    for (int i = 0; i < strips; i += staged) {
      if (first) bulk_wait_group_read<0>();  // the staging has been stored from
      bar_sync(1 + group, warpgroup_size);
#pragma unroll
      for (int j = 0; j < staged; ++j) stage(shared_address(&s.staging[group][j]), totals, (i + j) * strip, Out{});
      fence_proxy_async();
      bar_sync(1 + group, warpgroup_size);
      if (first) {
        for (int j = 0; j < staged; ++j)
          cp_async_bulk_tensor_store<3>(p.out, {first_column + (i + j) * strip, first_row, t.batch},
                                        &s.staging[group][j]);
        bulk_commit_group();
      }
    }
  }

  // The columns from `first` on into a strip of 64 rows of 128 bytes, with the swizzle of the tensor map.
  DEVICE static void stage(uint32_t staging, const float (&totals)[tile_n / 2], int first, bfloat16) {
    int lane = lane_index();
    int row = thread_index() % warpgroup_size / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < strip / 8; j += 2) {  // two times 8 columns, two times 8 rows
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fragment[i] = cvt_bf16x2(totals[first / 2 + j * 4 + 2 * i], totals[first / 2 + j * 4 + 2 * i + 1]);
      stmatrix<4, false>(staging + row * swizzle_row + ((j + lane / 16) ^ (row % 8)) * 16, fragment);
    }
  }

  DEVICE static void stage(uint32_t staging, const float (&totals)[tile_n / 2], int first, float) {
#pragma unroll
    for (int i = 0; i < strip / 2; i += 2) {
      int row = fragment_row(i), column = fragment_column(i);
      store_shared(staging + row * swizzle_row + (((column / 4) ^ (row % 8)) * 4 + column % 4) * 4,
                   pack(totals[first / 2 + i], totals[first / 2 + i + 1], 0.0f));
    }
  }
};

}  // namespace jaxkern::cuda::kernels
