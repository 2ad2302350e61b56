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

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kTile = 96;     // tokens; a multiple of the tokens of every register block
constexpr int64_t kMaxRows = 64;  // a multiple of the rows of a panel
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
  float *acc, *largest, *total;      // partial results [batch][split][row], where max_splits > 1
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

template <typename T>
JAXKERN_INLINE f32v load_lanes(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_first(p, lanes);
}

template <typename T>
JAXKERN_INLINE void store_lanes(T* p, f32v x, int64_t lanes) {
  lanes >= kLanes ? store(p, x) : store_first(p, x, lanes);
}

// queries [row][width] -> panels of rows [panel][width][kPanel], times scale; rows that do not exist are zero.
template <typename T>
void pack_queries(const T* q, int64_t rows, int64_t width, float scale, float* panels) {
  int64_t padded = round_up(rows, kLanes);
  for (int64_t row = 0; row < padded; row += kLanes) {
    int64_t panel = row / kPanel * kPanel, panel_rows = at_most(padded - panel, kPanel);
    float* to = panels + panel * width + (row - panel);
    for (int64_t k = 0; k < width; k += kLanes) {
      f32v x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = f32v{};
        if (row + i < rows) x[i] = load_lanes(q + (row + i) * width + k, width - k) * scale;
      }
      transpose(x);
      for (int i = 0; i < at_most(kLanes, width - k); ++i) store(to + (k + i) * panel_rows, x[i]);
    }
  }
}

// The tokens [begin, begin + count) as float32; exists[i] says whether token i is a row of the cache. Rows of those
// that are not, and those up to a multiple of kHalfPanelTokens, are zero.
template <typename T>
void load_tile(const MlaDecodeParams& p, int64_t request, int64_t begin, int64_t count, int64_t stride, float* tile,
               bool* exists) {
  const int32_t* table = p.block_table + request * p.table_pages;
  for (int64_t i = 0; i < round_up(count, kHalfPanelTokens); ++i) {
    int64_t token = begin + i, page = i < count ? table[token / p.page] : -1;
    float* to = tile + i * stride;
    exists[i] = page >= 0 && page < p.pages;
    if (!exists[i]) {
      std::memset(to, 0, stride * sizeof(float));
      continue;
    }
    const T* from = static_cast<const T*>(p.cache) + (page * p.page + token % p.page) * p.width;
    int64_t k = 0;
    for (; k + kLanes <= p.width; k += kLanes) store(to + k, load(from + k));
    if (k < p.width) store(to + k, load_first(from + k, p.width - k));
  }
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

// Logits of tokens that are no key of a row become -inf there.
void mask(const Softmax& state, int64_t rows, int64_t begin, int64_t count, const bool* exists, float* logits) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t token = exists[i] ? int32_t(begin + i) : INT32_MAX;
    for (int64_t row = 0; row < rows; row += kLanes) {
      float* at = logits + i * rows + row;
      store(at, select(load_raw<i32v>(state.limits + row) > token, load(at), splat(-kInfinity)));
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

// Replaces infinities and NaNs by 0.
void keep_finite(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, select(abs(load(x + i)) < kInfinity, load(x + i), f32v{}));
}

// Rows [begin, begin + rows) of a request over the tokens [first, last): sets acc, state.largest and state.total.
template <typename Q, typename Cache>
void attend(const MlaDecodeParams& p, const Plan& plan, int64_t request, int64_t length, int64_t begin, int64_t rows,
            int64_t first, int64_t last, Softmax& state, float* acc) {
  int64_t padded = round_up(rows, kLanes);
  for (int64_t row = 0; row < padded; ++row) {
    int64_t query = (begin + at_most(row, rows - 1)) / p.heads;
    state.limits[row] = int32_t(p.causal ? length - (p.queries - 1 - query) : length);
    state.largest[row] = -kInfinity;
    state.total[row] = 0;
  }
  std::memset(acc, 0, rows * plan.acc_stride * sizeof(float));
  int64_t everyone = state.limits[0];  // the tokens below are keys of all rows
  last = at_most(last, state.limits[rows - 1]);
  if (first >= last) return;

  float* panels = static_cast<float*>(scratch((padded * p.width + kTile * padded) * sizeof(float), 0));
  float* weights = panels + padded * p.width;
  float* tile = static_cast<float*>(scratch(kTile * plan.key_stride * sizeof(float), 1));
  const Q* q = static_cast<const Q*>(p.q) + (request * plan.rows + begin) * p.width;
  pack_queries(q, rows, p.width, p.softmax_scale * kLog2E, panels);
  for (int64_t token = first; token < last; token += kTile) {
    int64_t count = at_most(last - token, kTile);
    bool exists[kTile], all_exist = true;
    load_tile<Cache>(p, request, token, count, plan.key_stride, tile, exists);
    logits_of(tile, round_up(count, kHalfPanelTokens), plan.key_stride, panels, padded, p.width, weights);
    for (int64_t i = 0; i < count; ++i) all_exist = all_exist && exists[i];
    if (!all_exist || token + count > everyone) mask(state, padded, token, count, exists, weights);
    update(state, padded, count, weights);
    // A key of some rows only must not reach the others through 0 * NaN; theirs it reaches through its logit.
    for (int64_t i = at_least(everyone - token, 0); i < count; ++i)
      keep_finite(tile + i * plan.key_stride, plan.acc_stride);
    add_values(weights, padded, rows, tile, plan.key_stride, count, state.shrink, plan.acc_stride, acc,
               plan.acc_stride);
  }
}

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
  Softmax state;
  if (splits.count > 1) {
    int64_t slot = (request * plan.max_splits + split) * plan.rows + begin;
    attend<Q, Cache>(p, plan, request, splits.length, begin, rows, first, last, state,
                     plan.acc + slot * plan.acc_stride);
    std::memcpy(plan.largest + slot, state.largest, rows * sizeof(float));
    std::memcpy(plan.total + slot, state.total, rows * sizeof(float));
    return;
  }
  float* acc = static_cast<float*>(scratch(rows * plan.acc_stride * sizeof(float), 2));
  attend<Q, Cache>(p, plan, request, splits.length, begin, rows, first, last, state, acc);
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
  plan.key_stride = round_up(p.width, 16) / 16 % 2 ? round_up(p.width, 16) : round_up(p.width, 16) + 16;
  plan.acc_stride = round_up(p.latent, 16);
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
