// The tokens of a head are cut into blocks. A task of the forward pass takes a few blocks of queries through the blocks
// of keys that they see, as FlashAttention-2 does:
//
//   weights [key][query] = keys x queries^T, masked; then exp2(logit - largest)
//   acc [query][column] = acc * shrink + weights^T x values
//
// The backward pass computes the weights again from lse, and with them, for each pair of blocks,
//
//   d_weights [key][query] = values x d_out^T
//   d_logits = scale * weights * (d_weights - delta), delta = the sum of out * d_out over a row, less d_lse
//   d_values += weights x d_out        d_keys += d_logits x queries        d_queries += d_logits^T x keys
//
// A query is a lane in weights and d_logits, so that softmax needs no sum over the lanes of a register. Each product
// broadcasts the numbers of one operand and loads rows of the other, so none of them needs weights or d_logits
// transposed. Logits are in units of log2(e), so that exp2 serves.
//
// Two tasks must not add to the same gradient at a time, nor in an order that depends on the threads. So the backward
// pass goes in phases, as many as there are ranges of blocks: phase i pairs each range of queries with the range of
// keys i before it (cyclically), so that in one phase every range of either occurs once.
#include "cpu/mla_prefill.h"

#include <cstring>

#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

#ifdef JAXKERN_LEVEL_avx512
constexpr int kRows = 12;  // of a register block; its accumulators take most of the registers
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;  // registers of its columns
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kBlock = 96;       // tokens: a multiple of kRows and of kPanel
constexpr int64_t kQueryBlocks = 4;  // in a task of the forward pass
constexpr int64_t kRangeBlocks = 8;  // in a task of the backward pass, of queries and of keys
constexpr int64_t kRange = kRangeBlocks * kBlock;
constexpr int64_t kSlab = kBlock * kPanel;  // floats; see pack
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }

template <typename F>
void with_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::f16) f(f16{});
}

// The rows of one head, and the keys that their tokens see.
struct Rows {
  void* data;
  DType type;
  int64_t width, stride;  // in elements
  const int32_t *first, *last;
};

Rows rows_of(const Sequences& s, const void* data, DType type, int64_t width, int64_t batch, int64_t head) {
  int64_t token = batch * s.tokens, offset = (token * s.heads + head) * width * size_of(type);
  return {const_cast<char*>(static_cast<const char*>(data)) + offset,
          type,
          width,
          s.heads * width,
          s.first + token,
          s.last + token};
}

// Tokens [begin, end); none if end is not larger.
struct Span {
  int64_t begin, end;
};

bool overlap(Span a, Span b) { return a.begin < b.end && b.begin < a.end; }
Span join(Span a, Span b) { return {at_most(a.begin, b.begin), at_least(a.end, b.end)}; }

// What the queries of one block see.
struct Sight {
  int64_t begin, count;  // the block
  alignas(64) int32_t first[kBlock], last[kBlock];
  Span any;  // the keys that some query sees, and those between
  Span all;  // the keys that every query sees
};

Sight sight_of(const Sequences& s, int64_t batch, int64_t begin) {
  Sight sight;
  sight.begin = begin;
  sight.count = at_most(s.tokens - begin, kBlock);
  sight.any = {s.tokens, 0};
  sight.all = {0, s.tokens};
  for (int64_t i = 0; i < kBlock; ++i) {
    int64_t token = batch * s.tokens + begin + i;
    int64_t first = i < sight.count ? at_least(s.first[token], 0) : s.tokens;
    int64_t last = i < sight.count ? at_most(s.last[token], s.tokens) : 0;
    if (first >= last) first = s.tokens, last = 0;
    sight.first[i] = int32_t(first);
    sight.last[i] = int32_t(last);
    sight.any = join(sight.any, {first, last});
    sight.all = {at_least(sight.all.begin, first), at_most(sight.all.end, last)};
  }
  return sight;
}

// The keys [begin, begin + count), at most a block of them, as a block of queries sees them.
struct Tile {
  int64_t begin, count;
  bool all;  // every query sees every key
};

Tile tile_of(const Sight& sight, int64_t begin, int64_t count) {
  return {begin, count, sight.all.begin <= begin && begin + count <= sight.all.end};
}

// Of the tile, the keys that some of the queries [query, query + count) see, and those between.
Span keys_seen(const Sight& sight, const Tile& tile, int64_t query, int64_t count) {
  if (tile.all) return {0, tile.count};
  int32_t first = INT32_MAX, last = 0;
  for (int64_t i = query; i < query + count; ++i) {
    first = sight.first[i] < first ? sight.first[i] : first;
    last = sight.last[i] > last ? sight.last[i] : last;
  }
  return {at_least(first - tile.begin, 0), at_most(last - tile.begin, tile.count)};
}

// The queries that see some of the tile's keys [key, key + count), and those between.
Span queries_seeing(const Sight& sight, const Tile& tile, int64_t key, int64_t count) {
  if (tile.all) return {0, sight.count};
  Span keys = {tile.begin + key, tile.begin + key + count}, queries = {0, sight.count};
  auto sees = [&](int64_t i) { return overlap({sight.first[i], sight.last[i]}, keys); };
  while (queries.begin < queries.end && !sees(queries.begin)) ++queries.begin;
  while (queries.begin < queries.end && !sees(queries.end - 1)) --queries.end;
  return queries;
}

// ---- blocks as float32, in the order that the products read ----

int64_t padded(int64_t width) { return round_up(width, kPanel); }
int64_t slabs(int64_t width) { return (width + kPanel - 1) / kPanel; }

// The rows of the tokens [begin, begin + count) as slabs [width / kPanel][kBlock][kPanel], filled up with zeros to a
// whole slab; zeros also for tokens that see nothing. What lies beyond `count` rows is left as it is.
template <typename T>
void pack(const Rows& x, int64_t begin, int64_t count, float* to) {
  constexpr int64_t kAhead = 8;  // rows: they are too far apart for the hardware to fetch the next one
  for (int64_t row = 0; row < count; ++row) {
    const T* from = static_cast<const T*>(x.data) + (begin + row) * x.stride;
    int64_t width = x.first[begin + row] < x.last[begin + row] ? x.width : 0;
    for (int64_t i = 0; i < padded(x.width); i += kLanes) {
      if (i * sizeof(T) % 64 == 0) __builtin_prefetch(from + kAhead * x.stride + i);
      f32v v = {};
      if (i < width) v = load_lanes(from + i, width - i);
      store(to + i / kPanel * kSlab + row * kPanel + i % kPanel, v);
    }
  }
}

void pack(const Rows& x, int64_t begin, int64_t count, float* to) {
  with_type(x.type, [&](auto type) { pack<decltype(type)>(x, begin, count, to); });
}

// Slabs of `count` rows, times scale, as panels of queries [kBlock / kPanel][width][kPanel]; rows beyond are zero.
void transpose_slabs(const float* from, int64_t width, int64_t count, float scale, float* to) {
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    for (int64_t row = 0; row < kBlock; row += kLanes) {
      const float* square = from + column / kPanel * kSlab + row * kPanel + column % kPanel;
      float* panel = to + (row / kPanel * padded(width) + column) * kPanel + row % kPanel;
      f32v x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[i] = row + i < count ? load(square + i * kPanel) * scale : f32v{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(panel + i * kPanel, x[i]);
    }
  }
}

enum class To { write, add };

// Slabs as rows of the tokens [begin, begin + count). What is no token has zeros, whatever its slab: a product computes
// several rows at once, and 0 * NaN of a token's is NaN.
void unpack(const float* from, int64_t begin, int64_t count, To how, const Rows& x) {
  for (int64_t row = 0; row < count; ++row) {
    float* to = static_cast<float*>(x.data) + (begin + row) * x.stride;
    for (int64_t i = 0; i < x.width; i += kLanes) {
      f32v v = {};
      if (x.first[begin + row] < x.last[begin + row]) v = load(from + i / kPanel * kSlab + row * kPanel + i % kPanel);
      if (how == To::add) v += load_lanes(to + i, x.width - i);
      store_lanes(to + i, v, x.width - i);
    }
  }
}

// ---- products of blocks ----

// c [kRows][c_stride] = a b, or += with `add`. Rows of b, [pieces * depth][kPanel], are loaded as registers; numbers of
// a are broadcast: the one of row r at depth i of a piece is a[r * kRowStride + i * kStep].
template <int64_t kRowStride, int64_t kStep>
JAXKERN_INLINE void product_block(const float* a, int64_t pieces, int64_t piece_stride, int64_t depth, const float* b,
                                  bool add, float* c, int64_t c_stride) {
  f32v sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load(c + r * c_stride + v * kLanes) : f32v{};
  for (int64_t piece = 0; piece < pieces; ++piece, a += piece_stride) {
    for (int64_t i = 0; i < depth; ++i, b += kPanel) {
      f32v x[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) x[v] = load(b + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        f32v y = splat(a[r * kRowStride + i * kStep]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] += y * x[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
}

// out [key][query] = keys x queries^T, slabs times panels. Only what `mask` leaves is computed, and some around it.
void multiply_transposed(const Sight& sight, const Tile& tile, const float* keys, const float* queries, int64_t width,
                         float* out) {
  for (int64_t query = 0; query < sight.count; query += kPanel) {
    Span seen = keys_seen(sight, tile, query, kPanel);
    for (int64_t key = seen.begin / kRows * kRows; key < seen.end; key += kRows)
      product_block<kPanel, 1>(keys + key * kPanel, slabs(width), kSlab, kPanel, queries + query * padded(width), false,
                               out + key * kBlock + query, kBlock);
  }
}

// out [query] += weights^T x rows, over the keys.
void add_to_queries(const Sight& sight, const Tile& tile, const float* weights, const float* rows, int64_t width,
                    float* out) {
  for (int64_t query = 0; query < sight.count; query += kRows) {
    Span seen = keys_seen(sight, tile, query, kRows);
    if (seen.begin >= seen.end) continue;
    for (int64_t slab = 0; slab < slabs(width); ++slab)
      product_block<1, kBlock>(weights + seen.begin * kBlock + query, 1, 0, seen.end - seen.begin,
                               rows + slab * kSlab + seen.begin * kPanel, true, out + slab * kSlab + query * kPanel,
                               kPanel);
  }
}

// out [key] += weights x rows, over the queries.
void add_to_keys(const Sight& sight, const Tile& tile, const float* weights, const float* rows, int64_t width,
                 float* out) {
  for (int64_t key = 0; key < tile.count; key += kRows) {
    Span seeing = queries_seeing(sight, tile, key, kRows);
    if (seeing.begin >= seeing.end) continue;
    for (int64_t slab = 0; slab < slabs(width); ++slab)
      product_block<kBlock, 1>(weights + key * kBlock + seeing.begin, 1, 0, seeing.end - seeing.begin,
                               rows + slab * kSlab + seeing.begin * kPanel, true, out + slab * kSlab + key * kPanel,
                               kPanel);
  }
}

// ---- forward ----

struct Softmax {
  alignas(64) float largest[kBlock], total[kBlock], shrink[kBlock];
};

// Logits become -inf where the query does not see the key.
void mask(const Sight& sight, const Tile& tile, float* logits) {
  if (tile.all) return;
  for (int64_t query = 0; query < kBlock; query += kLanes) {
    i32v first = load_raw<i32v>(sight.first + query), last = load_raw<i32v>(sight.last + query);
    for (int64_t i = 0; i < tile.count; ++i) {
      int32_t key = int32_t(tile.begin + i);
      float* at = logits + i * kBlock + query;
      store(at, select((first <= key) & (last > key), load(at), splat(-kInfinity)));
    }
  }
}

// Logits become weights relative to the largest logit so far, and what was there before must shrink by `shrink`.
void update(Softmax& state, int64_t count, float* logits) {
  for (int64_t query = 0; query < kBlock; query += kLanes) {
    f32v before = load(state.largest + query), largest = before, sum = {};
    for (int64_t i = 0; i < count; ++i) largest = max(largest, load(logits + i * kBlock + query));
    f32v base = select(largest == -kInfinity, f32v{}, largest);
    for (int64_t i = 0; i < count; ++i) {
      f32v weight = exp2(load(logits + i * kBlock + query) - base);
      store(logits + i * kBlock + query, weight);
      sum += weight;
    }
    f32v shrink = exp2(before - base);
    store(state.largest + query, largest);
    store(state.shrink + query, shrink);
    store(state.total + query, load(state.total + query) * shrink + sum);
  }
}

void shrink_rows(const float* shrink, int64_t count, int64_t width, float* acc) {
  for (int64_t slab = 0; slab < slabs(width); ++slab)
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        float* at = acc + slab * kSlab + row * kPanel + i;
        store(at, load(at) * shrink[row]);
      }
}

template <typename T>
void write_out(const Softmax& state, const Sight& sight, const float* acc, const Rows& out) {
  for (int64_t row = 0; row < sight.count; ++row) {
    float total = state.total[row];
    T* to = static_cast<T*>(out.data) + (sight.begin + row) * out.stride;
    for (int64_t i = 0; i < out.width; i += kLanes) {
      f32v x = load(acc + i / kPanel * kSlab + row * kPanel + i % kPanel);
      store_lanes(to + i, total == 0 ? f32v{} : x / total, out.width - i);
    }
  }
}

void write_lse(const Softmax& state, const Sight& sight, float* lse, int64_t stride) {
  for (int64_t i = 0; i < sight.count; ++i) {
    float largest = state.largest[i] == -kInfinity ? 0 : state.largest[i];
    lse[i * stride] = (largest + __builtin_log2f(state.total[i])) * kLn2;
  }
}

// The blocks of queries from token `begin` to `end`, together, so that each block of keys is packed once for all.
void attend(const MlaPrefillParams& p, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  const Sequences& s = p.sequences;
  int64_t key_floats = kBlock * padded(s.key_width), value_floats = kBlock * padded(s.value_width);
  int64_t floats = (1 + kQueryBlocks) * (key_floats + value_floats) + kBlock * kBlock;
  float* keys = static_cast<float*>(scratch(floats * sizeof(float)));
  float* values = keys + key_floats;
  float* weights = values + value_floats;
  float* queries = weights + kBlock * kBlock;
  float* acc = queries + kQueryBlocks * key_floats;
  Sight sights[kQueryBlocks];
  Softmax states[kQueryBlocks];
  Rows q = rows_of(s, s.q, s.q_type, s.key_width, batch, head);
  Rows k = rows_of(s, s.k, s.k_type, s.key_width, batch, head);
  Rows v = rows_of(s, s.v, s.v_type, s.value_width, batch, head);
  Rows out = rows_of(s, p.out, s.q_type, s.value_width, batch, head);
  int64_t blocks = (end - begin + kBlock - 1) / kBlock;
  Span any = {s.tokens, 0};
  std::memset(acc, 0, blocks * value_floats * sizeof(float));
  for (int64_t i = 0; i < blocks; ++i) {
    sights[i] = sight_of(s, batch, begin + i * kBlock);
    any = join(any, sights[i].any);
    pack(q, sights[i].begin, sights[i].count, keys);
    transpose_slabs(keys, s.key_width, sights[i].count, s.softmax_scale * kLog2E, queries + i * key_floats);
    for (int64_t row = 0; row < kBlock; ++row) states[i].largest[row] = -kInfinity, states[i].total[row] = 0;
  }

  for (int64_t token = any.begin; token < any.end; token += kBlock) {
    int64_t count = at_most(any.end - token, kBlock);
    pack(k, token, count, keys);
    pack(v, token, count, values);
    for (int64_t i = 0; i < blocks; ++i) {
      if (!overlap(sights[i].any, {token, token + count})) continue;
      Tile tile = tile_of(sights[i], token, count);
      multiply_transposed(sights[i], tile, keys, queries + i * key_floats, s.key_width, weights);
      mask(sights[i], tile, weights);
      update(states[i], count, weights);
      shrink_rows(states[i].shrink, sights[i].count, s.value_width, acc + i * value_floats);
      add_to_queries(sights[i], tile, weights, values, s.value_width, acc + i * value_floats);
    }
  }

  for (int64_t i = 0; i < blocks; ++i) {
    with_type(s.q_type,
              [&](auto type) { write_out<decltype(type)>(states[i], sights[i], acc + i * value_floats, out); });
    write_lse(states[i], sights[i], p.lse + (batch * s.tokens + sights[i].begin) * s.heads + head, s.heads);
  }
}

// ---- backward ----

// The blocks that a task of the backward pass works in.
struct Blocks {
  float *keys, *values, *d_keys, *d_values;  // of a whole range
  float *queries, *queries_transposed, *d_queries, *d_out, *d_out_transposed, *weights, *d_logits;
  alignas(64) float lse[kBlock], delta[kBlock];  // lse in units of log2(e)
};

Blocks blocks_of(const Sequences& s) {
  int64_t keys = kBlock * padded(s.key_width), values = kBlock * padded(s.value_width), weights = kBlock * kBlock;
  int64_t floats = (3 + 2 * kRangeBlocks) * keys + (2 + 2 * kRangeBlocks) * values + 2 * weights;
  float* memory = static_cast<float*>(scratch(floats * sizeof(float)));
  auto take = [&](int64_t floats) {
    float* part = memory;
    memory += floats;
    return part;
  };
  Blocks b;
  b.keys = take(kRangeBlocks * keys);
  b.values = take(kRangeBlocks * values);
  b.d_keys = take(kRangeBlocks * keys);
  b.d_values = take(kRangeBlocks * values);
  b.queries = take(keys);
  b.queries_transposed = take(keys);
  b.d_queries = take(keys);
  b.d_out = take(values);
  b.d_out_transposed = take(values);
  b.weights = take(weights);
  b.d_logits = take(weights);
  return b;
}

// Logits become weights, and d_weights d_logits.
template <bool kMasked>
void differentiate(const Sight& sight, const Tile& tile, float scale, Blocks& b) {
  for (int64_t query = 0; query < kBlock; query += kLanes) {
    i32v first = load_raw<i32v>(sight.first + query), last = load_raw<i32v>(sight.last + query);
    f32v lse = load(b.lse + query), delta = load(b.delta + query);
    for (int64_t i = 0; i < tile.count; ++i) {
      float *weights = b.weights + i * kBlock + query, *d_logits = b.d_logits + i * kBlock + query;
      f32v weight = exp2(load(weights) - lse), d_logit = weight * (load(d_logits) - delta) * scale;
      if constexpr (kMasked) {
        int32_t key = int32_t(tile.begin + i);
        i32v sees = (first <= key) & (last > key);
        weight = select(sees, weight, f32v{});
        d_logit = select(sees, d_logit, f32v{});
      }
      store(weights, weight);
      store(d_logits, d_logit);
    }
  }
}

// delta [query]: the sum of out * d_out, as slabs, over its row.
template <typename T>
void dot_rows(const Rows& out, const Sight& sight, const float* d_out, float* delta) {
  for (int64_t row = 0; row < sight.count; ++row) {
    const T* from = static_cast<const T*>(out.data) + (sight.begin + row) * out.stride;
    f32v sums = {};
    for (int64_t i = 0; i < out.width; i += kLanes)
      sums += load_lanes(from + i, out.width - i) * load(d_out + i / kPanel * kSlab + row * kPanel + i % kPanel);
    delta[row] = sum(sums);
  }
}

void load_queries(const MlaPrefillBackwardParams& p, const Sight& sight, int64_t batch, int64_t head, Blocks& b) {
  const Sequences& s = p.sequences;
  Rows q = rows_of(s, s.q, s.q_type, s.key_width, batch, head);
  Rows out = rows_of(s, p.out, s.q_type, s.value_width, batch, head);
  Rows d_out = rows_of(s, p.d_out, s.q_type, s.value_width, batch, head);
  pack(q, sight.begin, sight.count, b.queries);
  transpose_slabs(b.queries, s.key_width, sight.count, s.softmax_scale * kLog2E, b.queries_transposed);
  pack(d_out, sight.begin, sight.count, b.d_out);
  transpose_slabs(b.d_out, s.value_width, sight.count, 1.0f, b.d_out_transposed);
  with_type(s.q_type, [&](auto type) { dot_rows<decltype(type)>(out, sight, b.d_out, b.delta); });
  for (int64_t i = 0; i < kBlock; ++i) {
    int64_t at = (batch * s.tokens + sight.begin + i) * s.heads + head;
    bool sums = i < sight.count && p.lse[at] != -kInfinity;
    b.lse[i] = sums ? p.lse[at] * kLog2E : 0;
    b.delta[i] = sums ? b.delta[i] - p.d_lse[at] : 0;
  }
}

// Gradients from the tile's keys, block `i` of the range.
void add_gradients(const Sequences& s, const Sight& sight, const Tile& tile, int64_t i, Blocks& b) {
  int64_t key_floats = kBlock * padded(s.key_width), value_floats = kBlock * padded(s.value_width);
  const float *keys = b.keys + i * key_floats, *values = b.values + i * value_floats;
  multiply_transposed(sight, tile, keys, b.queries_transposed, s.key_width, b.weights);
  multiply_transposed(sight, tile, values, b.d_out_transposed, s.value_width, b.d_logits);
  tile.all ? differentiate<false>(sight, tile, s.softmax_scale, b)
           : differentiate<true>(sight, tile, s.softmax_scale, b);
  add_to_keys(sight, tile, b.weights, b.d_out, s.value_width, b.d_values + i * value_floats);
  add_to_keys(sight, tile, b.d_logits, b.queries, s.key_width, b.d_keys + i * key_floats);
  add_to_queries(sight, tile, b.d_logits, keys, s.key_width, b.d_queries);
}

// Between the range of queries from token `first_query` on and that of keys from `first_key` on.
void differentiate_range(const MlaPrefillBackwardParams& p, int64_t batch, int64_t head, int64_t first_query,
                         int64_t first_key, To how) {
  const Sequences& s = p.sequences;
  int64_t key_floats = kBlock * padded(s.key_width), value_floats = kBlock * padded(s.value_width);
  int64_t end_query = at_most(first_query + kRange, s.tokens), end_key = at_most(first_key + kRange, s.tokens);
  Sight sights[kRangeBlocks];
  int64_t blocks = 0;
  Span any = {s.tokens, 0};
  for (int64_t query = first_query; query < end_query; query += kBlock, ++blocks) {
    sights[blocks] = sight_of(s, batch, query);
    any = join(any, sights[blocks].any);
  }
  if (how == To::add && !overlap(any, {first_key, end_key})) return;

  Blocks b = blocks_of(s);
  Rows k = rows_of(s, s.k, s.k_type, s.key_width, batch, head);
  Rows v = rows_of(s, s.v, s.v_type, s.value_width, batch, head);
  Rows dq = rows_of(s, p.dq, DType::f32, s.key_width, batch, head);
  Rows dk = rows_of(s, p.dk, DType::f32, s.key_width, batch, head);
  Rows dv = rows_of(s, p.dv, DType::f32, s.value_width, batch, head);
  auto each_tile = [&](auto f) {
    for (int64_t i = 0; first_key + i * kBlock < end_key; ++i)
      f(i, Span{first_key + i * kBlock, at_most(first_key + (i + 1) * kBlock, end_key)});
  };
  std::memset(b.d_keys, 0, kRangeBlocks * (key_floats + value_floats) * sizeof(float));
  each_tile([&](int64_t i, Span keys) {
    if (!overlap(any, keys)) return;
    pack(k, keys.begin, keys.end - keys.begin, b.keys + i * key_floats);
    pack(v, keys.begin, keys.end - keys.begin, b.values + i * value_floats);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    const Sight& sight = sights[block];
    bool sees = overlap(sight.any, {first_key, end_key});
    if (!sees && how == To::add) continue;
    std::memset(b.d_queries, 0, key_floats * sizeof(float));
    if (sees) load_queries(p, sight, batch, head, b);
    each_tile([&](int64_t i, Span keys) {
      if (overlap(sight.any, keys)) add_gradients(s, sight, tile_of(sight, keys.begin, keys.end - keys.begin), i, b);
    });
    unpack(b.d_queries, sight.begin, sight.count, how, dq);
  }
  each_tile([&](int64_t i, Span keys) {
    unpack(b.d_keys + i * key_floats, keys.begin, keys.end - keys.begin, how, dk);
    unpack(b.d_values + i * value_floats, keys.begin, keys.end - keys.begin, how, dv);
  });
}

}  // namespace

void mla_prefill(const MlaPrefillParams& p, const Threads& threads) {
  const Sequences& s = p.sequences;
  constexpr int64_t kQueries = kQueryBlocks * kBlock;
  int64_t tasks = (s.tokens + kQueries - 1) / kQueries;
  prefer_large_pages(p.out, s.batch * s.tokens * s.heads * s.value_width * size_of(s.q_type));
  // The last queries of a head first: under a causal mask they take longest.
  threads.for_each(s.batch * s.heads * tasks, [&](int64_t task) {
    int64_t sequence = task / tasks, begin = (tasks - 1 - task % tasks) * kQueries;
    attend(p, sequence / s.heads, sequence % s.heads, begin, at_most(begin + kQueries, s.tokens));
  });
}

void mla_prefill_backward(const MlaPrefillBackwardParams& p, const Threads& threads) {
  const Sequences& s = p.sequences;
  int64_t ranges = (s.tokens + kRange - 1) / kRange, rows = s.batch * s.tokens * s.heads;
  prefer_large_pages(p.dq, rows * s.key_width * sizeof(float));
  prefer_large_pages(p.dk, rows * s.key_width * sizeof(float));
  prefer_large_pages(p.dv, rows * s.value_width * sizeof(float));
  for (int64_t phase = 0; phase < ranges; ++phase) {
    threads.for_each(s.batch * s.heads * ranges, [&](int64_t task) {
      int64_t sequence = task / ranges, queries = task % ranges, keys = (queries + ranges - phase) % ranges;
      differentiate_range(p, sequence / s.heads, sequence % s.heads, queries * kRange, keys * kRange,
                          phase == 0 ? To::write : To::add);
    });
  }
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
