#include "cpu/quantize.h"

#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr float kFp8Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

// Calls f(column, lanes) for each register of the columns [begin, end).
template <typename F>
JAXKERN_INLINE void for_each_register(int64_t begin, int64_t end, F f) {
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) f(column, int64_t{kLanes});
  if (column < end) f(column, end - column);
}

float scale_of(uint32_t amax_bits, bool power_of_two) {
  if (amax_bits >= 0x7f800000u) return bit_cast<float>(0x7fc00000u);  // a NaN or an infinity in the block
  float amax = bit_cast<float>(amax_bits);
  float scale = (amax > kMinAmax ? amax : kMinAmax) / kFp8Max;
  if (!power_of_two) return scale;
  return bit_cast<float>((bit_cast<uint32_t>(scale) + 0x7fffffu) & 0x7f800000u);
}

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
  int64_t offset = rows.batch * p.m * p.k;
  const T* x = static_cast<const T*>(p.x) + offset;
  e4m3* values = reinterpret_cast<e4m3*>(p.values) + offset;
  int64_t blocks = (p.k + p.block_k - 1) / p.block_k;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t begin = block * p.block_k, end = begin + p.block_k < p.k ? begin + p.block_k : p.k;
    // Magnitudes compare as integers; NaN is then the largest.
    u32v largest = {};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
        u32v magnitude = bit_cast<u32v>(abs(load_lanes(x + row * p.k + column, lanes)));
        largest = magnitude > largest ? magnitude : largest;
      });
    }
    uint32_t amax = 0;
    for (int i = 0; i < kLanes; ++i) amax = largest[i] > amax ? largest[i] : amax;
    float scale = scale_of(amax, p.power_of_two);
    int64_t scale_index = task * blocks + block;
    if (p.scale_type == DType::e8m0) {
      uint32_t bits = bit_cast<uint32_t>(scale);
      static_cast<uint8_t*>(p.scales)[scale_index] = bits > 0x7f800000u ? 255 : uint8_t(bits >> 23);
    } else {
      static_cast<float*>(p.scales)[scale_index] = scale;
    }
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
        int64_t at = row * p.k + column;
        store_lanes(values + at, load_lanes(x + at, lanes) / scale, lanes);
      });
    }
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

template <typename F>
void with_float_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::f16) f(f16{});
}

}  // namespace

void quantize(const QuantizeParams& p, const Threads& threads) {
  int64_t tasks = p.k == 0 ? 0 : p.batch * ((p.m + p.block_m - 1) / p.block_m);
  with_float_type(p.x_type, [&](auto type) {
    threads.for_each_chunk(tasks, p.block_m * p.k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) quantize_rows<decltype(type)>(p, task);
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
