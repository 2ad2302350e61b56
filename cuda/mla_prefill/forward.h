// 128 queries of one head against blocks of 128 of its keys. A persistent block of threads for each multiprocessor
// walks over tiles of queries.
//
//   warpgroups 0, 1   attend: each for 64 of the queries, taking turns at the tensor cores
//   warpgroup 2       warp 8 has the copy engine bring queries, keys and values, while the tile before is computed
//
// After FlashAttention-3: a warpgroup has the logits of a block of keys computed together with the product of the
// weights and values of the block before, and makes weights of the logits while the tensor cores are at that product or
// at the other warpgroup's.
#pragma once

#include "cuda/fours.h"
#include "cuda/mla_prefill/mla_prefill.h"
#include "cuda/mla_prefill/tiles.h"
#include "cuda/ring.h"
#include "cuda/softmax.h"

namespace jaxkern::cuda::kernels {

struct MlaPrefillParams {
  TensorMap q, k, v, out;  // [batch, tokens, heads * width]
  Global<const int32_t> first, last;
  Global<float> lse;
  HeadTiles tiles;  // of queries
  int tokens;
  float scale_log2;  // softmax_scale * log2(e)
};

template <typename Number, int key_width>
struct MlaPrefillKernel {
  static constexpr int query_rows = 128, key_rows = 128, value_width = prefill_value_width, stages = 2;
  static constexpr int key_tiles = key_width / 64, value_tiles = value_width / 64;  // of 64 numbers
  static constexpr int math_threads = 2 * warpgroup_size, threads = math_threads + warpgroup_size;
  static constexpr int registers = 168, tile_bytes = 128 * 128;
  static std::string name() {
    return std::string("MlaPrefillKernel<") + format_name<Number> + ", " + std::to_string(key_width) + ">";
  }

  using Params = MlaPrefillParams;
  using At = Position<stages>;

  struct Smem {
    Tile<tile_bytes> q[key_tiles];
    Tile<tile_bytes> keys[stages][key_tiles];
    Tile<tile_bytes> values[stages][value_tiles];
    Tile<64 * 128> staging[2];                        // of each warpgroup, for 64 columns of its result
    Shared<int> first[query_rows], last[query_rows];  // the spans of the tile's queries
    Shared<int> blocks[2];                            // of keys that they see: the first, and the end
    Shared<uint32_t> exists[stages][key_rows / 32];   // a bit for each key of a stage
    Barrier q_full, q_empty, keys_full[stages], keys_empty[stages], values_full[stages], values_empty[stages];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      for (const TensorMap* map : {&p.q, &p.k, &p.v, &p.out}) prefetch_tensormap(*map);
      constexpr int readers = math_threads / warp_size;
      mbarrier_init(s.q_full, 1 + warp_size);  // the copy, and who stored spans
      mbarrier_init(s.q_empty, readers);
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.keys_full[i], 1);
        mbarrier_init(s.keys_empty[i], readers);
        mbarrier_init(s.values_full[i], 1);
        mbarrier_init(s.values_empty[i], readers);
      }
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
    if (warp >= math_threads / warp_size) {
      setmaxnreg_dec<40>();
      if (warp == math_threads / warp_size) produce(p, s);
    } else {
      setmaxnreg_inc<232>();
      attend(p, s, warp / 4);
    }
  }

  // ---- work ----

  using Walk = HeadWalk<query_rows>;

  // The keys that a token sees; none if it is beyond the sequence.
  struct Span {
    int first = 0, last = 0;

    DEVICE Span(const Params& p, int batch, int token) {
      if (token >= p.tokens) return;
      int64_t at = int64_t(batch) * p.tokens + token;
      first = load_global<int32_t>(p.first, at);
      last = load_global<int32_t>(p.last, at);
      first = first > 0 ? first : 0;
      last = last < p.tokens ? last : p.tokens;
    }
    DEVICE bool any() const { return first < last; }
  };

  // ---- copies ----

  // By all lanes of a warp, which look at tokens together.
  DEVICE static void produce(const Params& p, Smem& s) {
    Walk tile;
    At at;
    for (uint32_t q_phase = 0; tile.next(p.tiles); q_phase ^= 1) {
      int lane = lane_index(), begin = p.tokens, end = 0;
      int first[query_rows / warp_size], last[query_rows / warp_size];
#pragma unroll
      for (int i = 0; i < query_rows / warp_size; ++i) {
        Span span(p, tile.batch, tile.token + i * warp_size + lane);
        first[i] = span.first;
        last[i] = span.last;
        if (!span.any()) continue;
        begin = span.first < begin ? span.first : begin;
        end = span.last > end ? span.last : end;
      }
      for (int mask = warp_size / 2; mask > 0; mask /= 2) {
        int other_begin = shfl_xor(begin, mask), other_end = shfl_xor(end, mask);
        begin = other_begin < begin ? other_begin : begin;
        end = other_end > end ? other_end : end;
      }
      begin /= key_rows;
      end = ceil_div(end, key_rows);
      mbarrier_wait(s.q_empty, q_phase ^ 1);
#pragma unroll
      for (int i = 0; i < query_rows / warp_size; ++i) {
        store(s.first[i * warp_size + lane], first[i]);
        store(s.last[i * warp_size + lane], last[i]);
      }
      if (elect()) {
        store(s.blocks[0], begin);
        store(s.blocks[1], end);
        copy(s.q, p.q, tile.head * key_width, tile.token, tile.batch, s.q_full);
      }
      mbarrier_arrive(s.q_full);
      for (int block = begin; block < end; ++block, at.advance()) {
        int key = block * key_rows;
        uint32_t exists[key_rows / 32];
#pragma unroll
        for (int i = 0; i < key_rows / 32; ++i) {
          int token = key + i * 32 + lane;
          exists[i] = ballot(token >= p.tokens || Span(p, tile.batch, token).any());  // zeros are copied from beyond
        }
        if (elect()) {
          mbarrier_wait(s.keys_empty[at.stage], at.phase ^ 1);
          copy(s.keys[at.stage], p.k, tile.head * key_width, key, tile.batch, s.keys_full[at.stage]);
          mbarrier_wait(s.values_empty[at.stage], at.phase ^ 1);
#pragma unroll
          for (int i = 0; i < key_rows / 32; ++i) store(s.exists[at.stage][i], exists[i]);
          copy(s.values[at.stage], p.v, tile.head * value_width, key, tile.batch, s.values_full[at.stage]);
        }
        syncwarp();
      }
    }
  }

  template <int tiles>
  DEVICE static void copy(Tile<tile_bytes> (&to)[tiles], const TensorMap& map, int column, int token, int batch,
                          Barrier& full) {
    mbarrier_arrive_expect_tx(full, tiles * tile_bytes);
    for (int i = 0; i < tiles; ++i) cp_async_bulk_tensor<3>(&to[i], map, {column + i * 64, token, batch}, full);
  }

  // ---- attention ----

  DEVICE static void attend(const Params& p, Smem& s, int group) {
    Walk tile;
    At keys, values;
    if (group == 1) bar_arrive(turn, math_threads);  // the first turn is the other's
    for (uint32_t q_phase = 0; tile.next(p.tiles); q_phase ^= 1) {
      float result[value_width / 2];
#pragma unroll
      for (int i = 0; i < value_width / 2; ++i) result[i] = 0;
      mbarrier_wait(s.q_full, q_phase);
      Rows rows(s, group);
      int block = load(s.blocks[0]), end = load(s.blocks[1]);
      if (block < end) {
        uint32_t weights[key_rows / 16][4];
        {
          float logits[key_rows / 2];
          mbarrier_wait(s.keys_full[keys.stage], keys.phase);
          bar_sync(turn + group, math_threads);
          multiply_queries(s, keys.stage, group, logits);
          bar_arrive(turn + 1 - group, math_threads);
          wgmma_wait_group<0>(logits);
          release(s.keys_empty[keys.stage]);
          keys.advance();
          weigh(p, block, rows, logits);
          to_weights(logits, weights);
        }
        while (++block < end) {
          float logits[key_rows / 2];
          mbarrier_wait(s.keys_full[keys.stage], keys.phase);
          wait_for_values(s, values, group);
          bar_sync(turn + group, math_threads);
          multiply_queries(s, keys.stage, group, logits);
          add_values(s, values.stage, weights, result);
          bar_arrive(turn + 1 - group, math_threads);
          wgmma_wait_group<1>(logits);
          release(s.keys_empty[keys.stage]);
          keys.advance();
          bool grown = weigh(p, block, rows, logits);
          wgmma_wait_group<0>(result);
          release(s.values_empty[values.stage]);
          values.advance();
          if (ballot(grown)) rows.shrink(result);
          to_weights(logits, weights);
        }
        release(s.q_empty);
        wait_for_values(s, values, group);
        add_values(s, values.stage, weights, result);
        wgmma_wait_group<0>(result);
        release(s.values_empty[values.stage]);
        values.advance();
      } else {
        release(s.q_empty);
      }
      finish(p, s, tile, group, rows, result);
    }
    if (group == 0) bar_sync(turn, math_threads);  // the other's last turn
    if (lane_index() == 0) bulk_wait_group<0>();
  }
  static constexpr int turn = 4;  // and 5: named barriers

  struct Rows : Softmax<Number> {
    int first[2], last[2];  // the keys of each row

    DEVICE Rows(const Smem& s, int group) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        first[j] = load(s.first[group * 64 + fragment_row(2 * j)]);
        last[j] = load(s.last[group * 64 + fragment_row(2 * j)]);
      }
    }
  };

  // Weights from logits; true if the result so far is to shrink.
  DEVICE static bool weigh(const Params& p, int block, Rows& rows, float (&logits)[key_rows / 2]) {
    int begin = block * key_rows, end = begin + key_rows;
    bool all = rows.first[0] <= begin && rows.first[1] <= begin && end <= rows.last[0] && end <= rows.last[1];
    return rows.weigh(logits, p.scale_log2, all, [&](int i) {
      int key = begin + fragment_column(i);
      return rows.first[i / 2 % 2] <= key && key < rows.last[i / 2 % 2];
    });
  }

  DEVICE static void to_weights(const float (&logits)[key_rows / 2], uint32_t (&weights)[key_rows / 16][4]) {
#pragma unroll
    for (int i = 0; i < key_rows / 4; ++i) weights[i / 4][i % 4] = to_pair(logits[2 * i], logits[2 * i + 1], Number{});
  }

  // logits [64 queries][128 keys] = q keys^T. In flight when it returns.
  DEVICE static void multiply_queries(Smem& s, int stage, int group, float (&logits)[key_rows / 2]) {
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < key_tiles; ++tile) {
      uint64_t a = matrix_descriptor(shared_address(s.q[tile].data + group * 64 * 128), 0, 1024, Swizzle::bytes_128);
      uint64_t b = matrix_descriptor(shared_address(&s.keys[stage][tile]), 0, 1024, Swizzle::bytes_128);
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_16bit<Number, key_rows>(logits, a + k * 2, b + k * 2, tile + k > 0);
    }
    wgmma_commit_group();
  }

  // result [64 queries][128 columns] += weights values. In flight when it returns.
  DEVICE static void add_values(Smem& s, int stage, const uint32_t (&weights)[key_rows / 16][4],
                                float (&result)[value_width / 2]) {
    constexpr int step = 16 * 128 / 16;  // 16 keys, in units of a descriptor
    uint64_t b = matrix_descriptor(shared_address(&s.values[stage]), tile_bytes, 1024, Swizzle::bytes_128);
    wgmma_fence(result);
#pragma unroll
    for (int k = 0; k < key_rows / 16; ++k)
      wgmma_16bit<Number, value_width, true>(result, weights[k], b + k * step, true);
    wgmma_commit_group();
  }

  // What is no token may hold anything, and 0 * NaN is NaN: zeros as its values, half of them by each warpgroup.
  DEVICE static void wait_for_values(Smem& s, const At& at, int group) {
    mbarrier_wait(s.values_full[at.stage], at.phase);
    uint32_t all = 0xffffffff;
#pragma unroll
    for (int i = 0; i < key_rows / 32; ++i) all &= load(s.exists[at.stage][i]);
    if (all == 0xffffffff) return;
    for (int i = thread_index() % warpgroup_size; i < key_rows / 2 * 8; i += warpgroup_size) {
      int key = group * key_rows / 2 + i / 8, chunk = i % 8;
      if (load(s.exists[at.stage][key / 32]) >> key % 32 & 1) continue;
      for (int tile = 0; tile < value_tiles; ++tile)
        store_shared(shared_address(&s.values[at.stage][tile]) + key * 128 + chunk * 16, Pack<uint32_t, 4>{0, 0, 0, 0});
    }
    fence_proxy_async();
    bar_sync(1, math_threads);
  }

  // Each warp stores its 16 rows, 64 columns after the other.
  DEVICE static void finish(const Params& p, Smem& s, const Walk& tile, int group, const Rows& rows,
                            const float (&result)[value_width / 2]) {
    float inverse[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = sum_of_quad(rows.total[j]);
      inverse[j] = sum == 0 ? 0 : rcp(sum);
      int token = tile.token + group * 64 + fragment_row(2 * j);
      if (lane_index() % 4 == 0 && token < p.tokens)
        store_global(p.lse, (int64_t(tile.batch) * p.tokens + token) * p.tiles.heads + tile.head,
                     rows.log2_sum(j, sum) * ln2);
    }
    int lane = lane_index(), row = lane % 16, first = thread_index() % warpgroup_size / warp_size * 16;
    uint8_t* own = s.staging[group].data + first * 128;
#pragma unroll
    for (int half = 0; half < value_tiles; ++half) {
      if (lane == 0) bulk_wait_group_read<0>();  // the staging has been stored from
      syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of 16 columns
        uint32_t fragment[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int at = half * 32 + i * 8 + 2 * j;
          bool any = inverse[j % 2] != 0;  // a row without keys is zero, whatever other rows' values are
          fragment[j] =
              to_pair(any ? result[at] * inverse[j % 2] : 0, any ? result[at + 1] * inverse[j % 2] : 0, Number{});
        }
        stmatrix<4, false>(shared_address(own) + row * 128 + ((i * 2 + lane / 16) ^ row % 8) * 16, fragment);
      }
      fence_proxy_async();
      syncwarp();
      if (lane == 0) {
        cp_async_bulk_tensor_store<3>(
            p.out, {tile.head * value_width + half * 64, tile.token + group * 64 + first, tile.batch}, own);
        bulk_commit_group();
      }
    }
  }
};

}  // namespace jaxkern::cuda::kernels
