// The tokens of a head are cut into blocks. A task of the forward pass takes a block of queries through the blocks of
// keys that it sees, as FlashAttention-2 does:
//
//   weights [key][query] = keys x queries^T, masked; then exp2(logit - largest)
//   acc [query][column] = acc * shrink + weights^T x values
//
// The backward pass computes the weights again from lse, and with them, for each pair of blocks,
//
//   d_weights [key][query] = values x d_out^T
//   d_logits = scale * weights * (d_weights - delta)
//   d_values += weights x d_out        d_keys += d_logits x queries        d_queries += d_logits^T x keys
//
// A query is a lane in weights and d_logits, so that softmax needs no sum over the lanes of a register, and each of the
// products broadcasts one operand and has the columns of the other in its registers. Logits are in units of log2(e), so
// that exp2 serves.
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
constexpr int64_t kRangeBlocks = 4;  // that a task of the backward pass takes, of queries and of keys
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

// The rows of one head.
struct Rows {
  void* data;
  DType type;
  int64_t width, stride;  // in elements
};

Rows rows_of(const Sequences& s, const void* data, DType type, int64_t width, int64_t batch, int64_t head) {
  int64_t row = batch * s.tokens * s.heads + head;
  return {const_cast<char*>(static_cast<const char*>(data)) + row * width * size_of(type), type, width,
          s.heads * width};
}

// Tokens [begin, end); none if end is not larger.
struct Span {
  int64_t begin, end;
};

bool overlap(Span a, Span b) { return a.begin < b.end && b.begin < a.end; }

// What the queries of one block see.
struct Sight {
  const int32_t *all_first, *all_last;  // of the sequence's tokens
  int64_t begin, count;                 // the block
  alignas(64) int32_t first[kBlock], last[kBlock];
  Span any;  // the keys that some query sees, and those between
  Span all;  // the keys that every query sees
};

Sight sight_of(const Sequences& s, int64_t batch, int64_t block) {
  Sight sight;
  sight.all_first = s.first + batch * s.tokens;
  sight.all_last = s.last + batch * s.tokens;
  sight.begin = block * kBlock;
  sight.count = at_most(s.tokens - sight.begin, kBlock);
  sight.any = {s.tokens, 0};
  sight.all = {0, s.tokens};
  for (int64_t i = 0; i < kBlock; ++i) {
    int64_t first = i < sight.count ? at_least(sight.all_first[sight.begin + i], 0) : s.tokens;
    int64_t last = i < sight.count ? at_most(sight.all_last[sight.begin + i], s.tokens) : 0;
    if (first >= last) first = s.tokens, last = 0;
    sight.first[i] = int32_t(first);
    sight.last[i] = int32_t(last);
    sight.any = {at_most(sight.any.begin, first), at_least(sight.any.end, last)};
    sight.all = {at_least(sight.all.begin, first), at_most(sight.all.end, last)};
  }
  return sight;
}

bool sees_nothing(const Sight& sight, int64_t token) { return sight.all_first[token] >= sight.all_last[token]; }

// ---- blocks as float32, in the order that the products read ----

int64_t padded(int64_t width) { return round_up(width, kPanel); }
int64_t slabs(int64_t width) { return (width + kPanel - 1) / kPanel; }

// The rows of the tokens [begin, begin + count) as slabs [width / kPanel][kBlock][kPanel], filled up with zeros to a
// whole slab; zeros also for tokens that see nothing. What lies beyond `count` rows is left as it is.
template <typename T>
void pack(const Rows& x, const Sight& sight, int64_t begin, int64_t count, float* to) {
  constexpr int64_t kAhead = 4;  // rows: they are too far apart for the hardware to fetch the next one
  for (int64_t row = 0; row < count; ++row) {
    const T* from = static_cast<const T*>(x.data) + (begin + row) * x.stride;
    int64_t width = sees_nothing(sight, begin + row) ? 0 : x.width;
    for (int64_t i = 0; i < padded(x.width); i += kLanes) {
      if (i * sizeof(T) % 64 == 0) __builtin_prefetch(from + kAhead * x.stride + i);
      f32v v = {};
      if (i < width) v = load_lanes(from + i, width - i);
      store(to + i / kPanel * kSlab + row * kPanel + i % kPanel, v);
    }
  }
}

void pack(const Rows& x, const Sight& sight, int64_t begin, int64_t count, float* to) {
  with_type(x.type, [&](auto type) { pack<decltype(type)>(x, sight, begin, count, to); });
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

// Slabs as rows of the tokens [begin, begin + count).
void unpack(const float* from, int64_t begin, int64_t count, To how, const Rows& x) {
  for (int64_t row = 0; row < count; ++row) {
    float* to = static_cast<float*>(x.data) + (begin + row) * x.stride;
    for (int64_t i = 0; i < x.width; i += kLanes) {
      f32v v = load(from + i / kPanel * kSlab + row * kPanel + i % kPanel);
      if (how == To::add) v += load_lanes(to + i, x.width - i);
      store_lanes(to + i, v, x.width - i);
    }
  }
}

// ---- products of blocks ----

// c [kRows][c_stride] = or += a b. b has its columns in registers, [depth][kPanel], and a's numbers are broadcast: that
// of row r and depth i of a piece is a[r * kRowStride + i * kStep]. A piece is `depth` deep.
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

// out [key][query] = keys x queries^T: slabs times panels.
void multiply_transposed(const float* keys, int64_t key_count, const float* queries, int64_t query_count, int64_t width,
                         float* out) {
  for (int64_t query = 0; query < query_count; query += kPanel)
    for (int64_t key = 0; key < key_count; key += kRows)
      product_block<kPanel, 1>(keys + key * kPanel, slabs(width), kSlab, kPanel, queries + query * padded(width), false,
                               out + key * kBlock + query, kBlock);
}

// out [query] += weights^T x rows, over the keys.
void add_to_queries(const float* weights, int64_t key_count, int64_t query_count, const float* rows, int64_t width,
                    float* out) {
  for (int64_t slab = 0; slab < slabs(width); ++slab)
    for (int64_t query = 0; query < query_count; query += kRows)
      product_block<1, kBlock>(weights + query, 1, 0, key_count, rows + slab * kSlab, true,
                               out + slab * kSlab + query * kPanel, kPanel);
}

// out [key] += weights x rows, over the queries.
void add_to_keys(const float* weights, int64_t key_count, int64_t query_count, const float* rows, int64_t width,
                 float* out) {
  for (int64_t slab = 0; slab < slabs(width); ++slab)
    for (int64_t key = 0; key < key_count; key += kRows)
      product_block<kBlock, 1>(weights + key * kBlock, 1, 0, query_count, rows + slab * kSlab, true,
                               out + slab * kSlab + key * kPanel, kPanel);
}

// ---- forward ----

struct Softmax {
  alignas(64) float largest[kBlock], total[kBlock], shrink[kBlock];
};

// Logits of the keys [begin, begin + count) become -inf where the query does not see the key.
void mask(const Sight& sight, int64_t begin, int64_t count, float* logits) {
  for (int64_t query = 0; query < kBlock; query += kLanes) {
    i32v first = load_raw<i32v>(sight.first + query), last = load_raw<i32v>(sight.last + query);
    for (int64_t i = 0; i < count; ++i) {
      int32_t key = int32_t(begin + i);
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

void attend(const MlaPrefillParams& p, int64_t batch, int64_t head, int64_t block) {
  const Sequences& s = p.sequences;
  int64_t key_floats = kBlock * padded(s.key_width), value_floats = kBlock * padded(s.value_width);
  float* keys = static_cast<float*>(scratch((2 * key_floats + 2 * value_floats + kBlock * kBlock) * sizeof(float)));
  float* queries = keys + key_floats;
  float* values = queries + key_floats;
  float* acc = values + value_floats;
  float* weights = acc + value_floats;

  Sight sight = sight_of(s, batch, block);
  Rows q = rows_of(s, s.q, s.q_type, s.key_width, batch, head);
  Rows k = rows_of(s, s.k, s.k_type, s.key_width, batch, head);
  Rows v = rows_of(s, s.v, s.v_type, s.value_width, batch, head);
  pack(q, sight, sight.begin, sight.count, keys);
  transpose_slabs(keys, s.key_width, sight.count, s.softmax_scale * kLog2E, queries);
  std::memset(acc, 0, value_floats * sizeof(float));
  Softmax state;
  for (int64_t i = 0; i < kBlock; ++i) state.largest[i] = -kInfinity, state.total[i] = 0;

  for (int64_t token = sight.any.begin; token < sight.any.end; token += kBlock) {
    int64_t count = at_most(sight.any.end - token, kBlock);
    pack(k, sight, token, count, keys);
    pack(v, sight, token, count, values);
    multiply_transposed(keys, count, queries, sight.count, s.key_width, weights);
    mask(sight, token, count, weights);
    update(state, count, weights);
    shrink_rows(state.shrink, sight.count, s.value_width, acc);
    add_to_queries(weights, count, sight.count, values, s.value_width, acc);
  }

  with_type(s.q_type, [&](auto type) {
    write_out<decltype(type)>(state, sight, acc, rows_of(s, p.out, s.q_type, s.value_width, batch, head));
  });
  for (int64_t i = 0; i < sight.count; ++i) {
    float largest = state.largest[i] == -kInfinity ? 0 : state.largest[i];
    p.lse[(batch * s.tokens + sight.begin + i) * s.heads + head] = (largest + __builtin_log2f(state.total[i])) * kLn2;
  }
}

// ---- backward ----

// The blocks that a task of the backward pass works in.
struct Blocks {
  float *queries, *queries_transposed, *d_out, *d_out_transposed, *keys, *values;
  float *weights, *d_logits;
  float *d_queries, *d_keys, *d_values;          // the last two of a whole range
  alignas(64) float lse[kBlock], delta[kBlock];  // lse in units of log2(e)
};

int64_t blocks_floats(const Sequences& s) {
  int64_t keys = kBlock * padded(s.key_width), values = kBlock * padded(s.value_width);
  return (4 + kRangeBlocks) * keys + (3 + kRangeBlocks) * values + 2 * kBlock * kBlock;
}

Blocks blocks_in(const Sequences& s, float* memory) {
  int64_t keys = kBlock * padded(s.key_width), values = kBlock * padded(s.value_width);
  auto take = [&](int64_t floats) {
    float* part = memory;
    memory += floats;
    return part;
  };
  Blocks b;
  b.queries = take(keys);
  b.queries_transposed = take(keys);
  b.keys = take(keys);
  b.d_queries = take(keys);
  b.d_out = take(values);
  b.d_out_transposed = take(values);
  b.values = take(values);
  b.weights = take(kBlock * kBlock);
  b.d_logits = take(kBlock * kBlock);
  b.d_keys = take(kRangeBlocks * keys);
  b.d_values = take(kRangeBlocks * values);
  return b;
}

// Logits become weights, and d_weights d_logits.
void differentiate(const Sight& sight, int64_t begin, int64_t count, float scale, Blocks& b) {
  for (int64_t query = 0; query < kBlock; query += kLanes) {
    i32v first = load_raw<i32v>(sight.first + query), last = load_raw<i32v>(sight.last + query);
    f32v lse = load(b.lse + query), delta = load(b.delta + query);
    for (int64_t i = 0; i < count; ++i) {
      int32_t key = int32_t(begin + i);
      float *weights = b.weights + i * kBlock + query, *d_logits = b.d_logits + i * kBlock + query;
      i32v sees = (first <= key) & (last > key);
      f32v weight = select(sees, exp2(load(weights) - lse), f32v{});
      store(weights, weight);
      store(d_logits, select(sees, weight * (load(d_logits) - delta) * scale, f32v{}));
    }
  }
}

// One block of queries and the block of keys from `begin` on, of which d_keys and d_values are.
void add_gradients(const Sequences& s, const Sight& sight, const Rows& k, const Rows& v, int64_t begin, Blocks& b,
                   float* d_keys, float* d_values) {
  int64_t count = at_most(s.tokens - begin, kBlock);
  pack(k, sight, begin, count, b.keys);
  pack(v, sight, begin, count, b.values);
  multiply_transposed(b.keys, count, b.queries_transposed, sight.count, s.key_width, b.weights);
  multiply_transposed(b.values, count, b.d_out_transposed, sight.count, s.value_width, b.d_logits);
  differentiate(sight, begin, count, s.softmax_scale, b);
  add_to_keys(b.weights, count, sight.count, b.d_out, s.value_width, d_values);
  add_to_keys(b.d_logits, count, sight.count, b.queries, s.key_width, d_keys);
  add_to_queries(b.d_logits, count, sight.count, b.keys, s.key_width, b.d_queries);
}

void load_queries(const MlaPrefillBackwardParams& p, const Sight& sight, int64_t batch, int64_t head, Blocks& b) {
  const Sequences& s = p.sequences;
  Rows q = rows_of(s, s.q, s.q_type, s.key_width, batch, head);
  Rows d_out = rows_of(s, p.d_out, s.q_type, s.value_width, batch, head);
  pack(q, sight, sight.begin, sight.count, b.queries);
  transpose_slabs(b.queries, s.key_width, sight.count, s.softmax_scale * kLog2E, b.queries_transposed);
  pack(d_out, sight, sight.begin, sight.count, b.d_out);
  transpose_slabs(b.d_out, s.value_width, sight.count, 1.0f, b.d_out_transposed);
  for (int64_t i = 0; i < kBlock; ++i) {
    int64_t at = (batch * s.tokens + sight.begin + at_most(i, sight.count - 1)) * s.heads + head;
    b.lse[i] = p.lse[at] == -kInfinity ? 0 : p.lse[at] * kLog2E;
    b.delta[i] = p.delta[at];
  }
}

// The ranges number `queries` and `keys`; the first phase writes the gradients, the others add to them.
void differentiate_range(const MlaPrefillBackwardParams& p, int64_t batch, int64_t head, int64_t queries, int64_t keys,
                         To how) {
  const Sequences& s = p.sequences;
  int64_t key_floats = kBlock * padded(s.key_width), value_floats = kBlock * padded(s.value_width);
  Blocks b = blocks_in(s, static_cast<float*>(scratch(blocks_floats(s) * sizeof(float))));
  Rows k = rows_of(s, s.k, s.k_type, s.key_width, batch, head);
  Rows v = rows_of(s, s.v, s.v_type, s.value_width, batch, head);
  Rows dq = rows_of(s, p.dq, DType::f32, s.key_width, batch, head);
  Rows dk = rows_of(s, p.dk, DType::f32, s.key_width, batch, head);
  Rows dv = rows_of(s, p.dv, DType::f32, s.value_width, batch, head);
  int64_t first_key = keys * kRange, end_key = at_most(first_key + kRange, s.tokens);
  int64_t end_query = at_most((queries + 1) * kRange, s.tokens);
  bool any = false;
  std::memset(b.d_keys, 0, kRangeBlocks * key_floats * sizeof(float));
  std::memset(b.d_values, 0, kRangeBlocks * value_floats * sizeof(float));

  for (int64_t query = queries * kRange; query < end_query; query += kBlock) {
    Sight sight = sight_of(s, batch, query / kBlock);
    bool sees = overlap(sight.any, {first_key, end_key});
    if (!sees && how == To::add) continue;
    any = true;
    std::memset(b.d_queries, 0, key_floats * sizeof(float));
    if (sees) load_queries(p, sight, batch, head, b);
    for (int64_t key = first_key; key < end_key; key += kBlock) {
      int64_t i = (key - first_key) / kBlock;
      if (overlap(sight.any, {key, key + kBlock}))
        add_gradients(s, sight, k, v, key, b, b.d_keys + i * key_floats, b.d_values + i * value_floats);
    }
    unpack(b.d_queries, sight.begin, sight.count, how, dq);
  }
  if (!any) return;
  for (int64_t key = first_key; key < end_key; key += kBlock) {
    int64_t i = (key - first_key) / kBlock, count = at_most(end_key - key, kBlock);
    unpack(b.d_keys + i * key_floats, key, count, how, dk);
    unpack(b.d_values + i * value_floats, key, count, how, dv);
  }
}

}  // namespace

void mla_prefill(const MlaPrefillParams& p, const Threads& threads) {
  const Sequences& s = p.sequences;
  int64_t blocks = (s.tokens + kBlock - 1) / kBlock;
  prefer_large_pages(p.out, s.batch * s.tokens * s.heads * s.value_width * size_of(s.q_type));
  // The last blocks of a head first: under a causal mask they take longest.
  threads.for_each(s.batch * s.heads * blocks, [&](int64_t task) {
    int64_t sequence = task / blocks;
    attend(p, sequence / s.heads, sequence % s.heads, blocks - 1 - task % blocks);
  });
}

void mla_prefill_backward(const MlaPrefillBackwardParams& p, const Threads& threads) {
  const Sequences& s = p.sequences;
  int64_t ranges = (s.tokens + kRange - 1) / kRange, floats = s.batch * s.tokens * s.heads;
  prefer_large_pages(p.dq, floats * s.key_width * sizeof(float));
  prefer_large_pages(p.dk, floats * s.key_width * sizeof(float));
  prefer_large_pages(p.dv, floats * s.value_width * sizeof(float));
  for (int64_t phase = 0; phase < ranges; ++phase) {
    threads.for_each(s.batch * s.heads * ranges, [&](int64_t task) {
      int64_t sequence = task / ranges, queries = task % ranges, keys = (queries + ranges - phase) % ranges;
      differentiate_range(p, sequence / s.heads, sequence % s.heads, queries, keys, phase == 0 ? To::write : To::add);
    });
  }
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
