// out = a b^T for many rows: a persistent block for each multiprocessor walks over tiles of the result.
//
//   warp 0 of the last warpgroup   copies tiles of a and b and their scales into a ring of stages, with the copy engine
//   warp 1 of the last warpgroup   copies the scales where the copy engine cannot
//   the other warpgroups           multiply; each keeps the float32 sums of its 64 or 128 rows of the tile, and stores
//                                  them while the producers fetch the next tile
//
// The two blocks of a cluster take tiles one above the other, which need the same rows of b, or side by side, which
// need the same rows of a, whichever are more: each fetches half of them for both. A pair whose second tile lies beyond
// the matrix is computed all the same, on zeros: no block ever waits for one that is gone.
#pragma once

#include "cuda/gemm/schedule.h"

namespace jaxkern::cuda::kernels {

template <typename Schedule, typename Out>
struct DenseParams {
  TensorMap a, b, out;  // matrices of a batch each: [batch, m, k], [b_batch, n, k], [batch, m, n]; or [k, m], [k, n]
  TensorMap a_scales_map, b_scales_map;
  Global<const float> a_scales, b_scales;
  Global<const Out> accumulator;  // empty: none
  Global<Out> out_rows;           // out, for the tiles that the copy engine cannot store
  int m, n, k_blocks;
  bool scales_by_copy_engine;  // else by the threads of a warp: the rows of a's scales are not aligned
  typename Schedule::Params schedule;
};

template <typename Schedule, int tile_m, int tile_n, int cluster, typename Format, typename Out>
struct Dense {
  static constexpr bool scaled = Format::scaled, b_rows = Format::b_rows;
  static constexpr int stage_k = Format::stage_k;
  static_assert(tile_m % 128 == 0 && tile_n % 64 == 0);
  // Tiles of a cluster side by side and one above the other; of each operand's rows a block fetches its part.
  static constexpr int across = tile_m > tile_n ? cluster : 1, above = cluster / across;
  static constexpr int a_part = tile_m / across, b_part = tile_n / above;
  // Where b has scales of blocks: as many for a tile and a stage, one for each `width` columns.
  static constexpr int width = tile_n % 128 == 0 ? 128 : 64, scale_blocks = scaled && !b_rows ? tile_n / width : 0;
  static constexpr int math_groups = 2;
  static constexpr int slabs = tile_m / math_groups / 64;  // of 64 rows, for each warpgroup
  static constexpr int threads = warpgroup_size * (math_groups + 1);
  static constexpr int registers = 168;
  static constexpr bool starts_early = Schedule::follows_small;  // beside Small, which writes other rows
  static constexpr int strip = swizzle_row / sizeof(Out);        // columns of one store
  static constexpr int strips = tile_n / strip;
  static constexpr int staged = sizeof(Out) == 4 ? 1 : slabs;  // at a time; what leaves three stages
  static constexpr int stage_bytes =
      (tile_m + tile_n) * block_k + (scaled ? tile_m * 4 : 0) + (b_rows ? tile_n * 4 : 0);
  static constexpr int staging_bytes = math_groups * staged * strips * 64 * swizzle_row;
  static constexpr int most_stages =
      (max_shared_bytes - staging_bytes - sizeof(typename Schedule::Smem) - 256) / stage_bytes;
  static constexpr int stages = most_stages < 8 ? most_stages : 8;
  static_assert(stages >= 3);
  static std::string name() {
    return instance_name("Dense", Schedule::name, {tile_m, tile_n, cluster}, Format::name, sizeof(Out) == 4);
  }

  using Params = DenseParams<Schedule, Out>;
  using Walk = typename Schedule::template Walk<tile_m, tile_n, across>;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_m * block_k> a[stages];
    Tile<tile_n * block_k> b[stages];
    Tile<64 * swizzle_row> staging[math_groups][staged][strips];
    Shared<float> a_scales[stages][scaled ? tile_m : 1];
    Shared<float> b_scales[stages][b_rows ? tile_n : 1];
    Barrier full[stages], empty[stages];
    typename Schedule::Smem schedule;
  };

  // Whether warp 1 of the last warpgroup copies scales.
  DEVICE static bool copies_scales(const Params& p) { return scaled && !p.scales_by_copy_engine; }

  DEVICE static void run(const Params& p, Smem& s) {
    if constexpr (starts_early) griddepcontrol_launch_dependents();
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.a);
      prefetch_tensormap(p.b);
      prefetch_tensormap(p.out);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], copies_scales(p) ? 1 + warp_size : 1);
        mbarrier_init(s.empty[i], cluster * math_groups * 4);  // every math warp that reads it, of every block
      }
      fence_mbarrier_init();
    }
    if (warp == 0) Schedule::prepare(p.schedule, s.schedule);
    sync_cluster<cluster>(threads);
    if (warp >= math_groups * 4) {
      setmaxnreg_dec<40>();
      if (warp == math_groups * 4) {
        if (elect()) produce_tiles(p, s);
      } else if (warp == math_groups * 4 + 1 && copies_scales(p)) {
        if constexpr (scaled) produce_scales(p, s);
      }
      syncwarp();
    } else {
      setmaxnreg_inc<232>();
      multiply(p, s, warp / 4);
    }
    if constexpr (cluster > 1) sync_cluster<cluster>(threads);  // a neighbour may still arrive at this one's barriers
    if constexpr (starts_early) griddepcontrol_wait();          // who waits for this kernel waits for those before it
  }

  DEVICE static void produce_tiles(const Params& p, Smem& s) {
    At at;
    for_tiles(Walk(p.schedule, s.schedule), [&](Work w) {
      for (int k = w.first_k; k < w.first_k + w.k_blocks; ++k, at.advance()) {
        mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
        int element = w.start + k * stage_k;
        bool scales = scaled && p.scales_by_copy_engine;
        mbarrier_arrive_expect_tx(s.full[at.stage], scales ? stage_bytes : (tile_m + tile_n) * block_k);
        if (scales) {
          int block = element / block_k;
          cp_async_bulk_tensor<2>(&s.a_scales[at.stage], p.a_scales_map, {w.row, w.a_batch * p.k_blocks + block},
                                  s.full[at.stage]);
          if constexpr (b_rows)
            cp_async_bulk_tensor<2>(&s.b_scales[at.stage], p.b_scales_map, {w.column, w.b_batch * p.k_blocks + block},
                                    s.full[at.stage]);
        }
        copy_rows<a_part, across>(s.a[at.stage].data, p.a, w.row, element, w.a_batch, s.full[at.stage]);
        copy_rows<b_part, above>(s.b[at.stage].data, p.b, w.column, element, w.b_batch, s.full[at.stage]);
      }
    });
  }

  // This block's part, `rows` rows, of what a stage of `blocks` blocks needs of an operand, from `row` and from
  // `element` of k on, into each of them.
  template <int rows, int blocks>
  DEVICE static void copy_rows(uint8_t* to, const TensorMap& map, int row, int element, int batch, Barrier& full) {
    constexpr int element_bytes = block_k / stage_k, box = Format::k_major ? rows : box_columns;
    if constexpr (blocks > 1) {
      to += cluster_rank() * rows * block_k;
      row += cluster_rank() * rows;
    }
#pragma unroll
    for (int i = 0; i < rows; i += box) {
      int x = Format::k_major ? element : row + i, y = Format::k_major ? row + i : element;
      if constexpr (blocks == 1)
        cp_async_bulk_tensor<3>(to + i * block_k, map, {x * element_bytes, y, batch}, full);
      else
        cp_async_bulk_tensor_multicast<3>(to + i * block_k, map, {x * element_bytes, y, batch}, full,
                                          (1 << blocks) - 1);
    }
  }

  DEVICE static void produce_scales(const Params& p, Smem& s) {
    At at;
    for_tiles(Walk(p.schedule, s.schedule), [&](Work w) {
      for (int k = w.first_k; k < w.first_k + w.k_blocks; ++k, at.advance()) {
        mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
        int block = w.start / block_k + k;
        copy_scales(s.a_scales[at.stage], p.a_scales, int64_t(w.a_batch) * p.k_blocks + block, w.row, p.m);
        if constexpr (b_rows)
          copy_scales(s.b_scales[at.stage], p.b_scales, int64_t(w.b_batch) * p.k_blocks + block, w.column, p.n);
        cp_async_mbarrier_arrive(s.full[at.stage]);
      }
    });
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }

  DEVICE static void multiply(const Params& p, Smem& s, int group) {
    At at;
    for_tiles(Walk(p.schedule, s.schedule), [&](Work w) {
      float totals[slabs][tile_n / 2];
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab)
#pragma unroll
        for (int i = 0; i < tile_n / 2; ++i) totals[slab][i] = 0;

      Stage now;
      BlockScales b_scales(p, w);
      auto prepare = [&](int k) {
        b_scales.load(k, now.b_scales);
        now.at(s, at.stage, group);
        mbarrier_wait(s.full[at.stage], at.phase);
        now.load_scales(s, group);
        if constexpr (Schedule::tails)
          if (k == w.k_blocks - 1 && w.tail < stage_k) clear_tail(s, at.stage, w.tail);
        at.advance();
      };
      if (w.k_blocks > 0) prepare(0);
      for (int k = 0; k < w.k_blocks; ++k) {
        // While the tensor cores are at work: preparing between two products would keep them waiting.
        auto prepare_next = [&] {
          if (k + 1 < w.k_blocks) prepare(k + 1);
        };
        if constexpr (scaled)
          add_scaled_stage(s, now, totals, prepare_next);
        else
          add_stage(s, now, totals, prepare_next);
      }
      store(p, s, w, group, totals);
    });
    if (thread_index() % warpgroup_size == 0) bulk_wait_group<0>();
  }

  // What a warpgroup's products of a stage read, and the scales of their sums: of its rows, and of blocks of columns.
  struct Stage {
    int index;
    uint64_t a, b;
    float a_scales[slabs][2], b_scales[scale_blocks + 1];

    DEVICE void at(Smem& s, int stage, int group) {
      index = stage;
      a = operand<Format>(s.a[stage].data + group * slabs * slab_bytes);
      b = operand<Format>(&s.b[stage]);
    }

    DEVICE void load_scales(Smem& s, int group) {
      if constexpr (scaled)
#pragma unroll
        for (int i = 0; i < 2 * slabs; ++i)
          a_scales[i / 2][i % 2] = load(s.a_scales[index][(group * slabs + i / 2) * 64 + fragment_row(i % 2 * 2)]);
    }
  };
  static constexpr int slab_bytes = 64 * block_k, slab_step = slab_bytes / 16;  // in units of a descriptor

  // The scales of b's blocks: a warp's lanes have those of `depth` stages and of the four blocks from the tile's first
  // on, and the next are under way. Nothing waits for a load.
  struct BlockScales {
    static constexpr int depth = 8;
    const Params& p;
    int column;  // of the tile, in its first block
    int row;     // of scales, this lane's
    float held, coming;

    DEVICE BlockScales(const Params& p, Work w) : p(p), column(w.column % 128) {
      if constexpr (scale_blocks > 0) {
        int block = w.column / 128 + lane_index() / depth, last = (p.n - 1) / 128;
        // 2^31 scales are those of more than any GPU holds.
        row = (w.b_batch * (last + 1) + (block < last ? block : last)) * p.k_blocks;
        fetch(0);
      }
    }

    DEVICE void fetch(int k) {
      int own = k + lane_index() % depth;
      coming = load_global<float>(p.b_scales, row + (own < p.k_blocks ? own : 0));
    }

    // Of stage k, the stages in turn.
    DEVICE void load(int k, float (&scales)[scale_blocks + 1]) {
      if constexpr (scale_blocks > 0) {
        if (k % depth == 0) held = coming;
        if (k % depth == depth / 2) fetch(k + depth / 2);
#pragma unroll
        for (int i = 0; i < scale_blocks; ++i) scales[i] = shfl(held, (column + i * width) / 128 * depth + k % depth);
      }
    }
  };

  // totals += the products of one stage, each sum over its 128 of k times both scales. The stage after it is prepared
  // while the last product runs.
  template <typename Prepare>
  DEVICE static void add_scaled_stage(Smem& s, const Stage& now, float (&totals)[slabs][tile_n / 2],
                                      Prepare prepare_next) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab) {
      float sums[tile_n / 2];
      multiply_stage<Format, tile_n>(sums, now.a + slab * slab_step, now.b);
      float scales[2][scale_blocks + 1] = {{now.a_scales[slab][0]}, {now.a_scales[slab][1]}};
#pragma unroll
      for (int j = 0; j < 2 * scale_blocks; ++j) scales[j % 2][j / 2] = now.a_scales[slab][j % 2] * now.b_scales[j / 2];
      int stage = now.index;
      if (slab == slabs - 1) prepare_next();
      wgmma_wait_group<0>(sums);
      if (!b_rows && slab == slabs - 1) release<cluster>(s.empty[stage]);
      Pack<float, 2> columns;
#pragma unroll
      for (int i = 0; i < tile_n / 2; ++i) {
        float scale = scales[i / 2 % 2][b_rows ? 0 : i / 4 * 8 / width];
        if constexpr (b_rows) {
          if (i % 4 == 0) columns = load_pack<2>(s.b_scales[stage][fragment_column(i)]);
          scale *= columns.item[i % 2];
        }
        totals[slab][i] += scale * sums[i];
      }
      if (b_rows && slab == slabs - 1) release<cluster>(s.empty[stage]);
    }
  }

  // The same without scales: the tensor cores add it up themselves.
  template <typename Prepare>
  DEVICE static void add_stage(Smem& s, const Stage& now, float (&totals)[slabs][tile_n / 2], Prepare prepare_next) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab)
      multiply_stage<Format, tile_n>(totals[slab], now.a + slab * slab_step, now.b);
    int stage = now.index;
    prepare_next();
    if constexpr (slabs == 1)
      wgmma_wait_group<0>(totals[0]);
    else
      wgmma_wait_group<0>(totals[0], totals[1]);
    release<cluster>(s.empty[stage]);
  }

  // What k beyond the group's end holds is another's, or nobody's: it becomes zero in both operands. By all math
  // threads.
  DEVICE static void clear_tail(Smem& s, int stage, int tail) {
    if constexpr (Format::k_major)
      clear_bytes(s, stage, tail);
    else
      clear_rows(s, stage, tail);
    fence_proxy_async();
    bar_sync(3, math_groups * warpgroup_size);
  }

  // The last bytes of every row: a thread takes a row.
  DEVICE static void clear_bytes(Smem& s, int stage, int tail) {
    for (int row = thread_index(); row < tile_m + tile_n; row += math_groups * warpgroup_size) {
      int r = row < tile_m ? row : row - tile_m;
      uint32_t at = shared_address(row < tile_m ? s.a[stage].data : s.b[stage].data) + r * swizzle_row;
      for (int chunk = tail / 16; chunk < swizzle_row / 16; ++chunk) {
        uint32_t address = at + (chunk ^ (r % 8)) * 16;
        Pack<uint32_t, 4> bytes = {0, 0, 0, 0};
        if (chunk * 16 < tail) {
          bytes = load_shared<Pack<uint32_t, 4>>(address);
          for (int i = 0; i < 4; ++i) {
            int kept = tail - chunk * 16 - i * 4;  // bytes of this word
            bytes.item[i] &= kept >= 4 ? 0xffffffffu : kept <= 0 ? 0 : (1u << kept * 8) - 1;
          }
        }
        store_shared(address, bytes);
      }
    }
  }

  // The last rows of every 64 columns: a thread takes 16 bytes.
  DEVICE static void clear_rows(Smem& s, int stage, int tail) {
    constexpr int box_bytes = stage_k * swizzle_row;
    for (int i = 0; i < tile_m + tile_n; i += box_columns) {
      uint32_t box =
          shared_address(i < tile_m ? s.a[stage].data + i * block_k : s.b[stage].data + (i - tile_m) * block_k);
      for (int at = tail * swizzle_row + thread_index() * 16; at < box_bytes; at += math_groups * warpgroup_size * 16)
        store_shared(box + at, Pack<uint32_t, 4>{0, 0, 0, 0});
    }
  }

  DEVICE static void store(const Params& p, Smem& s, Work w, int group, float (&totals)[slabs][tile_n / 2]) {
    int first_row = w.row + group * slabs * 64;
    if (!Schedule::edges && p.accumulator.size) {
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab)
#pragma unroll
        for (int i = 0; i < tile_n / 2; i += 2) {
          int row = first_row + slab * 64 + fragment_row(i), column = w.column + fragment_column(i);
          if (row < w.row_end && column < p.n) {
            Pair<Out> pair = load_pair(p.accumulator, (int64_t(w.batch) * p.m + row) * p.n + column);
            totals[slab][i] += low_of(pair);
            totals[slab][i + 1] += high_of(pair);
          }
        }
    }
    bool first = thread_index() % warpgroup_size == 0;
#pragma unroll
    for (int slab = 0; slab < slabs; slab += staged) {
      auto by_threads = [&](int i) { return Schedule::edges && first_row + (slab + i + 1) * 64 > w.row_end; };
      if (first) bulk_wait_group_read<0>();  // the staging has been stored from
      bar_sync(1 + group, warpgroup_size);
#pragma unroll
      for (int i = 0; i < staged; ++i) {
        if (by_threads(i)) {
          store_rows(p, w, first_row + (slab + i) * 64, totals[slab + i]);
        } else {
#pragma unroll
          for (int j = 0; j < strips; ++j)
            stage(shared_address(&s.staging[group][i][j]), totals[slab + i], j * strip, Out{});
        }
      }
      fence_proxy_async();
      bar_sync(1 + group, warpgroup_size);
      if (!first) continue;
      for (int i = 0; i < staged; ++i)
        for (int j = 0; j < strips && !by_threads(i); ++j)
          cp_async_bulk_tensor_store<3>(p.out, {w.column + j * strip, first_row + (slab + i) * 64, w.batch},
                                        &s.staging[group][i][j]);
      bulk_commit_group();
    }
  }

  // The rows of 64 that are the group's; the copy engine would write all of them.
  DEVICE static void store_rows(const Params& p, Work w, int first_row, const float (&totals)[tile_n / 2]) {
#pragma unroll
    for (int i = 0; i < tile_n / 2; i += 2) {
      int row = first_row + fragment_row(i), column = w.column + fragment_column(i);
      if (row < w.row_end && column < p.n)
        store_global(p.out_rows, int64_t(row) * p.n + column, pack(totals[i], totals[i + 1], Out{}));
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
