// A request's queries and heads are the rows of two matrix products with the same tokens. The tokens are cut into
// splits of a length that depends on the request alone. A task takes the tokens of one split and up to kMaxRows rows,
// and goes through the tokens in tiles:
//
//   tile [token][width]       the keys as float32; the values are its first columns
//   weights [token][row]      logits = tile x queries, masked; then exp2(logit - largest)
//   acc [row][latent]         acc * shrink + weights x tile
//
// In the first product a register holds one number of kLanes rows, in the second kLanes numbers of one row. So neither
// needs a sum over the lanes of a register, and softmax has a row in each lane. Logits are in units of log2(e), so that
// exp2 serves. A tile holds the next keys that exist, so a page outside the cache costs nothing.
#include "cpu/mla.h"

#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#ifdef JAXKERN_LEVEL_avx512
#include "cpu/amx.h"
#include "cpu/pairs.h"
#endif

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kTile = 96;      // tokens; a multiple of the tokens of every register block
constexpr int64_t kMaxTile = 128;  // of any path
constexpr int64_t kMaxRows = 128;  // a multiple of the rows of a panel
constexpr int64_t kSplitTokens = 512;
constexpr int64_t kMaxSplits = 32;           // bounds the memory for partial results of a long request
constexpr int64_t kPartialBytes = 64 << 20;  // for those of the requests that are computed at a time
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// Register blocks: as many accumulators as the registers allow.
#if defined(JAXKERN_LEVEL_avx512)
constexpr int kPanelTokens = 12, kHalfPanelTokens = 24, kValueRows = 8, kValueRegisters = 3;
#else
constexpr int kPanelTokens = 6, kHalfPanelTokens = 12, kValueRows = 6, kValueRegisters = 2;
#endif
constexpr int64_t kPanelColumns = 192;  // of a panel at a time: they stay in the first cache for all tokens
constexpr int64_t kAheadColumns = 4;    // for each cache line that is fetched ahead
constexpr int64_t kFetched = 64;        // bytes of a packed row that are converted after one prefetch
constexpr int kPanel = 2 * kLanes;  // rows whose queries lie together: [width][kPanel]; the last may be half as wide

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }

enum class Path { floats, pairs, amx };

// What is the same for every task.
struct Plan {
  Path path;
  int64_t rows, blocks, block_rows;  // of a request; a block is the rows of one task
  int64_t key_stride, acc_stride;    // in floats
};

// The requests [begin, end), and their partial results [request][split][row] where any has several splits.
struct Wave {
  int64_t begin, end, max_splits, rows;  // of a split, filled up to whole registers
  float *acc, *largest, *total;
};

struct Splits {
  int64_t length, tokens, count;
};

Splits splits_of(const MlaDecodeParams& p, int64_t request) {
  int64_t length = at_most(at_least(p.seq_lens[request], 0), p.table_pages * p.page);
  int64_t tokens = p.num_splits > 0 ? (length + p.num_splits - 1) / p.num_splits
                                    : at_least(kSplitTokens, round_up((length + kMaxSplits - 1) / kMaxSplits, kTile));
  tokens = at_least(tokens, 1);
  return {length, tokens, at_least((length + tokens - 1) / tokens, 1)};
}

template <typename F>
void with_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::f16) f(f16{});
}

// queries [row][width] -> panels of rows [panel][width][kPanel]; rows that do not exist are zero.
template <typename T>
void pack_queries(const T* q, int64_t rows, int64_t width, float* panels) {
  int64_t padded = round_up(rows, kLanes);
  for (int64_t row = 0; row < padded; row += kLanes) {
    int64_t panel = row / kPanel * kPanel, panel_rows = at_most(padded - panel, kPanel);
    float* to = panels + panel * width + (row - panel);
    for (int64_t k = 0; k < width; k += kLanes) {
      f32v x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = f32v{};
        if (row + i < rows) x[i] = load_lanes(q + (row + i) * width + k, width - k);
      }
      transpose(x);
      for (int i = 0; i < at_most(kLanes, width - k); ++i) store(to + (k + i) * panel_rows, x[i]);
    }
  }
}

// Two memory pages ahead of the row that is being copied: the hardware's own prefetcher stops at the end of one.
JAXKERN_INLINE void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 8192, 0, 2); }

JAXKERN_INLINE void copy(const bf16* from, bf16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    prefetch(from + i);
    store_raw(to + i, load_raw<f32v>(from + i));
  }
  for (; i < n; ++i) to[i] = from[i];
}

template <typename T>
JAXKERN_INLINE void copy(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    prefetch(from + i);
    store(to + i, load(from + i));
  }
  for (; i < n; ++i) to[i] = to_f32(from[i]);
}

JAXKERN_INLINE void zero(void* to, int64_t bytes) { std::memset(to, 0, bytes); }

// A row of the cache as numbers.
template <typename T, typename To>
JAXKERN_INLINE void load_row(const MlaDecodeParams& p, const T* row, To* to) {
  copy(row, to, p.width);
}

JAXKERN_INLINE void load_row(const MlaDecodeParams& p, const e4m3* row, float* to) {
  const e4m3* scales = row + p.latent;
  bool nan = any_nan(row, p.latent);
  for (int64_t i = 0; i < p.latent; i += kLatentBlock, scales += sizeof(float)) {
    float scale = load_raw<float>(scales);
    int64_t k = i, end = at_most(i + kLatentBlock, p.latent);
    for (; !nan && k + kFetched <= end; k += kFetched) {
      prefetch(row + k);
#pragma GCC unroll 8
      for (int64_t j = k; j < k + kFetched; j += kLanes) store(to + j, load_fast(row + j) * kFastUnit * scale);
    }
    for (; k < end; k += kLanes) store_lanes(to + k, load_lanes(row + k, p.latent - k) * scale, p.latent - k);
  }
  copy(reinterpret_cast<const bf16*>(scales), to + p.latent, p.width - p.latent);
}

struct Keys {
  int64_t count;
  const char* rows[kMaxTile];
  int32_t tokens[kMaxTile];
};

// The next keys of a request, at most `most`, among the tokens [token, last). Returns the token to go on with.
int64_t find_keys(const MlaDecodeParams& p, int64_t request, int64_t token, int64_t last, int64_t most, Keys& keys) {
  const int32_t* table = p.block_table + request * p.table_pages;
  int64_t bytes = row_bytes(p.cache_type, p.width, p.latent);
  keys.count = 0;
  while (token < last && keys.count < most) {
    int64_t page = table[token / p.page], row = token % p.page;
    int64_t end = token + at_most(p.page - row, last - token);
    if (page >= 0 && page < p.pages) {
      const char* from = static_cast<const char*>(p.cache) + (page * p.page + row) * bytes;
      end = at_most(end, token + most - keys.count);
      for (; token < end; ++token, from += bytes, ++keys.count) {
        keys.rows[keys.count] = from;
        keys.tokens[keys.count] = int32_t(token);
      }
    }
    token = end;
  }
  return token;
}

// The keys, each filled up with zeros to `stride`, and zeros up to `padded` tokens.
template <typename T, typename To>
void load_tile(const MlaDecodeParams& p, const Keys& keys, int64_t padded, int64_t stride, To* tile) {
  for (int64_t i = 0; i < padded; ++i) {
    int64_t width = i < keys.count ? p.width : 0;
    To* to = tile + i * stride;
    if (i < keys.count) load_row(p, reinterpret_cast<const T*>(keys.rows[i]), to);
    zero(to + width, (stride - width) * sizeof(To));
  }
}

// The rows of the next tile or group, which are fetched a cache line at a time while this one is computed: rows are
// read in one go, faster than memory could follow.
struct Ahead {
  const char *const *row, *const *end;
  int64_t bytes, offset;

  JAXKERN_INLINE void step() {
    if (row == end) return;
    __builtin_prefetch(*row + offset, 0, 2);
    offset += 64;
    if (offset >= bytes) {
      offset = 0;
      ++row;
    }
  }
};

// logits [kTokens][stride] of kRegisters * kLanes rows: += scale * products of these columns, or = for the first.
template <int kTokens, int kRegisters>
void logits_block(const float* tile, int64_t key_stride, const float* panel, int64_t columns, float scale, bool first,
                  float* logits, int64_t stride, Ahead& ahead) {
  f32v acc[kTokens][kRegisters] = {};
  for (int64_t k = 0; k < columns; ++k) {
    if (k % kAheadColumns == 0) ahead.step();
    f32v q[kRegisters];
#pragma GCC unroll 2
    for (int j = 0; j < kRegisters; ++j) q[j] = load(panel + (k * kRegisters + j) * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kTokens; ++i) {
      f32v key = splat(tile[i * key_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kRegisters; ++j) acc[i][j] += key * q[j];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kRegisters; ++j) {
      float* to = logits + i * stride + j * kLanes;
      store(to, acc[i][j] * scale + (first ? f32v{} : load(to)));
    }
}

void logits_of(const float* tile, int64_t tokens, int64_t key_stride, const float* panels, int64_t rows, int64_t width,
               float scale, float* logits, Ahead& ahead) {
  auto panel = [&]<int kTokens, int kRegisters>(int64_t row) {
    for (int64_t k = 0; k < width; k += kPanelColumns)
      for (int64_t i = 0; i < tokens; i += kTokens)
        logits_block<kTokens, kRegisters>(
            tile + i * key_stride + k, key_stride, panels + row * width + k * kRegisters * kLanes,
            at_most(kPanelColumns, width - k), scale, k == 0, logits + i * rows + row, rows, ahead);
  };
  int64_t row = 0;
  for (; row + kPanel <= rows; row += kPanel) panel.template operator()<kPanelTokens, 2>(row);
  if (row < rows) panel.template operator()<kHalfPanelTokens, 1>(row);
}

// One row in each lane.
struct Softmax {
  alignas(64) float largest[kMaxRows], total[kMaxRows], shrink[kMaxRows];
  alignas(64) int32_t limits[kMaxRows];  // the row's keys are the tokens below
};

// Logits of tokens that are no key of the row become -inf.
void mask(const Softmax& state, int64_t rows, const Keys& keys, float* logits) {
  for (int64_t i = 0; i < keys.count; ++i) {
    if (keys.tokens[i] < state.limits[0]) continue;  // a key of all rows
    for (int64_t row = 0; row < rows; row += kLanes) {
      float* at = logits + i * rows + row;
      store(at, select(load_raw<i32v>(state.limits + row) > keys.tokens[i], load(at), splat(-kInfinity)));
    }
  }
}

// Logits become weights relative to the largest logit so far, and what was there before must shrink by `shrink`.
void update(Softmax& state, int64_t rows, int64_t count, float* logits) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    f32v before = load(state.largest + row), largest = before, sum = {};
    for (int64_t i = 0; i < count; ++i) largest = max(largest, load(logits + i * rows + row));
    f32v base = select(largest == -kInfinity, f32v{}, largest);
    for (int64_t i = 0; i < count; ++i) {
      f32v weight = exp2(load(logits + i * rows + row) - base);
      store(logits + i * rows + row, weight);
      sum += weight;
    }
    f32v shrink = exp2(before - base);
    store(state.largest + row, largest);
    store(state.shrink + row, shrink);
    store(state.total + row, load(state.total + row) * shrink + sum);
  }
}

// acc [kRows][kRegisters * kLanes] = acc * shrink + weights x values.
template <int kRows, int kRegisters>
void values_block(const float* weights, int64_t weight_stride, const float* values, int64_t value_stride, int64_t count,
                  const float* shrink, float* acc, int64_t acc_stride) {
  f32v sums[kRows][kRegisters];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) sums[r][j] = load(acc + r * acc_stride + j * kLanes) * shrink[r];
  for (int64_t i = 0; i < count; ++i) {
    f32v value[kRegisters];
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) value[j] = load(values + i * value_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      f32v weight = splat(weights[i * weight_stride + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kRegisters; ++j) sums[r][j] += weight * value[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kRegisters; ++j) store(acc + r * acc_stride + j * kLanes, sums[r][j]);
}

template <int kRegisters>
void values_columns(const float* weights, int64_t weight_stride, int64_t rows, const float* values,
                    int64_t value_stride, int64_t count, const float* shrink, float* acc, int64_t acc_stride) {
  int64_t r = 0;
  auto block = [&]<int kRows>() {
    for (; r + kRows <= rows; r += kRows)
      values_block<kRows, kRegisters>(weights + r, weight_stride, values, value_stride, count, shrink + r,
                                      acc + r * acc_stride, acc_stride);
  };
  block.template operator()<kValueRows>();
  block.template operator()<4>();
  block.template operator()<2>();
  block.template operator()<1>();
}

void add_values(const float* weights, int64_t weight_stride, int64_t rows, const float* tile, int64_t tile_stride,
                int64_t count, const float* shrink, int64_t columns, float* acc, int64_t acc_stride) {
  int64_t column = 0;
  for (; column + kValueRegisters * kLanes <= columns; column += kValueRegisters * kLanes)
    values_columns<kValueRegisters>(weights, weight_stride, rows, tile + column, tile_stride, count, shrink,
                                    acc + column, acc_stride);
  for (; column < columns; column += kLanes)
    values_columns<1>(weights, weight_stride, rows, tile + column, tile_stride, count, shrink, acc + column,
                      acc_stride);
}

// Infinities and NaNs become 0.
template <typename T>
void keep_finite(T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, select(abs(load(x + i)) < kInfinity, load(x + i), f32v{}));
}

// Rows [begin, begin + rows) of a request over the tokens [first, last).
struct Task {
  int64_t request, length, begin, rows, first, last;
};

// State and acc [row][acc_stride] of a task before its first token; returns the end of its last.
int64_t start(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
  for (int64_t row = 0; row < round_up(task.rows, kLanes); ++row) {
    int64_t query = (task.begin + at_most(row, task.rows - 1)) / p.heads;
    state.limits[row] = int32_t(p.causal ? task.length - (p.queries - 1 - query) : task.length);
    state.largest[row] = -kInfinity;
    state.total[row] = 0;
  }
  std::memset(acc, 0, round_up(task.rows, kLanes) * plan.acc_stride * sizeof(float));
  return at_most(task.last, state.limits[task.rows - 1]);
}

// A key of some rows only must not reach the others through 0 * NaN; those that see it, it reaches through its logit.
template <typename T>
void hide_partial_keys(const Softmax& state, const Keys& keys, T* tile, int64_t stride, int64_t columns) {
  for (int64_t i = 0; i < keys.count; ++i)
    if (keys.tokens[i] >= state.limits[0]) keep_finite(tile + i * stride, columns);
}

template <typename Q, typename Cache>
void attend(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
  int64_t last = start(p, plan, task, state, acc), rows = round_up(task.rows, kLanes), stride = plan.key_stride;
  if (task.first >= last) return;
  float* panels = static_cast<float*>(scratch(rows * (p.width + kTile) * sizeof(float), 0));
  float* weights = panels + rows * p.width;
  float* tile = static_cast<float*>(scratch(kTile * stride * sizeof(float), 1));
  Keys tiles[2];
  const Q* q = static_cast<const Q*>(p.q) + (task.request * plan.rows + task.begin) * p.width;
  pack_queries(q, task.rows, p.width, panels);
  int64_t token = find_keys(p, task.request, task.first, last, kTile, tiles[0]);
  for (int i = 0; tiles[i].count > 0; i = 1 - i) {
    const Keys &keys = tiles[i], &next = tiles[1 - i];
    token = find_keys(p, task.request, token, last, kTile, tiles[1 - i]);
    Ahead ahead = {next.rows, next.rows + next.count, row_bytes(p.cache_type, p.width, p.latent), 0};
    int64_t padded = round_up(keys.count, kHalfPanelTokens);
    load_tile<Cache>(p, keys, padded, stride, tile);
    logits_of(tile, padded, stride, panels, rows, p.width, p.softmax_scale * kLog2E, weights, ahead);
    mask(state, rows, keys, weights);
    update(state, rows, keys.count, weights);
    hide_partial_keys(state, keys, tile, stride, plan.acc_stride);
    add_values(weights, rows, task.rows, tile, stride, keys.count, state.shrink, plan.acc_stride, acc, plan.acc_stride);
  }
}

#ifdef JAXKERN_LEVEL_avx512

// ---- the same with products of pairs of bfloat16, for bfloat16 queries and bfloat16 or packed caches ----
//
// An e4m3 is exact as a bfloat16. Its scale multiplies the sum over its block of the logit, and the weight of its
// value; a weight is rounded to bfloat16 after that. A pair of the first product is two columns, one of the second two
// tokens.

constexpr int64_t kPairTile = 96;   // tokens, a multiple of kPairGroup
constexpr int64_t kPairGroup = 24;  // tokens whose keys are taken through the first-level cache at a time
constexpr int64_t kPairKeyStride = kLatentBlock + 32;  // an odd number of cache lines
constexpr int64_t kPairRows = 8;                       // whose weights lie together

// The blocks that a row is cut into, each with one scale: those of the latent, and what follows it as another.
struct Blocks {
  int64_t latent, width, of_latent, count;

  int64_t begin(int64_t i) const { return i < of_latent ? i * kLatentBlock : latent; }
  int64_t end(int64_t i) const { return i < of_latent ? at_most((i + 1) * kLatentBlock, latent) : width; }
};

Blocks blocks_of(const MlaDecodeParams& p) {
  int64_t latent = p.cache_type == DType::e4m3 ? p.latent : p.width;  // else all columns are alike
  int64_t of_latent = (latent + kLatentBlock - 1) / kLatentBlock;
  return {latent, p.width, of_latent, of_latent + (latent < p.width)};
}

// queries [row][width] -> panels of rows [panel][pairs][kPanel], filled up with zeros.
void pack_queries_pairs(const bf16* q, int64_t rows, int64_t width, int64_t pairs, uint32_t* panels) {
  int64_t padded = round_up(rows, kLanes);
  for (int64_t row = 0; row < padded; row += kLanes) {
    int64_t panel = row / kPanel * kPanel, panel_rows = at_most(padded - panel, kPanel);
    uint32_t* to = panels + panel * pairs + (row - panel);
    for (int64_t k = 0; k < pairs; k += kLanes) {
      f32v x[kLanes];  // not float32, but pairs
      for (int i = 0; i < kLanes; ++i)
        x[i] = row + i < rows ? (f32v)load_bf16_lanes(q + (row + i) * width + 2 * k, width - 2 * k) : f32v{};
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store_raw(to + (k + i) * panel_rows, x[i]);
    }
  }
}

// Filled up with zeros to whole registers.
template <typename T>
JAXKERN_INLINE void load_columns(const T* from, int64_t columns, bf16* to) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, e4m3>) {
    for (; k + 64 <= columns; k += 64) {
      __m512i x[2];
      load_bf16(from + k, x);
      store_raw(to + k, x[0]);
      store_raw(to + k + 32, x[1]);
    }
  }
  for (; k < columns; k += 2 * kLanes) store_raw(to + k, load_bf16_lanes(from + k, columns - k));
}

// Block i of a row of the cache as bfloat16. Returns its scale.
JAXKERN_INLINE float load_block(const Blocks& blocks, int64_t i, const bf16* row, bf16* to) {
  load_columns(row + blocks.begin(i), blocks.end(i) - blocks.begin(i), to);
  return 1.0f;
}

JAXKERN_INLINE float load_block(const Blocks& blocks, int64_t i, const e4m3* row, bf16* to) {
  const e4m3* scales = row + blocks.latent;
  if (i < blocks.of_latent) {
    load_columns(row + blocks.begin(i), blocks.end(i) - blocks.begin(i), to);
    return load_raw<float>(scales + i * sizeof(float));
  }
  const bf16* rope = reinterpret_cast<const bf16*>(scales + blocks.of_latent * sizeof(float));
  load_columns(rope, blocks.width - blocks.latent, to);
  return 1.0f;
}

// Block i of the keys [begin, begin + kPairGroup), and their scales; zeros where there are no more.
template <typename Cache>
void load_group(const Blocks& blocks, int64_t i, const Keys& keys, int64_t begin, bf16* group, float* scales) {
  int64_t count = at_most(kPairGroup, keys.count - begin);
  for (int64_t token = 0; token < count; ++token) {
    const Cache* row = reinterpret_cast<const Cache*>(keys.rows[begin + token]);
    scales[token] = load_block(blocks, i, row, group + token * kPairKeyStride);
  }
  std::memset(group + count * kPairKeyStride, 0, (kPairGroup - count) * kPairKeyStride * sizeof(bf16));
}

// logits [kTokens][stride] of kRegisters * kLanes rows: += both scales * the products of one block, or = for the first.
template <int kTokens, int kRegisters>
void logits_block_pairs(const bf16* keys, const uint32_t* panel, int64_t pairs, const float* scales, float scale,
                        bool first, float* logits, int64_t stride, Ahead& ahead) {
  f32v acc[kTokens][kRegisters] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    for (int i = 0; i < 2 / kRegisters; ++i) ahead.step();
    u32v q[kRegisters];
#pragma GCC unroll 2
    for (int j = 0; j < kRegisters; ++j) q[j] = load_raw<u32v>(panel + (k * kRegisters + j) * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kTokens; ++i) {
      u32v key = splat(load_raw<uint32_t>(keys + i * kPairKeyStride + 2 * k));
#pragma GCC unroll 2
      for (int j = 0; j < kRegisters; ++j) acc[i][j] = add_product(acc[i][j], key, q[j]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kRegisters; ++j) {
      float* to = logits + i * stride + j * kLanes;
      store(to, acc[i][j] * (scales[i] * scale) + (first ? f32v{} : load(to)));
    }
  }
}

// The logits of kPairGroup tokens: the part of the columns [2 * first, 2 * (first + some)).
void logits_of_pairs(const bf16* group, int64_t first, int64_t some, const float* scales, const uint32_t* panels,
                     int64_t pairs, int64_t rows, float scale, float* logits, Ahead& ahead) {
  int64_t row = 0;
  for (; row + kPanel <= rows; row += kPanel)
    for (int64_t i = 0; i < kPairGroup; i += kPanelTokens)
      logits_block_pairs<kPanelTokens, 2>(group + i * kPairKeyStride, panels + row * pairs + first * kPanel, some,
                                          scales + i, scale, first == 0, logits + i * rows + row, rows, ahead);
  if (row < rows)
    logits_block_pairs<kPairGroup, 1>(group, panels + row * pairs + first * kLanes, some, scales, scale, first == 0,
                                      logits + row, rows, ahead);
}

// As hide_partial_keys.
void hide_partial_group(const Softmax& state, const Keys& keys, int64_t begin, bf16* group, float* scales) {
  for (int64_t i = 0; i < at_most(kPairGroup, keys.count - begin); ++i) {
    if (keys.tokens[begin + i] < state.limits[0]) continue;
    keep_finite(group + i * kPairKeyStride, kLatentBlock);
    if (!__builtin_isfinite(scales[i])) scales[i] = 0.0f;
  }
}

// group [kPairGroup][kPairKeyStride] -> values [kPairGroup / 2][columns] pairs.
void pack_values_pairs(const bf16* group, int64_t columns, uint32_t* values, int64_t value_stride) {
  for (int64_t i = 0; i < kPairGroup; i += 2, group += 2 * kPairKeyStride, values += value_stride) {
    for (int64_t k = 0; k < columns; k += 2 * kLanes) {
      u32v pairs[2];
      interleave(load_bf16(group + k), load_bf16(group + kPairKeyStride + k), pairs);
      store_raw(values + k, pairs[0]);
      store_raw(values + k + kLanes, pairs[1]);
    }
  }
}

// weights [count][rows] times the tokens' scales -> [rows / kPairRows][pair of tokens][kPairRows] pairs.
void pack_weights_pairs(const float* weights, int64_t rows, int64_t count, const float* scales, uint32_t* packed) {
  int64_t panel = (count + 1) / 2 * kPairRows;
  for (int64_t i = 0; i < count; i += 2, packed += kPairRows) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      f32v first = load(weights + i * rows + row) * scales[i], second = {};
      if (i + 1 < count) second = load(weights + (i + 1) * rows + row) * scales[i + 1];
      u32v pairs = to_pairs(first, second);
      uint32_t* to = packed + row / kPairRows * panel;
      store_raw(to, _mm512_castsi512_si256((__m512i)pairs));
      store_raw(to + panel, _mm512_extracti64x4_epi64((__m512i)pairs, 1));
    }
  }
}

// acc [kRows][2 * kLanes] = acc * shrink + weights x values.
template <int kRows>
void values_block_pairs(const uint32_t* weights, const uint32_t* values, int64_t value_stride, int64_t pairs,
                        const float* shrink, float* acc, int64_t acc_stride) {
  f32v sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) sums[r][j] = load(acc + r * acc_stride + j * kLanes) * shrink[r];
  for (int64_t i = 0; i < pairs; ++i) {
    u32v value[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) value[j] = load_raw<u32v>(values + i * value_stride + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      u32v weight = splat(weights[i * kPairRows + r]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sums[r][j] = add_product(sums[r][j], weight, value[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(acc + r * acc_stride + j * kLanes, sums[r][j]);
}

// acc [rows][columns] = acc * shrink + weights x values.
void add_values_pairs(const uint32_t* weights, int64_t rows, const uint32_t* values, int64_t value_stride,
                      int64_t pairs, const float* shrink, int64_t columns, float* acc, int64_t acc_stride) {
  for (int64_t column = 0; column < columns; column += 2 * kLanes) {
    for (int64_t row = 0; row < rows; row += kPairRows) {
      int64_t some = rows - row;
      for (int64_t i = kPairRows; i < at_most(2 * kPairRows, some); ++i)  // the next ones
        for (int64_t j = 0; j < 2; ++j) __builtin_prefetch(acc + (row + i) * acc_stride + column + j * kLanes, 1);
      auto add = some > 4 ? values_block_pairs<8> : some > 1 ? values_block_pairs<4> : values_block_pairs<1>;
      add(weights + row * pairs, values + column, value_stride, pairs, shrink + row, acc + row * acc_stride + column,
          acc_stride);
    }
  }
}

template <typename Cache>
void attend_pairs(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
  int64_t last = start(p, plan, task, state, acc), rows = round_up(task.rows, kLanes), columns = plan.acc_stride;
  if (task.first >= last) return;
  Blocks blocks = blocks_of(p);
  int64_t pairs = round_up(p.width, 2 * kLanes) / 2;
  int64_t value_stride = columns + kLanes;                                    // an odd number of cache lines
  int64_t value_step = std::is_same_v<Cache, e4m3> ? kLatentBlock : columns;  // columns that share a scale
  uint32_t* queries = static_cast<uint32_t*>(scratch(rows * (pairs + kPairTile * 3 / 2) * sizeof(uint32_t), 0));
  float* weights = reinterpret_cast<float*>(queries + rows * pairs);
  uint32_t* packed_weights = queries + rows * (pairs + kPairTile);
  int64_t bytes = kPairTile * (value_stride * sizeof(uint32_t) / 2 + blocks.count * sizeof(float));
  uint32_t* values = static_cast<uint32_t*>(scratch(bytes + kPairGroup * kPairKeyStride * sizeof(bf16), 1));
  float* scales = reinterpret_cast<float*>(values + kPairTile / 2 * value_stride);
  bf16* group = reinterpret_cast<bf16*>(scales + blocks.count * kPairTile);
  Keys keys, next;
  const bf16* q = static_cast<const bf16*>(p.q) + (task.request * plan.rows + task.begin) * p.width;
  pack_queries_pairs(q, task.rows, p.width, pairs, queries);
  int64_t token = find_keys(p, task.request, task.first, last, kPairTile, next);
  while (next.count > 0) {
    keys = next;
    token = find_keys(p, task.request, token, last, kPairTile, next);
    for (int64_t i = 0; i < keys.count; i += kPairGroup) {
      bool in_tile = i + kPairGroup < keys.count;
      const char* const* from = in_tile ? keys.rows + i + kPairGroup : next.rows;
      Ahead ahead = {from, from + at_most(in_tile ? keys.count - i - kPairGroup : next.count, kPairGroup),
                     row_bytes(p.cache_type, p.width, p.latent), 0};
      for (int64_t block = 0; block < blocks.count; ++block) {
        int64_t begin = blocks.begin(block), end = blocks.end(block);
        float* of_block = scales + block * kPairTile + i;
        load_group<Cache>(blocks, block, keys, i, group, of_block);
        logits_of_pairs(group, begin / 2, (end + 1) / 2 - begin / 2, of_block, queries, pairs, rows,
                        p.softmax_scale * kLog2E, weights + i * rows, ahead);
        hide_partial_group(state, keys, i, group, of_block);
        if (block < blocks.of_latent)
          pack_values_pairs(group, at_most(kLatentBlock, columns - begin), values + i / 2 * value_stride + begin,
                            value_stride);
      }
    }
    mask(state, rows, keys, weights);
    update(state, rows, keys.count, weights);
    for (int64_t column = 0; column < columns; column += value_step) {
      pack_weights_pairs(weights, rows, keys.count, scales + column / kLatentBlock * kPairTile, packed_weights);
      add_values_pairs(packed_weights, task.rows, values + column, value_stride, (keys.count + 1) / 2, state.shrink,
                       at_most(value_step, columns - column), acc + column, columns);
    }
  }
}

// ---- the same on the AMX unit, for bfloat16 queries and caches ----
//
// Queries and keys are multiplied as they are. A weight is the sum of two bfloat16, which keep 16 bits of it.

constexpr int64_t kAmxTile = 128;                     // tokens
constexpr int64_t kStep = 32;                         // what one tile product sums over
constexpr int64_t kOperand = 16 * kStep;              // numbers in a tile of bfloat16
constexpr int64_t kAmxStride = kStep * sizeof(bf16);  // bytes of a row in a packed tile

// The rows in groups of 16: [group][width / 32][16 pairs of columns][16 rows][2].
void pack_queries_amx(const bf16* q, int64_t rows, int64_t width, bf16* packed) {
  for (int64_t group = 0; group < rows; group += 16) {
    for (int64_t k = 0; k < width; k += kStep) {
      f32v pairs[16];  // not float32, but two bfloat16
      for (int i = 0; i < 16; ++i) {
        alignas(64) bf16 row[kStep] = {};
        if (group + i < rows) std::memcpy(row, q + (group + i) * width + k, at_most(width - k, kStep) * sizeof(bf16));
        pairs[i] = load_raw<f32v>(row);
      }
      transpose(pairs);
      for (int i = 0; i < 16; ++i) store_raw(packed + i * kStep, pairs[i]);
      packed += kOperand;
    }
  }
}

// products [token][rows], of two blocks of 16 tokens and kGroups of 16 rows.
template <int kGroups>
void products_amx(const bf16* tile, int64_t key_stride, const bf16* queries, int64_t steps, float* products,
                  int64_t rows) {
  JAXKERN_TILE_ZERO(0);
  JAXKERN_TILE_ZERO(1);
  JAXKERN_TILE_ZERO(2);
  JAXKERN_TILE_ZERO(3);
  for (int64_t i = 0; i < steps; ++i) {
    JAXKERN_TILE_LOAD(4, tile + i * kStep, key_stride * sizeof(bf16));
    JAXKERN_TILE_LOAD(5, tile + 16 * key_stride + i * kStep, key_stride * sizeof(bf16));
    JAXKERN_TILE_LOAD(6, queries + i * kOperand, kAmxStride);
    JAXKERN_TILE_PRODUCT(0, 4, 6);
    JAXKERN_TILE_PRODUCT(1, 5, 6);
    if constexpr (kGroups == 2) {
      JAXKERN_TILE_LOAD(7, queries + (steps + i) * kOperand, kAmxStride);
      JAXKERN_TILE_PRODUCT(2, 4, 7);
      JAXKERN_TILE_PRODUCT(3, 5, 7);
    }
  }
  JAXKERN_TILE_STORE(0, products, rows * sizeof(float));
  JAXKERN_TILE_STORE(1, products + 16 * rows, rows * sizeof(float));
  if constexpr (kGroups == 2) {
    JAXKERN_TILE_STORE(2, products + 16, rows * sizeof(float));
    JAXKERN_TILE_STORE(3, products + 16 * rows + 16, rows * sizeof(float));
  }
}

// weights [token][rows] -> [group of 16 rows][token / 32][high and low][16 rows][32 tokens].
void pack_weights_amx(const float* weights, int64_t rows, int64_t tokens, bf16* packed) {
  for (int64_t group = 0; group < rows; group += 16) {
    for (int64_t token = 0; token < tokens; token += 16) {
      f32v x[16];
      for (int i = 0; i < 16; ++i) x[i] = load(weights + (token + i) * rows + group);
      transpose(x);
      bf16* to = packed + token / kStep * 2 * kOperand + token % kStep;
      for (int i = 0; i < 16; ++i) {
        u32v high = bit_cast<u32v>(x[i]) & 0xffff0000u;
        store_raw(to + i * kStep, __builtin_convertvector(high >> 16, u16v));
        store(to + kOperand + i * kStep, x[i] - bit_cast<f32v>(high));
      }
    }
    packed += tokens * 2 * 16;
  }
}

// tile [token][columns] -> [token / 32][columns / 16][16 pairs of tokens][16 columns][2].
void pack_values_amx(const bf16* tile, int64_t key_stride, int64_t tokens, int64_t columns, bf16* packed) {
  for (int64_t token = 0; token < tokens; token += 2) {
    const bf16 *even = tile + token * key_stride, *odd = even + key_stride;
    bf16* to = packed + token / kStep * kStep * columns + token % kStep / 2 * kStep;
    for (int64_t column = 0; column < columns; column += 16) {
      u32v low = __builtin_convertvector(load_raw<u16v>(even + column), u32v);
      u32v high = __builtin_convertvector(load_raw<u16v>(odd + column), u32v);
      store_raw(to + column * kStep, low | high << 16);
    }
  }
}

// acc [row][columns] += weights x values, of kGroups of 16 rows and two blocks of 16 columns.
template <int kGroups>
void values_amx(const bf16* weights, const bf16* values, int64_t tokens, float* acc, int64_t columns) {
  int64_t stride = columns * sizeof(float), steps = tokens / kStep;
  JAXKERN_TILE_LOAD(0, acc, stride);
  JAXKERN_TILE_LOAD(1, acc + 16, stride);
  if constexpr (kGroups == 2) {
    JAXKERN_TILE_LOAD(2, acc + 16 * columns, stride);
    JAXKERN_TILE_LOAD(3, acc + 16 * columns + 16, stride);
  }
  for (int64_t i = 0; i < steps; ++i) {
    JAXKERN_TILE_LOAD(4, values + i * kStep * columns, kAmxStride);
    JAXKERN_TILE_LOAD(5, values + i * kStep * columns + kOperand, kAmxStride);
    for (int part = 0; part < 2; ++part) {
      JAXKERN_TILE_LOAD(6, weights + (i * 2 + part) * kOperand, kAmxStride);
      JAXKERN_TILE_PRODUCT(0, 6, 4);
      JAXKERN_TILE_PRODUCT(1, 6, 5);
      if constexpr (kGroups == 2) {
        JAXKERN_TILE_LOAD(7, weights + ((steps + i) * 2 + part) * kOperand, kAmxStride);
        JAXKERN_TILE_PRODUCT(2, 7, 4);
        JAXKERN_TILE_PRODUCT(3, 7, 5);
      }
    }
  }
  JAXKERN_TILE_STORE(0, acc, stride);
  JAXKERN_TILE_STORE(1, acc + 16, stride);
  if constexpr (kGroups == 2) {
    JAXKERN_TILE_STORE(2, acc + 16 * columns, stride);
    JAXKERN_TILE_STORE(3, acc + 16 * columns + 16, stride);
  }
}

void shrink_rows(const float* shrink, int64_t rows, float* acc, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    if (shrink[row] == 1.0f) continue;
    for (int64_t i = 0; i < stride; i += kLanes)
      store(acc + row * stride + i, load(acc + row * stride + i) * shrink[row]);
  }
}

void attend_amx(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
  int64_t last = start(p, plan, task, state, acc), rows = round_up(task.rows, 16), columns = plan.acc_stride;
  if (task.first >= last) return;
  int64_t steps = round_up(p.width, kStep) / kStep, stride = (steps | 1) * kStep;  // an odd number of cache lines
  bf16* queries = static_cast<bf16*>(scratch((rows * steps * kStep + 2 * rows * kAmxTile) * sizeof(bf16), 0));
  bf16* packed_weights = queries + rows * steps * kStep;
  bf16* tile = static_cast<bf16*>(scratch(kAmxTile * ((stride + columns) * sizeof(bf16) + rows * sizeof(float)), 1));
  bf16* values = tile + kAmxTile * stride;
  float* weights = reinterpret_cast<float*>(values + kAmxTile * columns);
  Keys keys;
  const bf16* q = static_cast<const bf16*>(p.q) + (task.request * plan.rows + task.begin) * p.width;
  pack_queries_amx(q, task.rows, p.width, queries);
  Tiles tiles;
  for (int64_t token = task.first; token < last;) {
    token = find_keys(p, task.request, token, last, kAmxTile, keys);
    int64_t count = keys.count, padded = round_up(count, kStep);
    load_tile<bf16>(p, keys, padded, stride, tile);
    for (int64_t i = 0; i < padded; i += 32) {
      for (int64_t row = 0; row < rows; row += 32) {
        auto products = row + 32 <= rows ? products_amx<2> : products_amx<1>;
        products(tile + i * stride, stride, queries + row * steps * kStep, steps, weights + i * rows + row, rows);
      }
    }
    for (int64_t i = 0; i < count * rows; i += kLanes)
      store(weights + i, load(weights + i) * (p.softmax_scale * kLog2E));
    mask(state, rows, keys, weights);
    update(state, rows, count, weights);
    std::memset(weights + count * rows, 0, (padded - count) * rows * sizeof(float));
    hide_partial_keys(state, keys, tile, stride, columns);
    pack_weights_amx(weights, rows, padded, packed_weights);
    pack_values_amx(tile, stride, padded, columns, values);
    shrink_rows(state.shrink, task.rows, acc, columns);
    for (int64_t row = 0; row < rows; row += 32) {
      auto add = row + 32 <= rows ? values_amx<2> : values_amx<1>;
      for (int64_t column = 0; column < columns; column += 32)
        add(packed_weights + row * padded * 2, values + column * kStep, padded, acc + row * columns + column, columns);
    }
  }
}

#endif

// One row of out and lse from its `count` partial results, in order. Those of acc are acc_step apart, the others step.
template <typename Q>
void merge(const float* acc, const float* largest, const float* total, int64_t count, int64_t acc_step, int64_t step,
           int64_t latent, Q* out, float* lse) {
  float* weights = static_cast<float*>(scratch(count * sizeof(float), 0));
  f32v most = splat(-kInfinity), sum = {};
  for (int64_t i = 0; i < count; ++i) most = max(most, splat(largest[i * step]));
  most = select(most == -kInfinity, f32v{}, most);
  for (int64_t i = 0; i < count; ++i) {
    f32v weight = exp2(splat(largest[i * step]) - most);
    weights[i] = weight[0];
    sum += weight * total[i * step];
  }
  for (int64_t column = 0; column < latent; column += kLanes) {
    f32v x = {};
    for (int64_t i = 0; i < count; ++i) x += load(acc + i * acc_step + column) * weights[i];
    store_lanes(out + column, select(sum == 0.0f, f32v{}, x / sum), latent - column);
  }
  *lse = (most[0] + __builtin_log2f(sum[0])) * kLn2;
}

template <typename Q, typename Cache>
void attend_on_path(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
#ifdef JAXKERN_LEVEL_avx512
  if constexpr (std::is_same_v<Q, bf16> && (std::is_same_v<Cache, bf16> || std::is_same_v<Cache, e4m3>)) {
    if (plan.path == Path::pairs) return attend_pairs<Cache>(p, plan, task, state, acc);
    if (plan.path == Path::amx) return attend_amx(p, plan, task, state, acc);
  }
#endif
  attend<Q, Cache>(p, plan, task, state, acc);
}

template <typename Q, typename Cache>
void run_task(const MlaDecodeParams& p, const Plan& plan, const Wave& wave, int64_t request, int64_t split,
              int64_t block) {
  Splits splits = splits_of(p, request);
  if (split >= splits.count) return;
  int64_t begin = block * plan.block_rows, rows = at_most(plan.rows - begin, plan.block_rows);
  int64_t first = split * splits.tokens, last = at_most(first + splits.tokens, splits.length);
  Task task = {request, splits.length, begin, rows, first, last};
  Softmax state;
  if (splits.count > 1) {
    int64_t slot = ((request - wave.begin) * wave.max_splits + split) * wave.rows + begin;
    attend_on_path<Q, Cache>(p, plan, task, state, wave.acc + slot * plan.acc_stride);
    std::memcpy(wave.largest + slot, state.largest, rows * sizeof(float));
    std::memcpy(wave.total + slot, state.total, rows * sizeof(float));
    return;
  }
  float* acc = static_cast<float*>(scratch(round_up(rows, kLanes) * plan.acc_stride * sizeof(float), 2));
  attend_on_path<Q, Cache>(p, plan, task, state, acc);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t to = request * plan.rows + begin + row;
    merge(acc + row * plan.acc_stride, state.largest + row, state.total + row, 1, 0, 0, p.latent,
          static_cast<Q*>(p.out) + to * p.latent, p.lse + to);
  }
}

template <typename Q>
void merge_rows(const MlaDecodeParams& p, const Plan& plan, const Wave& wave, int64_t request, int64_t block) {
  int64_t splits = splits_of(p, request).count, begin = block * plan.block_rows;
  if (splits == 1) return;
  for (int64_t row = begin; row < at_most(begin + plan.block_rows, plan.rows); ++row) {
    int64_t from = (request - wave.begin) * wave.max_splits * wave.rows + row, to = request * plan.rows + row;
    merge(wave.acc + from * plan.acc_stride, wave.largest + from, wave.total + from, splits,
          wave.rows * plan.acc_stride, wave.rows, p.latent, static_cast<Q*>(p.out) + to * p.latent, p.lse + to);
  }
}

// As many requests from `begin` on as have room for their partial results, at least one.
Wave next_wave(const MlaDecodeParams& p, const Plan& plan, int64_t begin) {
  Wave wave = {begin, begin, 1, round_up(plan.rows, kLanes), nullptr, nullptr, nullptr};
  int64_t slot_bytes = (plan.acc_stride + 2) * sizeof(float), slots = 0;
  for (; wave.end < p.batch; ++wave.end) {
    int64_t splits = at_least(wave.max_splits, splits_of(p, wave.end).count);
    int64_t needed = splits == 1 ? 0 : (wave.end + 1 - begin) * splits * wave.rows;
    if (wave.end > begin && needed * slot_bytes > kPartialBytes) break;
    wave.max_splits = splits;
    slots = needed;
  }
  if (slots == 0) return wave;
  wave.acc = static_cast<float*>(scratch(slots * slot_bytes, 3));
  wave.largest = wave.acc + slots * plan.acc_stride;
  wave.total = wave.largest + slots;
  return wave;
}

template <typename Q, typename Cache>
void run_waves(const MlaDecodeParams& p, const Plan& plan, const Threads& threads) {
  for (int64_t begin = 0; begin < p.batch;) {
    Wave wave = next_wave(p, plan, begin);
    int64_t requests = wave.end - wave.begin;
    threads.for_each(requests * wave.max_splits * plan.blocks, [&](int64_t task) {
      run_task<Q, Cache>(p, plan, wave, wave.begin + task / plan.blocks / wave.max_splits,
                         task / plan.blocks % wave.max_splits, task % plan.blocks);
    });
    if (wave.max_splits > 1)
      threads.for_each(requests * plan.blocks, [&](int64_t task) {
        merge_rows<Q>(p, plan, wave, wave.begin + task / plan.blocks, task % plan.blocks);
      });
    begin = wave.end;
  }
}

Path path_of([[maybe_unused]] const MlaDecodeParams& p) {
#ifdef JAXKERN_LEVEL_avx512
  if (p.q_type == DType::bf16 && p.cache_type == DType::bf16 && simd_level() == Level::amx) return Path::amx;
  bool pairs = p.q_type == DType::bf16 && (p.cache_type == DType::bf16 || p.cache_type == DType::e4m3);
  if (pairs && simd_level() >= Level::bf16) return Path::pairs;
#endif
  return Path::floats;
}

}  // namespace

void mla_decode(const MlaDecodeParams& p, const Threads& threads) {
  Plan plan = {};
  plan.rows = p.queries * p.heads;
  if (p.batch == 0 || plan.rows == 0) return;
  plan.path = path_of(p);
  plan.blocks = (plan.rows + kMaxRows - 1) / kMaxRows;
  plan.block_rows = round_up((plan.rows + plan.blocks - 1) / plan.blocks, kPanel);
  plan.blocks = (plan.rows + plan.block_rows - 1) / plan.block_rows;
  // An odd number of cache lines, so that the same column of many tokens spreads over the cache's sets.
  plan.key_stride = round_up(p.width, 32) + 16;
  plan.acc_stride = round_up(p.latent, 32);
  with_type(p.q_type, [&](auto q_type) {
    using Q = decltype(q_type);
    if (p.cache_type == DType::e4m3) return run_waves<Q, e4m3>(p, plan, threads);
    with_type(p.cache_type, [&](auto cache_type) { run_waves<Q, decltype(cache_type)>(p, plan, threads); });
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
