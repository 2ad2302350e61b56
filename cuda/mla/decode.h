// 64 query rows against blocks of 64 keys, two blocks in shared memory, each as nine tiles of 64 keys x 64 numbers; the
// first eight are the values as well.
//
//   warpgroups 0, 1   attend: each computes the logits [64 rows][64 keys] and weights of every other block of keys, and
//                     half of the columns of the result [64 rows][512]
//   warpgroup 2       warp 8 has the copy engine bring queries and keys; of packed keys all four warps load the next
//                     block's bytes into registers, and store the bfloat16 that those of this one stand for
//
// Weights, and what their exponents are counted from, meet in shared memory. After FlashMLA's two warpgroups that share
// one 64 x 512 result, with a chain of blocks of keys in place of its pairs.
//
// The blocks of a cluster of two have neighbouring groups of rows and the same keys, piece for piece, and each brings
// half of the latent for both: of packed keys it unpacks half of them and sends these on (FlashMLA's crossover).
#pragma once

#include <type_traits>

#include "cuda/fours.h"
#include "cuda/mla/schedule.h"
#include "cuda/ring.h"
#include "cuda/softmax.h"

namespace jaxkern::cuda::kernels {

// What is multiplied, of a cache of this format: bfloat16, float16 or Packed.
template <typename Format>
using NumberOf = std::conditional_t<std::is_same_v<Format, Packed>, bfloat16, Format>;

template <typename Format>
struct MlaParams {
  TensorMap q, cache;            // [batch, rows, 576], [pages * page, 576]
  TensorMap out, partial_out;    // [batch, rows, 512], [slots, min(rows, 64), 512]
  Global<const uint8_t> packed;  // the cache, if it is: [pages * page, 656]
  Global<const int32_t> block_table;
  Global<float> lse, partial_lse;
  Global<int32_t> starts;  // see MlaSchedule
  MlaSizes sizes;
  int heads, queries, pages, page, table_pages;
  int box_rows;  // keys that one copy brings: a part of one page
  bool causal;
  float scale_log2;  // softmax_scale * log2(e)
};

template <typename Format, int cluster>
struct MlaDecodeKernel {
  using Number = NumberOf<Format>;
  static constexpr bool starts_early = true;
  static constexpr bool is_packed = std::is_same_v<Format, Packed>;
  static constexpr int width_tiles = mla_width / 64, latent_tiles = mla_latent / 64, stages = 2;
  static constexpr int kept_tiles = is_packed ? 0 : 1;  // of q, in registers, where there are enough
  // Parts of a stage, for each of which a barrier says that it is full, and one that it is empty: the columns of the
  // latent that warpgroup 0 or 1 has in its half of the result, and the RoPE.
  static constexpr int parts = 3, rope = 2;
  static constexpr bool sends = is_packed && cluster > 1;
  static constexpr int math_threads = 2 * warpgroup_size, threads = math_threads + warpgroup_size;
  static constexpr int registers = 168, copy_registers = is_packed ? 88 : 40, math_registers = is_packed ? 208 : 232;
  static_assert(copy_registers + 2 * math_registers <= 3 * registers);  // a block has no others
  static constexpr int tile_bytes = 64 * 128, half_keys = key_block / 2;
  static constexpr int columns = mla_latent / 2;  // of the result, for each warpgroup
  static std::string name() {
    return std::string("MlaDecodeKernel<") + format_name<Format> + ", " + std::to_string(cluster) + ">";
  }

  using Params = MlaParams<Format>;

  struct Smem {
    Tile<tile_bytes> q[width_tiles];
    Tile<tile_bytes> keys[stages][width_tiles];
    Tile<tile_bytes> weights;                                // [64 rows][64 keys]
    Shared<float> largest[2][mla_rows], total[2][mla_rows];  // of each warpgroup's blocks: see Rows
    Shared<uint32_t> exists[stages][2];                      // a bit a key
    MlaStretch stretch;
    Barrier full[stages][parts], empty[stages][parts], q_full, q_empty;
    // The neighbour has all that this block sent it of a piece. Two, for the pieces by turns: after two more pieces the
    // neighbour has freed the stage that this one ended in, and so seen the barrier.
    Barrier received[2];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.q);
      if constexpr (!is_packed) prefetch_tensormap(p.cache);
      for (int i = 0; i < stages * parts; ++i) {
        mbarrier_init(s.full[i / parts][i % parts], is_packed ? warpgroup_size / warp_size : 1);
        // The RoPE is each block's own.
        mbarrier_init(s.empty[i / parts][i % parts], (i % parts == rope ? 1 : cluster) * warpgroup_size / warp_size);
      }
      mbarrier_init(s.q_full, 1);
      mbarrier_init(s.q_empty, math_threads / warp_size);
      for (int i = 0; i < 2; ++i) mbarrier_init(s.received[i], 1);
      fence_mbarrier_init();
    }
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    if (p.sizes.splits == 0) {
      // Where keys will lie.
      using Schedule = MlaSchedule<threads>;
      static_assert(sizeof(typename Schedule::Smem) <= sizeof(s.keys));
      Schedule{p.sizes, s.stretch, reinterpret_cast<typename Schedule::Smem&>(s.keys), p.starts}.run();
      fence_proxy_async();
    }
    sync_cluster<cluster>(threads);
    if (warp >= math_threads / warp_size) {
      setmaxnreg_dec<copy_registers>();
      if constexpr (is_packed)
        unpack(p, s, warp % 4);
      else if (warp == math_threads / warp_size && elect())
        produce(p, s);
      syncwarp();
    } else {
      setmaxnreg_inc<math_registers>();
      attend(p, s, warp / 4);
    }
    if constexpr (cluster > 1) sync_cluster<cluster>(threads);  // a neighbour may still use this one's memory
  }

  struct Stage {
    int index = 0;
    uint32_t phase = 0;

    DEVICE void advance() {
      index ^= 1;
      phase ^= index == 0;
    }
  };

  // A piece without keys has a block in which there are none: then every piece has one.
  DEVICE static int end_of(const Piece& piece) { return piece.first == piece.last ? piece.first + 1 : piece.last; }

  // ---- copies ----

  DEVICE static void produce(const Params& p, Smem& s) {
    MlaWalk walk(p.sizes, s.stretch);
    Piece piece;
    Stage at;
    for (uint32_t q_phase = 0; walk.next(piece); q_phase ^= 1) {
      copy_queries(p, s, piece, q_phase);
      for (int block = piece.first; block < end_of(piece); ++block, at.advance()) {
        // Where its keys lie, found before the stage is free.
        int rows[key_block / 16];
        uint32_t exists[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < key_block / 16; ++i) {
          int key = i * p.box_rows, token = block * key_block + key;
          rows[i] = p.pages * p.page;  // beyond the cache: zeros
          if (key >= key_block || token >= piece.length) continue;
          int page = load_global<int32_t>(p.block_table, int64_t(piece.request) * p.table_pages + token / p.page);
          if (page < 0 || page >= p.pages) continue;
          rows[i] = page * p.page + token % p.page;
          int count = piece.length - token < p.box_rows ? piece.length - token : p.box_rows;
          uint64_t bits = (count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << key;
          exists[0] |= static_cast<uint32_t>(bits);
          exists[1] |= static_cast<uint32_t>(bits >> 32);
        }
        // The RoPE is free first, when there are logits.
        for (int j = 0; j < parts; ++j) {
          int part = j == 0 ? rope : j - 1, first = part * 4, last = j == 0 ? width_tiles : first + 4;
          mbarrier_wait(s.empty[at.index][part], at.phase ^ 1);
          if (j == 0) {
            store(s.exists[at.index][0], exists[0]);
            store(s.exists[at.index][1], exists[1]);
          }
          mbarrier_arrive_expect_tx(s.full[at.index][part], (last - first) * tile_bytes);
          bool both = cluster > 1 && part != rope;
          if (both && part != cluster_rank()) continue;  // the neighbour's
          for (int tile = first; tile < last; ++tile)
#pragma unroll
            for (int i = 0; i < key_block / 16; ++i) {
              if (i * p.box_rows >= key_block) break;
              void* to = s.keys[at.index][tile].data + i * p.box_rows * 128;
              if (both)
                cp_async_bulk_tensor_multicast<2>(to, p.cache, {tile * 64, rows[i]}, s.full[at.index][part],
                                                  (1 << cluster) - 1);
              else
                cp_async_bulk_tensor<2>(to, p.cache, {tile * 64, rows[i]}, s.full[at.index][part]);
            }
        }
      }
    }
  }

  // Beyond the request's rows zeros.
  DEVICE static void copy_queries(const Params& p, Smem& s, const Piece& piece, uint32_t phase) {
    mbarrier_wait(s.q_empty, phase ^ 1);
    mbarrier_arrive_expect_tx(s.q_full, width_tiles * tile_bytes);
    for (int i = 0; i < width_tiles; ++i)
      cp_async_bulk_tensor<3>(&s.q[i], p.q, {i * 64, piece.group * mla_rows, piece.request}, s.q_full);
  }

  // ---- packed keys ----
  //
  // A warp has eight keys of each half of a block, or of one where the neighbour has the other. Lanes with bit 2 of
  // their number set have odd ones of these, the others even ones: eight lanes that store together then have four
  // chunks of 16 bytes, every other one, of each of two keys, and the swizzle spreads these over all banks. Registers
  // are scarce: lanes have their keys such that shuffles need no operands but constants.

  using Words = Pack<uint32_t, 4>;
  static constexpr int own_halves = 2 / cluster;
  static constexpr int sent_bytes = 8 * 128;  // of a warp's keys, in each tile

  // The bytes of a half are loaded when all of the half before are unpacked, not as their registers become free: ptxas
  // would make an unpacking wait for loads of the next half that share a scoreboard with its own. Those of a block's
  // first half are in flight while this waits for a stage.
  DEVICE static void unpack(const Params& p, Smem& s, int warp) {
    int lane = lane_index(), first_half = cluster > 1 ? cluster_rank() : 0;
    PackedBlocks blocks(p, s, warp, first_half);
    Columns columns[2];
    int slot = blocks.advance(p);
    load_packed(p, slot, 0, columns);
    Stage at;
    for (uint32_t q_phase = 0; blocks.any; at.advance()) {
      if (blocks.begins) {
        if (warp == 0 && elect()) copy_queries(p, s, blocks.piece, q_phase);
        syncwarp();
        q_phase ^= 1;
      }
      uint32_t tiles = shared_address(&s.keys[at.index]) + warp * 8 * 128;
      uint32_t exists = ballot(shfl(slot, lane_of(lane / 8 % 2 ^ first_half, lane % 8)) >= 0);  // of both halves
      mbarrier_wait(s.empty[at.index][rope], at.phase ^ 1);
      copy_rope(p, tiles + first_half * half_keys * 128, slot, 0);
      copy_rope(p, tiles + (1 - first_half) * half_keys * 128, slot, 1);
      cp_async_commit_group();
      if (lane < 2)
        store_shared(shared_address(&s.exists[at.index][lane]) + warp, static_cast<uint8_t>(exists >> lane * 8));
#pragma unroll
      for (int i = 0; i < own_halves; ++i) {
        int half = first_half + i;
        uint32_t own = tiles + half * half_keys * 128;
        uint8_t eight = exists >> half * 8;
        if (i > 0) load_packed(p, slot, 1, columns);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          if (i == 0) mbarrier_wait(s.empty[at.index][part], at.phase ^ 1);
          if (eight != 0xff) clear(eight, columns[part]);
          store_latent(own + part * 4 * tile_bytes, columns[part]);
          if constexpr (sends) {
            publish(s.full[at.index][part], part == 0);
            if (lane < 4)
              cp_async_bulk_cluster(own + (part * 4 + lane) * tile_bytes, sent_bytes, s.full[at.index][part],
                                    1 - first_half);
          }
        }
      }
      if constexpr (!sends) {
        publish(s.full[at.index][0], true);
        if (lane == 0) mbarrier_arrive(s.full[at.index][1]);
      }
      slot = blocks.advance(p);
      load_packed(p, slot, 0, columns);
    }
  }

  // That this warp has stored what belongs to a part; and that as much comes from the neighbour's, if it sends.
  DEVICE static void publish(Barrier& full, bool with_rope) {
    if (with_rope) cp_async_wait_group<0>();
    fence_proxy_async();
    syncwarp();
    if (lane_index() != 0) return;
    if constexpr (sends)
      mbarrier_arrive_expect_tx(full, latent_tiles / 2 * sent_bytes);
    else
      mbarrier_arrive(full);
  }

  // The lane, of those with bit 1 clear, that knows where a key lies; `half` counts from this block's own.
  DEVICE static int lane_of(int half, int key) { return key / 2 % 2 | key % 2 << 2 | half << 3 | key / 4 << 4; }

  // The blocks of keys of all pieces, one after the other.
  struct PackedBlocks {
    MlaWalk walk;
    Piece piece = {};
    int block = 0, end = 0;
    bool any = true;  // it is not beyond the last
    bool begins;      // a piece does, here
    int key;          // this lane's, of a block

    DEVICE PackedBlocks(const Params& p, const Smem& s, int warp, int first_half) : walk(p.sizes, s.stretch) {
      int lane = lane_index();
      key = (lane / 8 % 2 ^ first_half) * half_keys + warp * 8 + lane / 16 * 4 + lane % 2 * 2 + lane / 4 % 2;
    }

    // To the next one: where this lane's key lies, as a row of the cache; -1: there is none.
    DEVICE int advance(const Params& p) {
      begins = ++block >= end;
      if (begins) {
        any = walk.next(piece);
        if (!any) return -1;
        block = piece.first;
        end = end_of(piece);
      }
      int token = block * key_block + key;
      if (token >= piece.length) return -1;
      int page = load_global<int32_t>(p.block_table, int64_t(piece.request) * p.table_pages + token / p.page);
      return page >= 0 && page < p.pages ? page * p.page + token % p.page : -1;
    }
  };

  // Of eight keys of a half, the columns of one part: of key 2 i + bit 2, for each i, 16 numbers; and a scale of the
  // key 2 (bits 0, 1) + bit 2.
  struct Columns {
    Words latent[4];
    float scale;
  };

  // For a key that is none, the first row.
  DEVICE static void load_packed(const Params& p, int slot, int half, Columns (&columns)[2]) {
    slot = slot < 0 ? 0 : slot;
    int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = shfl_within<0b00100>(slot, lane_of(half, 2 * i));
      int64_t from = int64_t(row) * mla_packed_bytes + (lane / 8 * 4 + lane % 4) * 16;
#pragma unroll
      for (int part = 0; part < 2; ++part) columns[part].latent[i] = load_global<Words>(p.packed, from + part * 256);
    }
    int row = shfl(slot, lane_of(half, lane % 4 * 2 + lane / 4 % 2));
    int64_t from = int64_t(row) * mla_packed_bytes + mla_latent + lane / 16 * 4;
#pragma unroll
    for (int part = 0; part < 2; ++part) columns[part].scale = load_global<float>(p.packed, from + part * 8);
  }

  // Keys that are none; `exists` has a bit a key.
  DEVICE static void clear(uint32_t exists, Columns& columns) {
    int lane = lane_index(), parity = lane / 4 % 2;
    if (!(exists >> (lane % 4 * 2 + parity) & 1)) columns.scale = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(exists >> (i * 2 + parity) & 1)) columns.latent[i] = {};
  }

  // Each number rounded once, to bfloat16: what kv_cache.unpack makes of it. `tiles` is where the eight keys begin, in
  // the first of four tiles.
  DEVICE static void store_latent(uint32_t tiles, const Columns& columns) {
    int lane = lane_index(), parity = lane / 4 % 2;
    uint32_t own = tiles + lane / 8 * tile_bytes + parity * 128 + (lane % 4 * 2 ^ parity) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float scale = shfl_within<0b10100>(columns.scale, i);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        Words numbers;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t codes = columns.latent[i].item[2 * k + n / 2] >> n % 2 * 16;
          uint32_t pair = cvt_f16x2_e4m3x2(static_cast<uint16_t>(codes));
          numbers.item[n] = cvt_bf16x2(to_float(float16{static_cast<uint16_t>(pair)}) * scale,
                                       to_float(float16{static_cast<uint16_t>(pair >> 16)}) * scale);
        }
        store_shared((own ^ (2 * i + k) * 16) + 2 * i * 128, numbers);
      }
    }
  }

  // What lies behind the latent stays as it is.
  DEVICE static void copy_rope(const Params& p, uint32_t tiles, int slot, int half) {
    constexpr int rope = mla_packed_bytes - (mla_width - mla_latent) * 2;
    int lane = lane_index(), key = lane / 16 * 4 + lane / 4 % 2, chunk = lane % 4 * 2 + lane / 8 % 2;
    uint32_t own = tiles + latent_tiles * tile_bytes + key * 128 + (chunk ^ key) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = shfl_within<0b10100>(slot, lane_of(half, 2 * i));
      cp_async<16>((own ^ 2 * i * 16) + 2 * i * 128, p.packed, int64_t(row) * mla_packed_bytes + rope + chunk * 16,
                   row >= 0);
    }
  }

  // ---- attention ----

  struct Rows : Softmax<Number> {
    int limit[2];  // the keys of a row are the tokens below

    DEVICE Rows(const Params& p, const Piece& piece) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int query = (piece.group * mla_rows + fragment_row(2 * j)) / p.heads;
        limit[j] = p.causal ? piece.length - (p.queries - 1 - query) : piece.length;
      }
    }
  };

  // The tile of q that is multiplied first, as A in registers: a product of 64 keys has just the time to read both of
  // its operands from shared memory, and others read there too.
  struct Queries {
    uint32_t fragment[kept_tiles * 4 + (kept_tiles == 0)][4];
  };

  // Every block of keys is one warpgroup's, by turns, which also is its stage: that one computes its logits and
  // weights. Meanwhile the other's next block comes, for which there would not be the time in a step that both took
  // together: a stage is empty only when the values of its block are added.
  DEVICE static void attend(const Params& p, Smem& s, int half) {
    MlaWalk walk(p.sizes, s.stretch);
    Piece piece;
    uint32_t phase = 0;  // of this warpgroup's stage
    int stage = 0;       // of the piece's first block
    for (uint32_t pieces = 0; walk.next(piece); ++pieces) {
      float result[columns / 2];
      Rows rows(p, piece);
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) result[i] = 0;
      mbarrier_wait(s.q_full, pieces % 2);
      Queries q;
      keep_queries(s, q);
      int end = end_of(piece), own = piece.first + (stage != half);
      if (own == piece.first) {
        attend_block<false>(p, s, half, phase, own, q, rows, result);
        own += 2;
      }
      for (; own < end; own += 2) {
        if (own > piece.first + 1) release<cluster>(s.empty[half][half]);
        attend_block<true>(p, s, half, phase, own, q, rows, result);
      }
      if (own == end) {
        if (own > piece.first + 1) release<cluster>(s.empty[half][half]);
        add_other_values(s, half, rows, result);
        wgmma_wait_group<0>(result);
      }
      stage ^= (end - piece.first) % 2;
      release(s.q_empty);
      finish(p, s, piece, half, 1 - stage, pieces, rows, result);
    }
  }

  // A block of this warpgroup's own; first the values of the other's before it, if there is one. Its own stay where
  // they are.
  template <bool follows>
  DEVICE static void attend_block(const Params& p, Smem& s, int half, uint32_t& phase, int block, const Queries& q,
                                  Rows& rows, float (&result)[columns / 2]) {
    float logits[key_block / 2];
    if constexpr (follows) add_other_values(s, half, rows, result);
    multiply_queries(s, half, phase, q, logits);
    phase ^= 1;
    if constexpr (follows) {
      wgmma_wait_group<1>(result);
      release<cluster>(s.empty[1 - half][half]);
    }
    wgmma_wait_group<0>(logits);
    uint32_t exists[2] = {load(s.exists[half][0]), load(s.exists[half][1])};
    release(s.empty[half][rope]);
    bool grown = weigh(p, exists, block, rows, logits);
    uint32_t weights[key_block / 16][4];
#pragma unroll
    for (int i = 0; i < key_block / 4; ++i) weights[i / 4][i % 4] = to_pair(logits[2 * i], logits[2 * i + 1], Number{});
    if (!is_packed && (exists[0] & exists[1]) != 0xffffffff) clear_values(s, half, exists);
    stage_weights(s, half, rows, weights);
    fence_proxy_async();
    if (half == 0)
      bar_arrive(1, math_threads);
    else
      bar_arrive(2, math_threads);
    if (ballot(grown)) rows.shrink(result);
    add_values(s, half, half, weights, result);
    wgmma_wait_group<0>(result);
  }

  // Weights from logits; true if the result is to shrink.
  DEVICE static bool weigh(const Params& p, const uint32_t (&exists)[2], int block, Rows& rows,
                           float (&logits)[key_block / 2]) {
    int least = rows.limit[0] < rows.limit[1] ? rows.limit[0] : rows.limit[1];
    bool all = (exists[0] & exists[1]) == 0xffffffff && (block + 1) * key_block <= least;
    return rows.weigh(logits, p.scale_log2, all, [&](int i) {
      int key = fragment_column(i);
      return exists[i / (key_block / 4)] >> key % 32 & 1 && block * key_block + key < rows.limit[i / 2 % 2];
    });
  }

  DEVICE static void keep_queries(Smem& s, Queries& q) {
    int lane = lane_index(), row = thread_index() % warpgroup_size / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < kept_tiles * 4; ++i)
      ldmatrix<4, false>(q.fragment[i],
                         shared_address(&s.q[latent_tiles]) + row * 128 + ((i * 2 + lane / 16) ^ row % 8) * 16);
  }

  // logits [64 rows][64 keys] = q keys^T, of tiles in the order in which they come. It is the same in either stage, for
  // the same bits.
  DEVICE static void multiply_queries(Smem& s, int stage, uint32_t phase, const Queries& q,
                                      float (&logits)[key_block / 2]) {
    mbarrier_wait(s.full[stage][is_packed ? 0 : rope], phase);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < width_tiles; ++i) {
      int tile = i == 0 ? latent_tiles : i - 1;
      if (i == 5 || (i == 1 && !is_packed)) {  // packed keys' RoPE comes with part 0
        mbarrier_wait(s.full[stage][tile / 4], phase);
        wgmma_fence(logits);
      }
      uint64_t a = matrix_descriptor(shared_address(&s.q[tile]), 0, 1024, Swizzle::bytes_128);
      uint64_t b = matrix_descriptor(shared_address(&s.keys[stage][tile]), 0, 1024, Swizzle::bytes_128);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i < kept_tiles)
          wgmma_16bit<Number, key_block>(logits, q.fragment[k], b + k * 2, i + k > 0);
        else
          wgmma_16bit<Number, key_block>(logits, a + k * 2, b + k * 2, i + k > 0);
    }
    wgmma_commit_group();
  }

  // Where the values of this warpgroup's half of the columns begin.
  DEVICE static uint64_t values(Smem& s, int stage, int half) {
    return matrix_descriptor(shared_address(&s.keys[stage][half * latent_tiles / 2]), tile_bytes, 1024,
                             Swizzle::bytes_128);
  }
  static constexpr int values_step = 16 * 128 / 16;  // 16 keys, in units of a descriptor

  // result [64 rows][256 columns] += weights values, of this warpgroup's half of the columns.
  DEVICE static void add_values(Smem& s, int stage, int half, const uint32_t (&weights)[key_block / 16][4],
                                float (&result)[columns / 2]) {
    uint64_t b = values(s, stage, half);
    wgmma_fence(result);
#pragma unroll
    for (int k = 0; k < key_block / 16; ++k)
      wgmma_16bit<Number, columns, true>(result, weights[k], b + k * values_step, true);
    wgmma_commit_group();
  }

  // The same of the other warpgroup's block, when it has computed the weights.
  DEVICE static void add_other_values(Smem& s, int half, Rows& rows, float (&result)[columns / 2]) {
    if (half == 0)
      bar_sync(2, math_threads);
    else
      bar_sync(1, math_threads);
    bool grown = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) grown |= rows.count_from(j, load(s.largest[1 - half][fragment_row(2 * j)]));
    if (ballot(grown)) rows.shrink(result);
    uint64_t a = matrix_descriptor(shared_address(&s.weights), 0, 1024, Swizzle::bytes_128);
    uint64_t b = values(s, 1 - half, half);
    wgmma_fence(result);
#pragma unroll
    for (int k = 0; k < key_block / 16; ++k)
      wgmma_16bit<Number, columns, true>(result, a + k * 2, b + k * values_step, true);
    wgmma_commit_group();
  }

  // Rows that are no key may hold anything, and 0 * NaN is NaN: zeros as values.
  DEVICE static void clear_values(Smem& s, int stage, const uint32_t (&exists)[2]) {
    warpgroup_sync(stage);  // all its warps have their logits
    for (int i = thread_index() % warpgroup_size; i < key_block * 8; i += warpgroup_size) {
      int key = i / 8, chunk = i % 8;
      if ((key < 32 ? exists[0] : exists[1]) >> key % 32 & 1) continue;
      for (int tile = 0; tile < latent_tiles; ++tile)
        store_shared(shared_address(&s.keys[stage][tile]) + key * 128 + chunk * 16, Pack<uint32_t, 4>{0, 0, 0, 0});
    }
    fence_proxy_async();
    warpgroup_sync(stage);  // for its own product of them
  }

  DEVICE static void warpgroup_sync(int half) {
    if (half == 0)
      bar_sync(4, warpgroup_size);
    else
      bar_sync(5, warpgroup_size);
  }

  // For the other warpgroup: weights, as the A of a wgmma, and what their exponents are counted from.
  DEVICE static void stage_weights(Smem& s, int half, const Rows& rows, const uint32_t (&weights)[key_block / 16][4]) {
    int lane = lane_index(), row = thread_index() % warpgroup_size / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < key_block / 16; ++k)  // two times 8 keys, two times 8 rows
      stmatrix<4, false>(shared_address(&s.weights) + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16, weights[k]);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (lane % 4 == 0) store(s.largest[half][fragment_row(2 * j)], rows.largest[j]);
  }

  // The result, by way of the last block's values, whose place is freed.
  DEVICE static void finish(const Params& p, Smem& s, const Piece& piece, int half, int stage, uint32_t pieces,
                            const Rows& rows, const float (&result)[columns / 2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = sum_of_quad(rows.total[j]);
      if (lane_index() % 4 == 0) store(s.total[half][fragment_row(2 * j)], sum);
    }
    bar_sync(3, math_threads);  // all have read the values, too
    if (sends && thread_index() == 0) mbarrier_arrive_cluster(s.received[pieces % 2], 1 - cluster_rank());
    float inverse[2];
    int64_t to =
        piece.whole ? int64_t(piece.request) * p.sizes.rows + piece.group * mla_rows : int64_t(piece.slot) * mla_rows;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int row = fragment_row(2 * j);
      float sum = load(s.total[0][row]) + load(s.total[1][row]);
      inverse[j] = sum == 0 ? 0 : rcp(sum);
      if (half != 0 || lane_index() % 4 != 0 || piece.group * mla_rows + row >= p.sizes.rows) continue;
      float lse = rows.log2_sum(j, sum);
      if (piece.whole)
        store_global(p.lse, to + row, lse * ln2);
      else
        store_global(p.partial_lse, to + row, lse);
    }
    bar_sync(3, math_threads);                                         // before the next piece's sums
    if (sends) mbarrier_wait(s.received[pieces % 2], pieces / 2 % 2);  // what is overwritten has been sent
    // Of a warp, 16 rows of four tiles.
    constexpr int tiles = latent_tiles / 2;
    int lane = lane_index(), warp = thread_index() % warpgroup_size / warp_size, first = warp * 16;
    uint32_t own = shared_address(&s.keys[stage][half * tiles]) + first * 128;
    if (piece.whole) {
      uint32_t at = own + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
      for (int i = 0; i < columns / 16; ++i) {
        uint32_t fragment[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          fragment[j] =
              to_pair(result[i * 8 + 2 * j] * inverse[j % 2], result[i * 8 + 2 * j + 1] * inverse[j % 2], Number{});
        stmatrix<4, false>((at ^ i % 4 * 32) + i / 4 * tile_bytes, fragment);
      }
      fence_proxy_async();
      syncwarp();
      if (elect()) {
        for (int i = 0; i < tiles; ++i)
          cp_async_bulk_tensor_store<3>(p.out, {half * columns + i * 64, piece.group * mla_rows + first, piece.request},
                                        s.keys[stage][half * tiles + i].data + first * 128);
        bulk_commit_group();
        bulk_wait_group_read<0>();
      }
    } else {
      uint32_t at = own + lane / 4 * 128 + (lane % 4 / 2 ^ lane / 4) * 16 + lane % 2 * 8;
#pragma unroll
      for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int i = 0; i < columns / 16; ++i)  // of eight columns
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            int item = (round * columns / 16 + i) * 4 + 2 * j;
            store_shared((at ^ i % 4 * 32) + i / 4 * tile_bytes + 8 * j * 128,
                         Pack<float, 2>{result[item] * inverse[j], result[item + 1] * inverse[j]});
          }
        fence_proxy_async();
        syncwarp();
        if (elect()) {
          for (int i = 0; i < tiles; ++i)
            cp_async_bulk_tensor_store<3>(p.partial_out,
                                          {half * columns + round * columns / 2 + i * 32, first, piece.slot},
                                          s.keys[stage][half * tiles + i].data + first * 128);
          bulk_commit_group();
          bulk_wait_group_read<0>();
        }
        syncwarp();
      }
    }
    release<cluster>(s.empty[stage][half]);
  }
};

// The rows whose keys several pieces share: their results, in the order of the keys. A block takes a row at a time, a
// thread four columns.
template <typename T>
struct MlaMergeKernel {
  static constexpr bool starts_early = true;
  static constexpr int threads = mla_latent / 4, resident = 4;
  static std::string name() { return std::string("MlaMergeKernel<") + format_name<T> + ">"; }

  struct Params {
    Global<const float> partial_out, partial_lse;
    Global<T> out;
    Global<float> lse;
    Global<const int32_t> starts;  // see MlaSchedule
    MlaSizes sizes;
  };
  struct Smem {};

  DEVICE static void run(const Params& p, Smem&) {
    griddepcontrol_wait();
    const MlaSizes& m = p.sizes;
    int share = m.splits == 0 ? load_global<int32_t>(p.starts, m.batch + 1) : 0;  // of each stretch
    if (m.splits == 0 && share == 0) return;                                      // nothing is shared
    for (int i = block_index(); i < m.batch * m.rows; i += grid_size()) {
      int request = i / m.rows, row = i % m.rows, run = request * m.splits, parts = m.splits;
      if (m.splits == 0) {
        int first = load_global<int32_t>(p.starts, request) / share;
        run = request + first;
        parts = (load_global<int32_t>(p.starts, request + 1) - 1) / share - first + 1;
        if (parts == 1) continue;
      }
      int64_t first = int64_t(slot_of(m, run, row / mla_rows)) * mla_rows + row % mla_rows;
      if (parts <= 4)
        merge<4>(p, first, parts, i);
      else
        merge<16>(p, first, parts, i);
    }
  }

  // The parts of row `to`, with the loads of `at_once` of them in flight together; beyond the last part the last one
  // again, with weight 0.
  template <int at_once>
  DEVICE static void merge(const Params& p, int64_t first, int parts, int64_t to) {
    int64_t step = p.sizes.row_groups * mla_rows;
    int column = thread_index() * 4;
    float most = -__builtin_inff(), total = 0, sums[4] = {0, 0, 0, 0};
    for (int part = 0; part < parts; part += at_once) {
      float lse[at_once];
      Pack<float, 4> x[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        int64_t at = first + (part + k < parts ? part + k : parts - 1) * step;
        lse[k] = load_global<float>(p.partial_lse, at);
        x[k] = load_global<Pack<float, 4>>(p.partial_out, at * mla_latent + column);
      }
      float before = most;
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (part + k >= parts) lse[k] = -__builtin_inff();
        most = fmaxf(most, lse[k]);
      }
      float base = most == -__builtin_inff() ? 0 : most, factor = ex2(before - base);
      total *= factor;
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] *= factor;
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        float weight = ex2(lse[k] - base);
        total += weight;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += weight * x[k].item[j];
      }
    }
    float inverse = total == 0 ? 0 : rcp(total);
    store_global(p.out, to * mla_latent + column,
                 Pack<uint32_t, 2>{to_pair(sums[0] * inverse, sums[1] * inverse, T{}),
                                   to_pair(sums[2] * inverse, sums[3] * inverse, T{})});
    if (thread_index() == 0) store_global(p.lse, to, total == 0 ? -__builtin_inff() : (most + lg2(total)) * ln2);
  }
};

}  // namespace jaxkern::cuda::kernels
