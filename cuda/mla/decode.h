// 64 query rows against blocks of 64 keys, two blocks in shared memory, each as nine tiles of 64 keys x 64 numbers; the
// first eight are the values as well.
//
//   warpgroups 0, 1   attend: of the logits [64 rows][64 keys] each computes the half of its keys, of the result
//                     [64 rows][512] the half of its columns
//   warpgroup 2       warp 8 has the copy engine bring queries and keys; of packed keys all four warps load the next
//                     block's bytes into registers, and store the bfloat16 that those of this one stand for
//
// The halves of the weights, and the largest logit of each row, meet in shared memory. After FlashMLA's two warpgroups
// that share one 64 x 512 result, with one block of keys at a time in place of its pairs.
#pragma once

#include <type_traits>

#include "cuda/fours.h"
#include "cuda/mla/schedule.h"

namespace jaxkern::cuda::kernels {

// What is multiplied, of a cache of this format: bfloat16, float16 or Packed.
template <typename Format>
using NumberOf = std::conditional_t<std::is_same_v<Format, Packed>, bfloat16, Format>;

template <typename Format>
struct MlaParams {
  TensorMap q, cache;            // [batch * rows, 576], [pages * page, 576]
  Global<const uint8_t> packed;  // the cache, if it is: [pages * page, 656]
  Global<const int32_t> block_table;
  Global<NumberOf<Format>> out;
  Global<float> lse, partial_out, partial_lse;
  MlaSizes sizes;
  int heads, queries, pages, page, table_pages;
  int box_rows;  // keys that one copy brings: a part of one page
  bool causal;
  float scale_log2;  // softmax_scale * log2(e)
};

template <typename Format>
struct MlaDecodeKernel {
  using Number = NumberOf<Format>;
  static constexpr bool is_packed = std::is_same_v<Format, Packed>;
  static constexpr int width_tiles = mla_width / 64, latent_tiles = mla_latent / 64, stages = 2;
  static constexpr int kept_tiles = is_packed ? 0 : 3;  // of q, in registers, where there are enough
  static constexpr int math_threads = 2 * warpgroup_size, threads = math_threads + warpgroup_size;
  static constexpr int registers = 168, copy_registers = is_packed ? 136 : 40, math_registers = is_packed ? 184 : 232;
  static_assert(copy_registers + 2 * math_registers <= 3 * registers);  // a block has no others
  static constexpr int tile_bytes = 64 * 128, half_keys = key_block / 2;
  static constexpr int columns = mla_latent / 2;  // of the result, for each warpgroup
  // What the exponents of a row's weights are counted from stays the same until a logit is more than this above it;
  // then all that was summed so far is multiplied. It may be any number that keeps weights finite.
  static constexpr float headroom = std::is_same_v<Number, float16> ? 5 : 8;
  // Weights are kept times 2^this: far below the largest one float16 has few bits, and then none.
  static constexpr float weight_exponent = std::is_same_v<Number, float16> ? 10 : 0;
  static std::string name() { return std::string("MlaDecodeKernel<") + format_name<Format> + ">"; }

  using Params = MlaParams<Format>;

  struct Smem {
    Tile<tile_bytes> q[width_tiles];
    Tile<tile_bytes> keys[stages][width_tiles];
    Tile<tile_bytes> weights;                                // [64 rows][64 keys]
    Shared<float> largest[2][mla_rows], total[2][mla_rows];  // of each warpgroup's keys
    Shared<uint32_t> exists[stages][2];                      // a bit a key
    Barrier full[stages], empty[stages], q_full, q_empty;
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      prefetch_tensormap(p.q);
      if constexpr (!is_packed) prefetch_tensormap(p.cache);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], is_packed ? warpgroup_size / warp_size : 1);
        mbarrier_init(s.empty[i], math_threads / warp_size);
      }
      mbarrier_init(s.q_full, 1);
      mbarrier_init(s.q_empty, math_threads / warp_size);
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
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
  }

  struct Stage {
    int index = 0;
    uint32_t phase = 0;

    DEVICE void advance() {
      index ^= 1;
      phase ^= index == 0;
    }
  };

  // ---- copies ----

  DEVICE static void produce(const Params& p, Smem& s) {
    MlaWalk walk(p.sizes);
    Piece piece;
    Stage at;
    for (uint32_t q_phase = 0; walk.next(piece); q_phase ^= 1) {
      copy_queries(p, s, piece.request * p.sizes.rows + piece.group * mla_rows, q_phase);
      for (int block = piece.first; block < piece.last; ++block, at.advance()) {
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
        mbarrier_wait(s.empty[at.index], at.phase ^ 1);
        store(s.exists[at.index][0], exists[0]);
        store(s.exists[at.index][1], exists[1]);
        mbarrier_arrive_expect_tx(s.full[at.index], width_tiles * tile_bytes);
#pragma unroll
        for (int i = 0; i < key_block / 16; ++i) {
          if (i * p.box_rows >= key_block) break;
          for (int tile = 0; tile < width_tiles; ++tile)
            cp_async_bulk_tensor<2>(s.keys[at.index][tile].data + i * p.box_rows * 128, p.cache, {tile * 64, rows[i]},
                                    s.full[at.index]);
        }
      }
    }
  }

  DEVICE static void copy_queries(const Params& p, Smem& s, int row, uint32_t phase) {
    mbarrier_wait(s.q_empty, phase ^ 1);
    mbarrier_arrive_expect_tx(s.q_full, width_tiles * tile_bytes);
    for (int i = 0; i < width_tiles; ++i) cp_async_bulk_tensor<2>(&s.q[i], p.q, {i * 64, row}, s.q_full);
  }

  // ---- packed keys ----
  //
  // A warp has 16 keys of a block, eight of each half. Lanes with bit 2 of their number set have odd ones of these, the
  // others even ones: eight lanes that store together then have four chunks of 16 bytes, every other one, of each of
  // two keys, and the swizzle spreads these over all banks. Registers are scarce: lanes have their keys such that
  // shuffles need no operands but constants.

  using Words = Pack<uint32_t, 4>;

  // The bytes of the next block are loaded when all of this one's are unpacked, not as their registers become free:
  // finding the block needs some of these, and ptxas would make an unpacking wait for loads of the next block that
  // share a scoreboard with its own. They are in flight while this waits for a stage, for longer than they take.
  DEVICE static void unpack(const Params& p, Smem& s, int warp) {
    PackedBlocks blocks(p);
    PackedKeys keys[2];  // of each half
    int slot = blocks.advance(p, warp);
    load_packed(p, slot, keys);
    Stage at;
    for (uint32_t q_phase = 0; blocks.any; at.advance()) {
      if (blocks.first_row >= 0) {
        if (warp == 0 && elect()) copy_queries(p, s, blocks.first_row, q_phase);
        syncwarp();
        q_phase ^= 1;
      }
      mbarrier_wait(s.empty[at.index], at.phase ^ 1);
      int lane = lane_index();
      uint32_t tiles = shared_address(&s.keys[at.index]) + warp * 8 * 128;
      uint32_t exists = ballot(shfl(slot, lane_of(lane / 8 % 2, lane % 8 / 2, lane % 2)) >= 0);  // in the keys' order
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint8_t eight = exists >> half * 8;
        if (lane == 0) store_shared(shared_address(&s.exists[at.index][half]) + warp, eight);
        copy_rope(p, tiles + half * half_keys * 128, slot, half);
        if (eight != 0xff) clear(eight, keys[half]);
      }
      cp_async_commit_group();
#pragma unroll
      for (int half = 0; half < 2; ++half) store_latent(tiles + half * half_keys * 128, keys[half]);
      cp_async_wait_group<0>();
      fence_proxy_async();
      release(s.full[at.index]);
      slot = blocks.advance(p, warp);
      load_packed(p, slot, keys);
    }
  }

  // The lane, of those with bit 1 clear, that knows where key 2 i + j of a half lies.
  DEVICE static int lane_of(int half, int i, int j) { return i % 2 | j << 2 | half << 3 | i / 2 << 4; }

  // The blocks of keys of all pieces, one after the other.
  struct PackedBlocks {
    MlaWalk walk;
    Piece piece = {};
    int block = 0, end = 0;
    bool any = true;  // it is not beyond the last
    int first_row;    // of q, if a piece begins here; else -1

    DEVICE PackedBlocks(const Params& p) : walk(p.sizes) {}

    // To the next one: where this lane's key lies, as a row of the cache; -1: there is none.
    DEVICE int advance(const Params& p, int warp) {
      first_row = -1;
      if (++block >= end) {
        any = walk.next(piece);
        if (!any) return -1;
        block = piece.first;
        end = end_of(piece);
        first_row = piece.request * p.sizes.rows + piece.group * mla_rows;
      }
      int lane = lane_index(), i = lane % 2 + lane / 16 * 2, j = lane / 4 % 2, half = lane / 8 % 2;
      int token = block * key_block + half * half_keys + warp * 8 + 2 * i + j;
      if (token >= piece.length) return -1;
      int page = load_global<int32_t>(p.block_table, int64_t(piece.request) * p.table_pages + token / p.page);
      return page >= 0 && page < p.pages ? page * p.page + token % p.page : -1;
    }
  };

  // Of eight keys: of key 2 i + bit 2, for each i, two times 16 numbers of the latent; and a scale of the key
  // 2 (bits 0, 1) + bit 2.
  struct PackedKeys {
    Words latent[4][2];
    float scale;
  };

  // For a key that is none, the first row.
  DEVICE static void load_packed(const Params& p, int slot, PackedKeys (&keys)[2]) {
    slot = slot < 0 ? 0 : slot;
    int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int row = shfl_within<0b00100>(slot, lane_of(half, i, 0));
        int64_t from = int64_t(row) * mla_packed_bytes + (lane / 8 * 4 + lane % 4) * 16;
#pragma unroll
        for (int j = 0; j < 2; ++j) keys[half].latent[i][j] = load_global<Words>(p.packed, from + j * 256);
      }
      int row = shfl(slot, lane_of(half, lane % 4, lane / 4 % 2));
      int64_t from = int64_t(row) * mla_packed_bytes + mla_latent + (lane / 8 % 2 * 2 + lane / 16) * 4;
      keys[half].scale = load_global<float>(p.packed, from);
    }
  }

  // Keys that are none; `exists` has a bit a key.
  DEVICE static void clear(uint32_t exists, PackedKeys& keys) {
    int lane = lane_index(), parity = lane / 4 % 2;
    if (!(exists >> (lane % 4 * 2 + parity) & 1)) keys.scale = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(exists >> (i * 2 + parity) & 1)) keys.latent[i][0] = keys.latent[i][1] = {};
  }

  // Each number rounded once, to bfloat16: what kv_cache.unpack makes of it. `tiles` is where the eight keys begin.
  DEVICE static void store_latent(uint32_t tiles, const PackedKeys& keys) {
    int lane = lane_index(), parity = lane / 4 % 2;
    uint32_t own = tiles + lane / 8 * tile_bytes + parity * 128 + (lane % 4 * 2 ^ parity) * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float scale = shfl_within<0b10100>(keys.scale, i | j << 3);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          Words numbers;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            uint32_t codes = keys.latent[i][j].item[2 * k + n / 2] >> n % 2 * 16;
            uint32_t pair = cvt_f16x2_e4m3x2(static_cast<uint16_t>(codes));
            numbers.item[n] = cvt_bf16x2(to_float(float16{static_cast<uint16_t>(pair)}) * scale,
                                         to_float(float16{static_cast<uint16_t>(pair >> 16)}) * scale);
          }
          store_shared((own ^ (2 * i + k) * 16) + j * 4 * tile_bytes + 2 * i * 128, numbers);
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
      int row = shfl_within<0b10100>(slot, lane_of(half, i, 0));
      cp_async<16>((own ^ 2 * i * 16) + 2 * i * 128, p.packed, int64_t(row) * mla_packed_bytes + rope + chunk * 16,
                   row >= 0);
    }
  }

  // ---- attention ----

  // Of packed pages a piece without keys has a block in which there are none: then every piece begins with one.
  DEVICE static int end_of(const Piece& piece) {
    return is_packed && piece.first == piece.last ? piece.first + 1 : piece.last;
  }

  DEVICE static float max_of_quad(float x) {
    x = fmaxf(x, shfl_xor(x, 1));
    return fmaxf(x, shfl_xor(x, 2));
  }
  DEVICE static float sum_of_quad(float x) {
    x += shfl_xor(x, 1);
    return x + shfl_xor(x, 2);
  }

  DEVICE static void release(Barrier& barrier) {
    syncwarp();
    if (lane_index() == 0) mbarrier_arrive(barrier);
  }

  DEVICE static void attend(const Params& p, Smem& s, int half) {
    constexpr float minus_infinity = -__builtin_inff();
    MlaWalk walk(p.sizes);
    Piece piece;
    Stage at;
    for (uint32_t q_phase = 0; walk.next(piece); q_phase ^= 1) {
      float result[columns / 2], total[2] = {0, 0};
      float largest[2];  // but for the headroom
      int limit[2];      // the keys of a row are the tokens below
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) result[i] = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        largest[j] = minus_infinity;
        int query = (piece.group * mla_rows + fragment_row(2 * j)) / p.heads;
        limit[j] = p.causal ? piece.length - (p.queries - 1 - query) : piece.length;
      }
      mbarrier_wait(s.q_full, q_phase);
      Queries q;
      keep_queries(s, q);
      float logits[half_keys / 2];
      int end = end_of(piece);
      if (piece.first < end) {
        mbarrier_wait(s.full[at.index], at.phase);
        multiply_queries(s, at.index, half, q, logits);
        wgmma_wait_group<0>(logits);
      }
      for (int block = piece.first; block < end; ++block) {
        uint32_t exists = load(s.exists[at.index][half]), other = load(s.exists[at.index][1 - half]);
        float most[2] = {minus_infinity, minus_infinity};
#pragma unroll
        for (int i = 0; i < half_keys / 2; ++i) {
          int key = fragment_column(i), j = i / 2 % 2;
          bool counts = exists >> key & 1 && block * key_block + half * half_keys + key < limit[j];
          logits[i] = counts ? logits[i] * p.scale_log2 : minus_infinity;
          most[j] = fmaxf(most[j], logits[i]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          most[j] = max_of_quad(most[j]);
          if (lane_index() % 4 == 0) store(s.largest[half][fragment_row(2 * j)], most[j]);
        }
        bar_sync(1, math_threads);
        float base[2], shrink[2];
        bool grown = false;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          most[j] = fmaxf(most[j], load(s.largest[1 - half][fragment_row(2 * j)]));
          bool grows = most[j] > largest[j] + headroom;
          float next = grows ? most[j] : largest[j];
          base[j] = next == minus_infinity ? 0 : next;
          shrink[j] = grows ? ex2(largest[j] - base[j]) : 1;
          largest[j] = next;
          total[j] *= shrink[j];
          if constexpr (weight_exponent != 0) base[j] -= weight_exponent;
          grown |= grows;
        }
#pragma unroll
        for (int i = 0; i < half_keys / 2; ++i) {
          logits[i] = ex2(logits[i] - base[i / 2 % 2]);
          total[i / 2 % 2] += logits[i];
        }
        if (!is_packed && (exists & other) != 0xffffffff) clear_values(s, at.index, half, exists, other);
        stage_weights(s, half, logits);
        fence_proxy_async();
        if (ballot(grown)) {
#pragma unroll
          for (int i = 0; i < columns / 2; ++i) result[i] *= shrink[i / 2 % 2];
        }
        bar_sync(2, math_threads);
        add_values(s, at.index, half, result);
        Barrier& empty = s.empty[at.index];
        at.advance();
        if (block + 1 < end) {  // the tensor cores go on with the next block at once
          mbarrier_wait(s.full[at.index], at.phase);
          multiply_queries(s, at.index, half, q, logits);
          wgmma_wait_group<1>(result);
          release(empty);
          wgmma_wait_group<0>(logits);
        } else {
          wgmma_wait_group<0>(result);
          release(empty);
        }
      }
      release(s.q_empty);
      finish(p, s, piece, half, result, largest, total);
    }
  }

  // The first tiles of q, as A in registers: a product of 32 keys would read more of q from shared memory than the
  // tensor cores have time for, the more so as both warpgroups read all of it.
  struct Queries {
    uint32_t fragment[kept_tiles * 4 + (kept_tiles == 0)][4];
  };

  DEVICE static void keep_queries(Smem& s, Queries& q) {
    int lane = lane_index(), row = thread_index() % warpgroup_size / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < kept_tiles * 4; ++i)
      ldmatrix<4, false>(q.fragment[i],
                         shared_address(&s.q[i / 4]) + row * 128 + ((i % 4 * 2 + lane / 16) ^ row % 8) * 16);
  }

  // logits [64 rows][32 keys] = q keys^T, of this warpgroup's half of the keys.
  DEVICE static void multiply_queries(Smem& s, int stage, int half, const Queries& q, float (&logits)[half_keys / 2]) {
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < width_tiles; ++tile) {
      uint64_t a = matrix_descriptor(shared_address(&s.q[tile]), 0, 1024, Swizzle::bytes_128);
      uint64_t b = matrix_descriptor(shared_address(s.keys[stage][tile].data + half * half_keys * 128), 0, 1024,
                                     Swizzle::bytes_128);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (tile < kept_tiles)
          wgmma_16bit<Number, half_keys>(logits, q.fragment[tile * 4 + k], b + k * 2, tile + k > 0);
        else
          wgmma_16bit<Number, half_keys>(logits, a + k * 2, b + k * 2, tile + k > 0);
    }
    wgmma_commit_group();
  }

  // result [64 rows][256 columns] += weights values, of this warpgroup's half of the columns.
  DEVICE static void add_values(Smem& s, int stage, int half, float (&result)[columns / 2]) {
    uint64_t a = matrix_descriptor(shared_address(&s.weights), 0, 1024, Swizzle::bytes_128);
    uint64_t b = matrix_descriptor(shared_address(&s.keys[stage][half * latent_tiles / 2]), tile_bytes, 1024,
                                   Swizzle::bytes_128);
    wgmma_fence(result);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_16bit<Number, columns, true>(result, a + k * 2, b + k * (16 * 128 / 16), true);
    wgmma_commit_group();
  }

  // Rows that are no key may hold anything, and 0 * NaN is NaN: zeros in this warpgroup's columns of them. Both have
  // computed their logits.
  DEVICE static void clear_values(Smem& s, int stage, int half, uint32_t exists, uint32_t other) {
    uint32_t low = half == 0 ? exists : other, high = half == 0 ? other : exists;
    for (int i = thread_index() % warpgroup_size; i < key_block * 8; i += warpgroup_size) {
      int key = i / 8, chunk = i % 8;
      if ((key < half_keys ? low : high) >> key % half_keys & 1) continue;
      for (int tile = 0; tile < latent_tiles / 2; ++tile)
        store_shared(shared_address(&s.keys[stage][half * latent_tiles / 2 + tile]) + key * 128 + chunk * 16,
                     Pack<uint32_t, 4>{0, 0, 0, 0});
    }
  }

  // This warpgroup's half of the weights, as the A of a wgmma.
  DEVICE static void stage_weights(Smem& s, int half, const float (&weights)[half_keys / 2]) {
    int lane = lane_index(), row = thread_index() % warpgroup_size / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < half_keys / 8; j += 2) {  // two times 8 keys, two times 8 rows
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = to_pair(weights[j * 4 + 2 * i], weights[j * 4 + 2 * i + 1], Number{});
      int chunk = half * half_keys / 8 + j + lane / 16;
      stmatrix<4, false>(shared_address(&s.weights) + row * 128 + (chunk ^ (row % 8)) * 16, fragment);
    }
  }

  DEVICE static void finish(const Params& p, Smem& s, const Piece& piece, int half, const float (&result)[columns / 2],
                            const float (&largest)[2], const float (&total)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = sum_of_quad(total[j]);
      if (lane_index() % 4 == 0) store(s.total[half][fragment_row(2 * j)], sum);
    }
    bar_sync(1, math_threads);
    float sums[2], inverse[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      sums[j] = load(s.total[0][fragment_row(2 * j)]) + load(s.total[1][fragment_row(2 * j)]);
      inverse[j] = sums[j] == 0 ? 0 : rcp(sums[j]);
    }
    bar_sync(2, math_threads);  // before the next piece's
    int first_row = piece.group * mla_rows;
    int64_t to = piece.whole ? int64_t(piece.request) * p.sizes.rows + first_row : int64_t(piece.slot) * mla_rows;
#pragma unroll
    for (int i = 0; i < columns / 2; i += 2) {
      int row = fragment_row(i), j = i / 2 % 2;
      if (first_row + row >= p.sizes.rows) continue;
      int64_t at = (to + row) * mla_latent + half * columns + fragment_column(i);
      float low = result[i] * inverse[j], high = result[i + 1] * inverse[j];
      if (piece.whole)
        store_global(p.out, at, to_pair(low, high, Number{}));
      else
        store_global(p.partial_out, at, Pack<float, 2>{low, high});
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int row = fragment_row(2 * j);
      if (half != 0 || lane_index() % 4 != 0 || first_row + row >= p.sizes.rows) continue;
      float lse = sums[j] == 0 ? -__builtin_inff() : largest[j] + lg2(sums[j]) - weight_exponent;
      if (piece.whole)
        store_global(p.lse, to + row, lse * 0.693147181f);
      else
        store_global(p.partial_lse, to + row, lse);
    }
  }
};

// The rows whose keys several pieces share: their results, in the order of the keys. A block takes a row at a time, a
// thread four columns.
template <typename T>
struct MlaMergeKernel {
  static constexpr int threads = mla_latent / 4;
  static std::string name() { return std::string("MlaMergeKernel<") + format_name<T> + ">"; }

  struct Params {
    Global<const float> partial_out, partial_lse;
    Global<T> out;
    Global<float> lse;
    MlaSizes sizes;
    int parts;  // the decoding kernel's blocks
  };
  struct Smem {};

  DEVICE static void run(const Params& p, Smem&) {
    const MlaSizes& m = p.sizes;
    for (int64_t i = block_index(); i < int64_t(m.batch) * m.rows; i += grid_size()) {
      int request = static_cast<int>(i / m.rows), row = static_cast<int>(i % m.rows), group = row / mla_rows;
      int run = request * m.splits, count = m.splits;
      if (m.splits == 0) {
        int share = Stretches(m, p.parts).share, start = load_global<int32_t>(m.starts, request);
        int first = start / share;
        run = request + first;
        count = (load_global<int32_t>(m.starts, request + 1) - 1) / share - first + 1;
        if (count == 1) continue;
      }
      int64_t from = int64_t(slot_of(m, run, group)) * mla_rows + row % mla_rows, step = m.row_groups * mla_rows;
      float most = -__builtin_inff(), total = 0, sums[4] = {0, 0, 0, 0};
      for (int part = 0; part < count; ++part)
        most = fmaxf(most, load_global<float>(p.partial_lse, from + part * step));
      float base = most == -__builtin_inff() ? 0 : most;
      for (int part = 0; part < count; ++part) {
        float weight = ex2(load_global<float>(p.partial_lse, from + part * step) - base);
        Pack<float, 4> x =
            load_global<Pack<float, 4>>(p.partial_out, (from + part * step) * mla_latent + thread_index() * 4);
        total += weight;
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += weight * x.item[j];
      }
      float inverse = total == 0 ? 0 : rcp(total);
      store_global(p.out, i * mla_latent + thread_index() * 4,
                   Pack<uint32_t, 2>{to_pair(sums[0] * inverse, sums[1] * inverse, T{}),
                                     to_pair(sums[2] * inverse, sums[3] * inverse, T{})});
      if (thread_index() == 0)
        store_global(p.lse, i, total == 0 ? -__builtin_inff() : (most + lg2(total)) * 0.693147181f);
    }
  }
};

}  // namespace jaxkern::cuda::kernels
