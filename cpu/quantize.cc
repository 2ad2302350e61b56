#include "cpu/quantize.h"

#include <cstring>

#include "cpu/fp8.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

struct Rows {
  int64_t batch, begin, end;
};

// The rows of task i, where each task is one row of blocks.
Rows rows_of(int64_t task, int64_t m, int64_t block_m) {
  int64_t per_batch = (m + block_m - 1) / block_m;
  int64_t begin = task % per_batch * block_m;
  return {task / per_batch, begin, begin + block_m < m ? begin + block_m : m};
}

template <typename T>
void quantize_rows(const QuantizeParams& p, int64_t task) {
  Rows rows = rows_of(task, p.m, p.block_m);
  int64_t offset = (rows.batch * p.m + rows.begin) * p.k;
  const T* x = static_cast<const T*>(p.x) + offset;
  e4m3* values = reinterpret_cast<e4m3*>(p.values) + offset;
  int64_t blocks = (p.k + p.block_k - 1) / p.block_k;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t begin = block * p.block_k, end = begin + p.block_k < p.k ? begin + p.block_k : p.k;
    float scale = quantize_block(x, values, rows.end - rows.begin, p.k, begin, end, p.power_of_two);
    store_scale(p.scales, p.scale_type, task * blocks + block, scale);
  }
}

template <typename T>
void dequantize_rows(const DequantizeParams& p, int64_t task) {
  Rows rows = rows_of(task, p.m, p.block_m);
  int64_t offset = rows.batch * p.m * p.k;
  const e4m3* values = reinterpret_cast<const e4m3*>(p.values) + offset;
  T* x = static_cast<T*>(p.x) + offset;
  int64_t blocks = (p.k + p.block_k - 1) / p.block_k;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t begin = block * p.block_k, end = begin + p.block_k < p.k ? begin + p.block_k : p.k;
      int64_t scale_index = task * blocks + block;
      float scale = p.scale_type == DType::e8m0 ? to_f32(static_cast<const e8m0*>(p.scales)[scale_index])
                                                : static_cast<const float*>(p.scales)[scale_index];
      for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
        int64_t at = row * p.k + column;
        store_lanes(x + at, load_lanes(values + at, lanes) * scale, lanes);
      });
    }
  }
}

// ---- along tokens ----

constexpr int64_t kStripColumns = 256;  // of x in a task; their 128 tokens as float32 stay in the second-level cache
constexpr int64_t kTokensAhead = 4;
constexpr int64_t kStripStride = kStripColumns + 16;  // no power of two, so that the tokens spread over the cache

// The tokens of x that output block `block` holds: [begin, begin + count), count 0 for a block of no group.
struct Tokens {
  int64_t begin, count;
};

Tokens tokens_of(const QuantizeAlongTokensParams& p, int64_t block) {
  int64_t begin = 0, first_block = 0;
  for (int64_t group = 0; group < p.groups; ++group) {
    int64_t size = p.group_sizes[group] > 0 ? p.group_sizes[group] : 0;
    size = size < p.t - begin ? size : p.t - begin;
    int64_t blocks = (size + kBlock - 1) / kBlock, here = (block - first_block) * kBlock;
    if (block < first_block + blocks) return {begin + here, size - here < kBlock ? size - here : kBlock};
    first_block += blocks;
    int64_t next = (begin + size + p.alignment - 1) / p.alignment * p.alignment;
    begin = next < p.t ? next : p.t;
  }
  return {0, 0};
}

// The columns [column, end) of x, of one output block.
template <typename T>
void quantize_strip(const QuantizeAlongTokensParams& p, int64_t block, Tokens tokens, int64_t column, int64_t end) {
  int64_t blocks = p.tokens / kBlock;
  if (tokens.count == 0) {
    for (int64_t c = column; c < end; ++c) {
      std::memset(p.values + c * p.tokens + block * kBlock, 0, kBlock);
      store_scale(p.scales, p.scale_type, c * blocks + block, scale_of(0, p.power_of_two));
    }
    return;
  }
  float* tile = static_cast<float*>(scratch(kBlock * kStripStride * sizeof(float)));
  u32v largest[kStripColumns / kLanes] = {};
  for (int64_t token = 0; token < tokens.count; ++token) {
    const T* x = static_cast<const T*>(p.x) + (tokens.begin + token) * p.m;
    for_each_register(column, end, [&](int64_t c, int64_t lanes) {
      __builtin_prefetch(x + c + kTokensAhead * p.m);  // a strip's rows are far apart and short: nothing else does
      f32v v = load_lanes(x + c, lanes);
      store(tile + token * kStripStride + (c - column), v);
      u32v& of_columns = largest[(c - column) / kLanes];
      of_columns = larger(of_columns, v);
    });
  }
  for (int64_t c = column; c < end; c += kLanes) {
    int64_t lanes = end - c < kLanes ? end - c : kLanes;
    f32v scales;
    u32v amax = largest[(c - column) / kLanes];
    for (int i = 0; i < kLanes; ++i) scales[i] = scale_of(amax[i], p.power_of_two);
    for (int64_t i = 0; i < lanes; ++i) store_scale(p.scales, p.scale_type, (c + i) * blocks + block, scales[i]);
    for (int64_t token = 0; token < kBlock; token += kLanes) {
      const float* from = tile + token * kStripStride + (c - column);
      f32v square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        square[j] = (token + j < tokens.count ? load(from + j * kStripStride) : f32v{}) / scales;
      transpose(square);
      e4m3* to = reinterpret_cast<e4m3*>(p.values) + c * p.tokens + block * kBlock + token;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        if (j < lanes) store(to + j * p.tokens, square[j]);
    }
  }
}

// ---- swiglu ----

// x / (1 + exp(-x)), without an exp that could overflow.
JAXKERN_INLINE f32v silu(f32v x) {
  constexpr float kLog2E = 1.44269504f;
  f32v decay = exp2(abs(x) * -kLog2E);
  return x * ((x < 0.0f ? decay : splat(1.0f)) / (1.0f + decay));
}

template <typename T>
void swiglu_quantize_row(const SwigluQuantizeParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.gate) + row * p.stride;
  const T* up = static_cast<const T*>(p.up) + row * p.stride;
  e4m3* values = reinterpret_cast<e4m3*>(p.values) + row * p.width;
  int64_t blocks = (p.width + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t begin = block * kBlock, end = begin + kBlock < p.width ? begin + kBlock : p.width;
    float products[kBlock];
    u32v largest = {};
    for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
      f32v y = silu(load_lanes(gate + column, lanes)) * load_lanes(up + column, lanes);
      if (p.weights) y *= p.weights[row];
      store(products + (column - begin), y);
      largest = larger(largest, y);
    });
    float scale = scale_of(largest_of(largest), p.power_of_two);
    store_scale(p.scales, p.scale_type, row * blocks + block, scale);
    for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
      store_lanes(values + column, load(products + (column - begin)) / scale, lanes);
    });
  }
}

}  // namespace

void quantize(const QuantizeParams& p, const Threads& threads) {
  prefer_large_pages(p.values, p.batch * p.m * p.k);
  int64_t tasks = p.k == 0 ? 0 : p.batch * ((p.m + p.block_m - 1) / p.block_m);
  with_float_type(p.x_type, [&](auto type) {
    threads.for_each_chunk(tasks, p.block_m * p.k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) quantize_rows<decltype(type)>(p, task);
    });
  });
}

void quantize_along_tokens(const QuantizeAlongTokensParams& p, const Threads& threads) {
  prefer_large_pages(p.values, p.m * p.tokens);
  int64_t strips = (p.m + kStripColumns - 1) / kStripColumns;
  with_float_type(p.x_type, [&](auto type) {
    threads.for_each(p.tokens / kBlock * strips, [&](int64_t task) {
      int64_t block = task / strips, column = task % strips * kStripColumns;
      int64_t end = column + kStripColumns < p.m ? column + kStripColumns : p.m;
      quantize_strip<decltype(type)>(p, block, tokens_of(p, block), column, end);
    });
  });
}

void swiglu_quantize(const SwigluQuantizeParams& p, const Threads& threads) {
  int64_t rows = p.batch * p.m;
  prefer_large_pages(p.values, rows * p.width);
  with_float_type(p.type, [&](auto type) {
    threads.for_each_chunk(p.width == 0 ? 0 : rows, p.width * 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        if (!p.num_rows || row % p.m < p.num_rows[row / p.m]) swiglu_quantize_row<decltype(type)>(p, row);
    });
  });
}

void dequantize(const DequantizeParams& p, const Threads& threads) {
  prefer_large_pages(p.x, p.batch * p.m * p.k * size_of(p.x_type));
  int64_t tasks = p.k == 0 ? 0 : p.batch * ((p.m + p.block_m - 1) / p.block_m);
  with_float_type(p.x_type, [&](auto type) {
    threads.for_each_chunk(tasks, p.block_m * p.k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) dequantize_rows<decltype(type)>(p, task);
    });
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
