// The gradients of attention, in two kernels without atomic sums, so that they have the same bits on every run:
//
//   MlaPrefillKeysKernel      dk and dv of 128 keys of one head: a loop over blocks of 64 queries that see any
//   MlaPrefillQueriesKernel   dq of 128 queries of one head: a loop over blocks of 64 keys that they see
//
// Both compute the weights again, from the logits and lse. A persistent block of threads for each multiprocessor walks
// over tiles; warpgroups 0 and 1 multiply, each for 64 keys or queries of the tile, and one may work on weights while
// the tensor cores are at the other's products; warp 8 has the copy engine bring what they read.
//
// With weights w and dw = d_out v^T of one head, as in FlashAttention-2:
//   dv = w^T d_out,  dl = w (dw - delta),  dk = dl^T q softmax_scale,  dq = dl k softmax_scale
// where delta of a query is the sum of out d_out over its columns, less d_lse.
#pragma once

#include "cuda/mla_prefill/mla_prefill.h"
#include "cuda/mla_prefill/tiles.h"
#include "cuda/ring.h"

namespace jaxkern::cuda::kernels {

struct MlaPrefillBackwardParams {
  TensorMap q, k, v, d_out;         // [batch, tokens, heads * width]
  TensorMap dq, dk, dv;             // the same, 16 tokens at a time
  Global<const float> lse, delta;   // [batch, heads, padded]; lse to base 2
  Global<const int32_t> spans;      // [2, batch, padded]: see MlaPrefillBackward
  Global<const int32_t> bounds;     // [batch, padded / block_rows, 4]
  HeadTiles tiles;                  // of keys, or of queries
  int tokens, padded;               // tokens, and rounded up to whole tiles
  float softmax_scale, scale_log2;  // softmax_scale * log2(e)

  DEVICE int first_of(int batch, int token) const {
    return load_global<int32_t>(spans, int64_t(batch) * padded + token);
  }
  DEVICE int last_of(int batch, int token) const {
    return load_global<int32_t>(spans, int64_t(tiles.batch + batch) * padded + token);
  }
  DEVICE bool is_token(int batch, int token) const { return first_of(batch, token) < last_of(batch, token); }
};

// What both kernels share: operands of 64 or 128 rows in tiles of 64 numbers, and products of 64 rows.
template <int key_width>
struct MlaPrefillBackwardShape {
  using Number = bfloat16;
  using Params = MlaPrefillBackwardParams;
  static constexpr int tile_rows = prefill_tile_rows, block_rows = prefill_block_rows,
                       value_width = prefill_value_width;
  static constexpr int key_tiles = key_width / 64, value_tiles = value_width / 64;
  static constexpr int math_threads = 2 * warpgroup_size, threads = math_threads + warpgroup_size;
  static constexpr int registers = 168, copy_registers = 40, math_registers = 232;
  template <int rows>
  using Rows = Tile<rows * 128>;
  using Weights = uint32_t[block_rows / 16][4];  // as the A of a wgmma

  template <typename Kernel>
  DEVICE static void run(const Params& p, typename Kernel::Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      for (const TensorMap* map : {&p.q, &p.k, &p.v, &p.d_out}) prefetch_tensormap(*map);
      mbarrier_init(s.tile_full, 1);
      mbarrier_init(s.tile_empty, math_threads / warp_size);
      for (int i = 0; i < Kernel::stages; ++i) {
        mbarrier_init(s.full[i], 1);
        mbarrier_init(s.empty[i], math_threads / warp_size);
      }
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
    if (warp >= math_threads / warp_size) {
      setmaxnreg_dec<copy_registers>();
      if (warp == math_threads / warp_size) Kernel::produce(p, s);
    } else {
      setmaxnreg_inc<math_registers>();
      Kernel::attend(p, s, warp / 4);
    }
  }

  template <int bytes, int tiles>
  DEVICE static void copy(Tile<bytes> (&to)[tiles], const TensorMap& map, int head, int token, int batch,
                          Barrier& full) {
    for (int i = 0; i < tiles; ++i) cp_async_bulk_tensor<3>(&to[i], map, {(head * tiles + i) * 64, token, batch}, full);
  }

  // result [64][64] = a b^T, or that added to it, of the 64 rows of `a` from `row` on. In flight when it returns.
  template <bool adds = false, int bytes, int tiles>
  DEVICE static void multiply(float (&result)[block_rows / 2], Tile<bytes> (&a)[tiles], int row,
                              Rows<block_rows> (&b)[tiles]) {
    if constexpr (adds)
      wgmma_fence(result);
    else
      wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      uint64_t left = matrix_descriptor(shared_address(a[tile].data + row * 128), 0, 1024, Swizzle::bytes_128);
      uint64_t right = matrix_descriptor(shared_address(&b[tile]), 0, 1024, Swizzle::bytes_128);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_16bit<Number, block_rows>(result, left + k * 2, right + k * 2, adds || tile + k > 0);
    }
    wgmma_commit_group();
  }

  // Rows as the k of a product.
  template <int tiles>
  DEVICE static uint64_t transposed(Rows<block_rows> (&b)[tiles]) {
    return matrix_descriptor(shared_address(&b), sizeof(b[0]), 1024, Swizzle::bytes_128);
  }
  static constexpr int transposed_step = 16 * 128 / 16;  // 16 rows, in units of a descriptor

  // sums [64][tiles * 64] += a b. In flight when it returns.
  template <int tiles>
  DEVICE static void add(float (&sums)[tiles * 32], const Weights& a, Rows<block_rows> (&b)[tiles]) {
    uint64_t right = transposed(b);
    wgmma_fence(sums);
#pragma unroll
    for (int k = 0; k < block_rows / 16; ++k)
      wgmma_16bit<Number, tiles * 64, true>(sums, a[k], right + k * transposed_step, true);
    wgmma_commit_group();
  }

  DEVICE static void round(const float (&x)[block_rows / 2], Weights& rounded) {
#pragma unroll
    for (int i = 0; i < block_rows / 4; ++i) rounded[i / 4][i % 4] = cvt_bf16x2(x[2 * i], x[2 * i + 1]);
  }

  // What is no token may hold anything, and 0 * NaN is NaN: zeros in these rows of a block, half of them by each
  // warpgroup.
  template <int tiles, typename IsToken>
  DEVICE static void clear(Rows<block_rows> (&x)[tiles], int group, IsToken is_token) {
    for (int i = thread_index() % warpgroup_size; i < block_rows / 2 * 8; i += warpgroup_size) {
      int row = group * block_rows / 2 + i / 8, chunk = i % 8;
      if (is_token(row)) continue;
      for (int tile = 0; tile < tiles; ++tile)
        store_shared(shared_address(&x[tile]) + row * 128 + chunk * 16, Pack<uint32_t, 4>{0, 0, 0, 0});
    }
  }
  DEVICE static void cleared() {
    fence_proxy_async();
    bar_sync(1, math_threads);
  }

  // 64 rows of a gradient, times `scale`, by way of this warpgroup's half of an operand of the same shape: each warp
  // stores the 16 rows that it alone has read there. Those that are no tokens are zero, whatever the others' keys and
  // queries are.
  template <int tiles>
  DEVICE static void store_rows(const TensorMap& map, Rows<tile_rows> (&place)[tiles], int group, int head, int token,
                                int batch, const bool (&is_token)[2], const float (&sums)[tiles * 32], float scale) {
    int lane = lane_index(), row = lane % 16, first = thread_index() % warpgroup_size / warp_size * 16;
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      uint8_t* own = place[tile].data + (group * block_rows + first) * 128;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of 16 columns
        uint32_t fragment[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int at = tile * 32 + i * 8 + 2 * j;
          fragment[j] = is_token[j % 2] ? cvt_bf16x2(sums[at] * scale, sums[at + 1] * scale) : 0;
        }
        stmatrix<4, false>(shared_address(own) + row * 128 + ((i * 2 + lane / 16) ^ row % 8) * 16, fragment);
      }
    }
    fence_proxy_async();
    syncwarp();
    if (lane == 0) {
      for (int tile = 0; tile < tiles; ++tile)
        cp_async_bulk_tensor_store<3>(map, {(head * tiles + tile) * 64, token + first, batch},
                                      place[tile].data + (group * block_rows + first) * 128);
      bulk_commit_group();
    }
  }
};

template <int key_width>
struct MlaPrefillKeysKernel : MlaPrefillBackwardShape<key_width> {
  using Shape = MlaPrefillBackwardShape<key_width>;
  using Shape::block_rows, Shape::tile_rows, Shape::threads, Shape::math_threads, Shape::value_width;
  using typename Shape::Params, typename Shape::Weights;
  static constexpr int stages = 3;
  using At = Position<stages>;
  static std::string name() { return "MlaPrefillKeysKernel<" + std::to_string(key_width) + ">"; }

  struct Smem {
    typename Shape::template Rows<tile_rows> keys[Shape::key_tiles], values[Shape::value_tiles];
    typename Shape::template Rows<block_rows> q[stages][Shape::key_tiles], d_out[stages][Shape::value_tiles];
    typename Shape::template Rows<block_rows> weights[2];  // of each warpgroup: [64 keys][64 queries]
    alignas(16) Shared<float> lse[stages][block_rows], delta[stages][block_rows];
    alignas(16) Shared<int> first[stages][block_rows], last[stages][block_rows];
    Shared<int> state[stages];
    Barrier tile_full, tile_empty, full[stages], empty[stages];
  };
  // Of a stage: whether every query sees every key, some see some, some are no tokens either; or no more come.
  enum State { plain, masked, masked_and_unclean, ended };

  DEVICE static void run(const Params& p, Smem& s) { Shape::template run<MlaPrefillKeysKernel>(p, s); }

  using Walk = HeadWalk<tile_rows, true>;

  // By all lanes of a warp, which look at blocks of queries together.
  DEVICE static void produce(const Params& p, Smem& s) {
    Walk tile;
    At at;
    int blocks = p.padded / block_rows;
    for (uint32_t phase = 0; tile.next(p.tiles); phase ^= 1) {
      if (elect()) {
        mbarrier_wait(s.tile_empty, phase ^ 1);
        mbarrier_arrive_expect_tx(s.tile_full, sizeof(s.keys) + sizeof(s.values));
        Shape::copy(s.keys, p.k, tile.head, tile.token, tile.batch, s.tile_full);
        Shape::copy(s.values, p.v, tile.head, tile.token, tile.batch, s.tile_full);
      }
      syncwarp();
      for (int base = 0; base < blocks; base += warp_size) {
        int block = base + lane_index();
        Pack<int32_t, 4> bounds = {0, 0, 0, 0};
        if (block < blocks)
          bounds = load_global<Pack<int32_t, 4>>(p.bounds, (int64_t(tile.batch) * blocks + block) * 4);
        uint32_t sees = ballot(bounds.item[0] < tile.token + tile_rows && tile.token < bounds.item[1]);
        // Or does not exist: its row is zeros, which add nothing.
        uint32_t all = ballot(bounds.item[2] <= tile.token && tile.token + tile_rows <= bounds.item[3]);
        uint32_t unclean = ballot(bounds.item[3] == 0);
        for (; sees != 0; sees &= sees - 1, at.advance()) {
          int i = lowest_bit(sees);
          if (elect()) {
            mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
            store(s.state[at.stage], all >> i & 1       ? int(plain)
                                     : unclean >> i & 1 ? int(masked_and_unclean)
                                                        : int(masked));
            copy_block(p, s, at.stage, tile, (base + i) * block_rows);
          }
          syncwarp();
        }
      }
      if (elect()) {
        mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
        store(s.state[at.stage], int(ended));
        mbarrier_arrive(s.full[at.stage]);
      }
      syncwarp();
      at.advance();
    }
  }

  DEVICE static void copy_block(const Params& p, Smem& s, int stage, const Walk& tile, int query) {
    constexpr uint32_t row_bytes = block_rows * 4;
    Barrier& full = s.full[stage];
    mbarrier_arrive_expect_tx(full, sizeof(s.q[0]) + sizeof(s.d_out[0]) + 4 * row_bytes);
    Shape::copy(s.q[stage], p.q, tile.head, query, tile.batch, full);
    Shape::copy(s.d_out[stage], p.d_out, tile.head, query, tile.batch, full);
    int64_t row = (int64_t(tile.batch) * p.tiles.heads + tile.head) * p.padded + query;
    int64_t first = int64_t(tile.batch) * p.padded + query, last = first + int64_t(p.tiles.batch) * p.padded;
    cp_async_bulk(&s.lse[stage], p.lse, row, row_bytes, full);
    cp_async_bulk(&s.delta[stage], p.delta, row, row_bytes, full);
    cp_async_bulk(&s.first[stage], p.spans, first, row_bytes, full);
    cp_async_bulk(&s.last[stage], p.spans, last, row_bytes, full);
  }

  DEVICE static void attend(const Params& p, Smem& s, int group) {
    Walk tile;
    At at;
    for (uint32_t phase = 0; tile.next(p.tiles); phase ^= 1) {
      float dk[key_width / 2], dv[value_width / 2];
#pragma unroll
      for (int i = 0; i < key_width / 2; ++i) dk[i] = 0;
#pragma unroll
      for (int i = 0; i < value_width / 2; ++i) dv[i] = 0;
      mbarrier_wait(s.tile_full, phase);
      int key = tile.token + group * block_rows;
      for (;; at.advance()) {
        mbarrier_wait(s.full[at.stage], at.phase);
        int state = load(s.state[at.stage]);
        if (state == ended) break;
        if (state == masked_and_unclean) {
          auto is_token = [&](int row) { return load(s.first[at.stage][row]) < load(s.last[at.stage][row]); };
          Shape::clear(s.q[at.stage], group, is_token);
          Shape::clear(s.d_out[at.stage], group, is_token);
          Shape::cleared();
        }
        uint32_t counts = state == plain ? 0xffffffff : seen(s, at.stage, key);
        // One after the other, and weights in shared memory: there are no registers for both.
        {
          float logits[block_rows / 2];
          Shape::multiply(logits, s.keys, group * block_rows, s.q[at.stage]);
          wgmma_wait_group<0>(logits);
          weigh(p, s, at.stage, counts, logits);
          store_weights(s, group, logits);
        }
        Weights d_weights;
        {
          float products[block_rows / 2];
          start_from_delta(s, at.stage, products);
          Shape::template multiply<true>(products, s.values, group * block_rows, s.d_out[at.stage]);
          wgmma_wait_group<0>(products);
          differentiate(s, group, counts, products);
          Shape::round(products, d_weights);
        }
        add_values(s, at.stage, group, dv);
        Shape::add(dk, d_weights, s.q[at.stage]);
        wgmma_wait_group<0>(dk, dv);
        release(s.empty[at.stage]);
      }
      release(s.empty[at.stage]);
      at.advance();
      bool is_token[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) is_token[j] = p.is_token(tile.batch, key + fragment_row(2 * j));
      Shape::store_rows(p.dk, s.keys, group, tile.head, key, tile.batch, is_token, dk, p.softmax_scale);
      Shape::store_rows(p.dv, s.values, group, tile.head, key, tile.batch, is_token, dv, 1);
      if (lane_index() == 0) bulk_wait_group_read<0>();
      release(s.tile_empty);
    }
    if (lane_index() == 0) bulk_wait_group<0>();
  }

  // Of the [64 keys][64 queries], which keys this thread's queries see: a bit for each item of its part.
  DEVICE static uint32_t seen(Smem& s, int stage, int key) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < block_rows / 2; i += 4) {
      auto first = load_pack<2>(s.first[stage][fragment_column(i)]);
      auto last = load_pack<2>(s.last[stage][fragment_column(i)]);
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        int token = key + fragment_row(j);
        bits |= uint32_t(first.item[j % 2] <= token && token < last.item[j % 2]) << j;
      }
    }
    return bits;
  }

  // Weights from logits.
  DEVICE static void weigh(const Params& p, Smem& s, int stage, uint32_t counts, float (&x)[block_rows / 2]) {
    Pack<float, 2> lse;
#pragma unroll
    for (int i = 0; i < block_rows / 2; ++i) {
      if (i % 4 == 0) lse = load_pack<2>(s.lse[stage][fragment_column(i)]);
      x[i] = ex2(x[i] * p.scale_log2 - lse.item[i % 2]);
    }
    clear_others(counts, x);
  }

  DEVICE static void clear_others(uint32_t counts, float (&x)[block_rows / 2]) {
    if (counts == 0xffffffff) return;
#pragma unroll
    for (int i = 0; i < block_rows / 2; ++i)
      if (!(counts >> i & 1)) x[i] = 0;
  }

  DEVICE static void start_from_delta(Smem& s, int stage, float (&x)[block_rows / 2]) {
#pragma unroll
    for (int i = 0; i < block_rows / 2; i += 4) {
      auto delta = load_pack<2>(s.delta[stage][fragment_column(i)]);
#pragma unroll
      for (int j = i; j < i + 4; ++j) x[j] = -delta.item[j % 2];
    }
  }

  // Derivatives of the logits, from those of the weights. A key that is none may have anything as its value.
  DEVICE static void differentiate(Smem& s, int group, uint32_t counts, float (&x)[block_rows / 2]) {
#pragma unroll
    for (int i = 0; i < block_rows / 2; i += 8) {
      uint32_t pairs[4];
      ldmatrix<4, false>(pairs, weights_at(s, group, i / 8));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint32_t pair = pairs[j / 2];
        x[i + j] *= bits_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000);
      }
    }
    clear_others(counts, x);
  }

  // Where this lane reads or stores of its warp's 16 keys the weights of queries 16 i to 16 i + 15.
  DEVICE static uint32_t weights_at(Smem& s, int group, int i) {
    int lane = lane_index(), row = thread_index() % warpgroup_size / warp_size * 16 + lane % 16;
    return shared_address(&s.weights[group]) + row * 128 + ((2 * i + lane / 16) ^ row % 8) * 16;
  }

  // Rounded, as the A of a wgmma. A warp reads there what it has stored itself.
  DEVICE static void store_weights(Smem& s, int group, const float (&x)[block_rows / 2]) {
#pragma unroll
    for (int i = 0; i < block_rows / 16; ++i) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = cvt_bf16x2(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
      stmatrix<4, false>(weights_at(s, group, i), pairs);
    }
    fence_proxy_async();
    syncwarp();
  }

  // dv += weights d_out. In flight when it returns.
  DEVICE static void add_values(Smem& s, int stage, int group, float (&dv)[value_width / 2]) {
    uint64_t left = matrix_descriptor(shared_address(&s.weights[group]), 0, 1024, Swizzle::bytes_128);
    uint64_t right = Shape::transposed(s.d_out[stage]);
    wgmma_fence(dv);
#pragma unroll
    for (int k = 0; k < block_rows / 16; ++k)
      wgmma_16bit<typename Shape::Number, value_width, true>(dv, left + k * 2, right + k * Shape::transposed_step,
                                                             true);
    wgmma_commit_group();
  }
};

template <int key_width>
struct MlaPrefillQueriesKernel : MlaPrefillBackwardShape<key_width> {
  using Shape = MlaPrefillBackwardShape<key_width>;
  using Shape::block_rows, Shape::tile_rows, Shape::threads, Shape::math_threads;
  using typename Shape::Params, typename Shape::Weights;
  static constexpr int stages = 3;
  using At = Position<stages>;
  static std::string name() { return "MlaPrefillQueriesKernel<" + std::to_string(key_width) + ">"; }

  struct Smem {
    typename Shape::template Rows<tile_rows> q[Shape::key_tiles], d_out[Shape::value_tiles];
    typename Shape::template Rows<block_rows> keys[stages][Shape::key_tiles], values[stages][Shape::value_tiles];
    Shared<uint32_t> exists[stages][2];  // a bit for each key of a stage
    Shared<int> blocks[2];               // of keys that the tile's queries see: the first, and the end
    Barrier tile_full, tile_empty, full[stages], empty[stages];
  };

  DEVICE static void run(const Params& p, Smem& s) { Shape::template run<MlaPrefillQueriesKernel>(p, s); }

  using Walk = HeadWalk<tile_rows>;

  // By all lanes of a warp, which look at keys together.
  DEVICE static void produce(const Params& p, Smem& s) {
    Walk tile;
    At at;
    for (uint32_t phase = 0; tile.next(p.tiles); phase ^= 1) {
      int begin = p.tokens, end = 0;
#pragma unroll
      for (int i = 0; i < tile_rows / block_rows; ++i) {
        int64_t block = int64_t(tile.batch) * (p.padded / block_rows) + tile.token / block_rows + i;
        auto bounds = load_global<Pack<int32_t, 2>>(p.bounds, block * 4);
        begin = bounds.item[0] < begin ? bounds.item[0] : begin;
        end = bounds.item[1] > end ? bounds.item[1] : end;
      }
      begin /= block_rows;
      end = ceil_div(end, block_rows);
      if (elect()) {
        mbarrier_wait(s.tile_empty, phase ^ 1);
        store(s.blocks[0], begin);
        store(s.blocks[1], end);
        mbarrier_arrive_expect_tx(s.tile_full, sizeof(s.q) + sizeof(s.d_out));
        Shape::copy(s.q, p.q, tile.head, tile.token, tile.batch, s.tile_full);
        Shape::copy(s.d_out, p.d_out, tile.head, tile.token, tile.batch, s.tile_full);
      }
      syncwarp();
      for (int block = begin; block < end; ++block, at.advance()) {
        uint32_t exists[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int token = block * block_rows + i * warp_size + lane_index();
          // Zeros are copied from beyond the tokens.
          exists[i] = ballot(token >= p.tokens || p.is_token(tile.batch, token));
        }
        if (elect()) {
          mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
          for (int i = 0; i < 2; ++i) store(s.exists[at.stage][i], exists[i]);
          mbarrier_arrive_expect_tx(s.full[at.stage], sizeof(s.keys[0]) + sizeof(s.values[0]));
          Shape::copy(s.keys[at.stage], p.k, tile.head, block * block_rows, tile.batch, s.full[at.stage]);
          Shape::copy(s.values[at.stage], p.v, tile.head, block * block_rows, tile.batch, s.full[at.stage]);
        }
        syncwarp();
      }
    }
  }

  // What a thread knows of its two rows.
  struct Queries {
    int first[2], last[2];
    float lse[2], delta[2];

    DEVICE Queries(const Params& p, const Walk& tile, int query) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int token = query + fragment_row(2 * j);
        int64_t row = (int64_t(tile.batch) * p.tiles.heads + tile.head) * p.padded + token;
        first[j] = p.first_of(tile.batch, token);
        last[j] = p.last_of(tile.batch, token);
        lse[j] = load_global<float>(p.lse, row);
        delta[j] = load_global<float>(p.delta, row);
      }
    }
  };

  DEVICE static void attend(const Params& p, Smem& s, int group) {
    Walk tile;
    At at;
    for (uint32_t phase = 0; tile.next(p.tiles); phase ^= 1) {
      float dq[key_width / 2];
#pragma unroll
      for (int i = 0; i < key_width / 2; ++i) dq[i] = 0;
      int query = tile.token + group * block_rows;
      Queries queries(p, tile, query);
      mbarrier_wait(s.tile_full, phase);
      int block = load(s.blocks[0]), end = load(s.blocks[1]);
      for (; block < end; ++block, at.advance()) {
        mbarrier_wait(s.full[at.stage], at.phase);
        uint32_t exists[2] = {load(s.exists[at.stage][0]), load(s.exists[at.stage][1])};
        if ((exists[0] & exists[1]) != 0xffffffff) {
          Shape::clear(s.keys[at.stage], group,
                       [&](int row) { return (row < 32 ? exists[0] : exists[1]) >> row % 32 & 1; });
          Shape::cleared();
        }
        float weights[block_rows / 2], d_weights[block_rows / 2];
        Shape::multiply(weights, s.q, group * block_rows, s.keys[at.stage]);
        Shape::multiply(d_weights, s.d_out, group * block_rows, s.values[at.stage]);
        int key = block * block_rows;
        wgmma_wait_group<1>(weights);
#pragma unroll
        for (int i = 0; i < block_rows / 2; ++i) weights[i] = ex2(weights[i] * p.scale_log2 - queries.lse[i / 2 % 2]);
        wgmma_wait_group<0>(d_weights);
#pragma unroll
        for (int i = 0; i < block_rows / 2; ++i) d_weights[i] = weights[i] * (d_weights[i] - queries.delta[i / 2 % 2]);
        mask(queries, key, d_weights);
        Weights d_rounded;
        Shape::round(d_weights, d_rounded);
        Shape::add(dq, d_rounded, s.keys[at.stage]);
        wgmma_wait_group<0>(dq);
        release(s.empty[at.stage]);
      }
      bool is_token[2] = {queries.first[0] < queries.last[0], queries.first[1] < queries.last[1]};
      Shape::store_rows(p.dq, s.q, group, tile.head, query, tile.batch, is_token, dq, p.softmax_scale);
      if (lane_index() == 0) bulk_wait_group_read<0>();
      release(s.tile_empty);
    }
    if (lane_index() == 0) bulk_wait_group<0>();
  }

  DEVICE static void mask(const Queries& queries, int key, float (&x)[block_rows / 2]) {
    if (queries.first[0] <= key && queries.first[1] <= key && key + block_rows <= queries.last[0] &&
        key + block_rows <= queries.last[1])
      return;
#pragma unroll
    for (int i = 0; i < block_rows / 2; ++i) {
      int token = key + fragment_column(i), j = i / 2 % 2;
      if (token < queries.first[j] || token >= queries.last[j]) x[i] = 0;
    }
  }
};

}  // namespace jaxkern::cuda::kernels
