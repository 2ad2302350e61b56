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
// exp2 serves.
#include "cpu/mla.h"

#include <cstring>

#include "cpu/simd.h"
#ifdef JAXKERN_LEVEL_avx512
#include "cpu/amx.h"
#endif

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kTile = 96;      // tokens; a multiple of the tokens of every register block
constexpr int64_t kMaxRows = 128;  // a multiple of the rows of a panel
constexpr int64_t kSplitTokens = 512;
constexpr int64_t kMaxSplits = 32;  // bounds the memory for partial results of a long request
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();

// Register blocks: as many accumulators as the registers allow.
#if defined(JAXKERN_LEVEL_avx512)
constexpr int kPanelTokens = 12, kHalfPanelTokens = 24, kValueRows = 8, kValueRegisters = 3;
#else
constexpr int kPanelTokens = 6, kHalfPanelTokens = 12, kValueRows = 4, kValueRegisters = 2;
#endif
constexpr int kPanel = 2 * kLanes;  // rows whose queries lie together: [width][kPanel]; the last may be half as wide

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }
int64_t at_least(int64_t x, int64_t limit) { return x > limit ? x : limit; }

// What is the same for every task.
struct Plan {
  int64_t rows, blocks, block_rows;  // of a request; a block is the rows of one task
  int64_t key_stride, acc_stride;    // in floats
  int64_t max_splits;                // of any request
  bool amx;
  float *acc, *largest, *total;  // partial results [batch][split][row], where max_splits > 1
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
  type == DType::f32 ? f(float{}) : f(bf16{});
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

// The rows of the tokens [begin, begin + count), each filled up with zeros to `stride`; zeros for those that are no
// rows of the cache, and up to `padded` tokens. Returns whether each of `count` is one, and for each in `exists`.
template <typename T, typename To>
bool load_tile(const MlaDecodeParams& p, int64_t request, int64_t begin, int64_t count, int64_t padded, int64_t stride,
               To* tile, bool* exists) {
  const int32_t* table = p.block_table + request * p.table_pages;
  bool all_exist = true;
  for (int64_t i = 0; i < padded; ++i) {
    int64_t token = begin + i, page = i < count ? table[token / p.page] : -1;
    exists[i] = page >= 0 && page < p.pages;
    all_exist = all_exist && (exists[i] || i >= count);
    int64_t width = exists[i] ? p.width : 0;
    To* to = tile + i * stride;
    if (exists[i]) copy(static_cast<const T*>(p.cache) + (page * p.page + token % p.page) * width, to, width);
    std::memset(to + width, 0, (stride - width) * sizeof(To));
  }
  return all_exist;
}

// logits [kTokens][stride] of kRegisters * kLanes rows.
template <int kTokens, int kRegisters>
void logits_block(const float* tile, int64_t key_stride, const float* panel, int64_t width, float* logits,
                  int64_t stride) {
  f32v acc[kTokens][kRegisters] = {};
  for (int64_t k = 0; k < width; ++k) {
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
    for (int j = 0; j < kRegisters; ++j) store(logits + i * stride + j * kLanes, acc[i][j]);
}

void logits_of(const float* tile, int64_t tokens, int64_t key_stride, const float* panels, int64_t rows, int64_t width,
               float* logits) {
  int64_t row = 0;
  for (; row + kPanel <= rows; row += kPanel)
    for (int64_t i = 0; i < tokens; i += kPanelTokens)
      logits_block<kPanelTokens, 2>(tile + i * key_stride, key_stride, panels + row * width, width,
                                    logits + i * rows + row, rows);
  if (row < rows)
    for (int64_t i = 0; i < tokens; i += kHalfPanelTokens)
      logits_block<kHalfPanelTokens, 1>(tile + i * key_stride, key_stride, panels + row * width, width,
                                        logits + i * rows + row, rows);
}

// One row in each lane.
struct Softmax {
  alignas(64) float largest[kMaxRows], total[kMaxRows], shrink[kMaxRows];
  alignas(64) int32_t limits[kMaxRows];  // the row's keys are the tokens below
};

// Products become logits: times scale, and -inf where the token is no key of the row.
void mask(const Softmax& state, int64_t rows, int64_t begin, int64_t count, const bool* exists, float scale,
          float* logits) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t token = exists[i] ? int32_t(begin + i) : INT32_MAX;
    for (int64_t row = 0; row < rows; row += kLanes) {
      float* at = logits + i * rows + row;
      store(at, select(load_raw<i32v>(state.limits + row) > token, load(at) * scale, splat(-kInfinity)));
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
  block.template operator()<kValueRows / 2>();
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
void hide_partial_keys(const Softmax& state, int64_t token, int64_t count, T* tile, int64_t stride, int64_t columns) {
  for (int64_t i = at_least(state.limits[0] - token, 0); i < count; ++i) keep_finite(tile + i * stride, columns);
}

template <typename Q, typename Cache>
void attend(const MlaDecodeParams& p, const Plan& plan, const Task& task, Softmax& state, float* acc) {
  int64_t last = start(p, plan, task, state, acc), rows = round_up(task.rows, kLanes), stride = plan.key_stride;
  if (task.first >= last) return;
  float* panels = static_cast<float*>(scratch(rows * (p.width + kTile) * sizeof(float), 0));
  float* weights = panels + rows * p.width;
  float* tile = static_cast<float*>(scratch(kTile * stride * sizeof(float), 1));
  bool exists[kTile];
  const Q* q = static_cast<const Q*>(p.q) + (task.request * plan.rows + task.begin) * p.width;
  pack_queries(q, task.rows, p.width, panels);
  for (int64_t token = task.first; token < last; token += kTile) {
    int64_t count = at_most(last - token, kTile), padded = round_up(count, kHalfPanelTokens);
    load_tile<Cache>(p, task.request, token, count, padded, stride, tile, exists);
    logits_of(tile, padded, stride, panels, rows, p.width, weights);
    mask(state, rows, token, count, exists, p.softmax_scale * kLog2E, weights);
    update(state, rows, count, weights);
    hide_partial_keys(state, token, count, tile, stride, plan.acc_stride);
    add_values(weights, rows, task.rows, tile, stride, count, state.shrink, plan.acc_stride, acc, plan.acc_stride);
  }
}

#ifdef JAXKERN_LEVEL_avx512

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
  bool exists[kAmxTile];
  const bf16* q = static_cast<const bf16*>(p.q) + (task.request * plan.rows + task.begin) * p.width;
  pack_queries_amx(q, task.rows, p.width, queries);
  Tiles tiles;
  for (int64_t token = task.first; token < last; token += kAmxTile) {
    int64_t count = at_most(last - token, kAmxTile), padded = round_up(count, kStep);
    load_tile<bf16>(p, task.request, token, count, padded, stride, tile, exists);
    for (int64_t i = 0; i < padded; i += 32) {
      for (int64_t row = 0; row < rows; row += 32) {
        auto products = row + 32 <= rows ? products_amx<2> : products_amx<1>;
        products(tile + i * stride, stride, queries + row * steps * kStep, steps, weights + i * rows + row, rows);
      }
    }
    mask(state, rows, token, count, exists, p.softmax_scale * kLog2E, weights);
    update(state, rows, count, weights);
    std::memset(weights + count * rows, 0, (padded - count) * rows * sizeof(float));
    hide_partial_keys(state, token, count, tile, stride, columns);
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
void run_task(const MlaDecodeParams& p, const Plan& plan, int64_t request, int64_t split, int64_t block) {
  Splits splits = splits_of(p, request);
  if (split >= splits.count) return;
  int64_t begin = block * plan.block_rows, rows = at_most(plan.rows - begin, plan.block_rows);
  int64_t first = split * splits.tokens, last = at_most(first + splits.tokens, splits.length);
  Task task = {request, splits.length, begin, rows, first, last};
  float* acc = static_cast<float*>(scratch(round_up(rows, kLanes) * plan.acc_stride * sizeof(float), 2));
  Softmax state;
#ifdef JAXKERN_LEVEL_avx512
  if (plan.amx)
    attend_amx(p, plan, task, state, acc);
  else
#endif
    attend<Q, Cache>(p, plan, task, state, acc);
  if (splits.count > 1) {
    int64_t slot = (request * plan.max_splits + split) * plan.rows + begin;
    std::memcpy(plan.acc + slot * plan.acc_stride, acc, rows * plan.acc_stride * sizeof(float));
    std::memcpy(plan.largest + slot, state.largest, rows * sizeof(float));
    std::memcpy(plan.total + slot, state.total, rows * sizeof(float));
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    int64_t to = request * plan.rows + begin + row;
    merge(acc + row * plan.acc_stride, state.largest + row, state.total + row, 1, 0, 0, p.latent,
          static_cast<Q*>(p.out) + to * p.latent, p.lse + to);
  }
}

template <typename Q>
void merge_rows(const MlaDecodeParams& p, const Plan& plan, int64_t request, int64_t block) {
  int64_t splits = splits_of(p, request).count, begin = block * plan.block_rows;
  if (splits == 1) return;
  for (int64_t row = begin; row < at_most(begin + plan.block_rows, plan.rows); ++row) {
    int64_t from = request * plan.max_splits * plan.rows + row, to = request * plan.rows + row;
    merge(plan.acc + from * plan.acc_stride, plan.largest + from, plan.total + from, splits,
          plan.rows * plan.acc_stride, plan.rows, p.latent, static_cast<Q*>(p.out) + to * p.latent, p.lse + to);
  }
}

}  // namespace

void mla_decode(const MlaDecodeParams& p, const Threads& threads) {
  Plan plan = {};
  plan.rows = p.queries * p.heads;
  if (p.batch == 0 || plan.rows == 0) return;
  plan.blocks = (plan.rows + kMaxRows - 1) / kMaxRows;
  plan.block_rows = round_up((plan.rows + plan.blocks - 1) / plan.blocks, kPanel);
  plan.blocks = (plan.rows + plan.block_rows - 1) / plan.block_rows;
  // An odd number of cache lines, so that the same column of many tokens spreads over the cache's sets.
  plan.key_stride = round_up(p.width, 32) + 16;
  plan.acc_stride = round_up(p.latent, 32);
#ifdef JAXKERN_LEVEL_avx512
  plan.amx = p.q_type == DType::bf16 && p.cache_type == DType::bf16 && simd_level() == Level::amx;
#endif
  plan.max_splits = 1;
  for (int64_t i = 0; i < p.batch; ++i) plan.max_splits = at_least(plan.max_splits, splits_of(p, i).count);
  if (plan.max_splits > 1) {
    int64_t slots = p.batch * plan.max_splits * plan.rows;
    plan.acc = static_cast<float*>(scratch(slots * (plan.acc_stride + 2) * sizeof(float), 3));
    plan.largest = plan.acc + slots * plan.acc_stride;
    plan.total = plan.largest + slots;
  }
  with_type(p.q_type, [&](auto q_type) {
    using Q = decltype(q_type);
    with_type(p.cache_type, [&](auto cache_type) {
      threads.for_each(p.batch * plan.max_splits * plan.blocks, [&](int64_t task) {
        run_task<Q, decltype(cache_type)>(p, plan, task / plan.blocks / plan.max_splits,
                                          task / plan.blocks % plan.max_splits, task % plan.blocks);
      });
    });
    if (plan.max_splits > 1)
      threads.for_each(p.batch * plan.blocks,
                       [&](int64_t task) { merge_rows<Q>(p, plan, task / plan.blocks, task % plan.blocks); });
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
