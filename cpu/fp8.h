// What the kernels that write block-scaled FP8 share: a block and its scale.
#pragma once

#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {

constexpr int64_t kBlock = 128;  // of a row, with one scale
constexpr float kFp8Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

// Calls f(column, lanes) for each register of the columns [begin, end).
template <typename F>
JAXKERN_INLINE void for_each_register(int64_t begin, int64_t end, F f) {
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) f(column, int64_t{kLanes});
  if (column < end) f(column, end - column);
}

// Magnitudes compare as integers; NaN is then the largest.
JAXKERN_INLINE u32v larger(u32v largest, f32v x) {
  u32v magnitude = bit_cast<u32v>(abs(x));
  return magnitude > largest ? magnitude : largest;
}

JAXKERN_INLINE uint32_t largest_of(u32v magnitudes) {
  uint32_t amax = 0;
  for (int i = 0; i < kLanes; ++i) amax = magnitudes[i] > amax ? magnitudes[i] : amax;
  return amax;
}

JAXKERN_INLINE float scale_of(uint32_t amax_bits, bool power_of_two) {
  if (amax_bits >= 0x7f800000u) return bit_cast<float>(0x7fc00000u);  // a NaN or an infinity in the block
  float amax = bit_cast<float>(amax_bits);
  float scale = (amax > kMinAmax ? amax : kMinAmax) / kFp8Max;
  if (!power_of_two) return scale;
  return bit_cast<float>((bit_cast<uint32_t>(scale) + 0x7fffffu) & 0x7f800000u);
}

JAXKERN_INLINE void store_scale(void* scales, DType type, int64_t index, float scale) {
  uint32_t bits = bit_cast<uint32_t>(scale);
  if (type == DType::e8m0)
    static_cast<uint8_t*>(scales)[index] = bits > 0x7f800000u ? 255 : uint8_t(bits >> 23);
  else
    static_cast<float*>(scales)[index] = scale;
}

// Quantises the columns [begin, end) of `rows` rows, `stride` elements apart, and returns their scale.
template <typename T>
JAXKERN_INLINE float quantize_block(const T* x, e4m3* values, int64_t rows, int64_t stride, int64_t begin, int64_t end,
                                    bool power_of_two) {
  u32v largest = {};
  for (int64_t row = 0; row < rows; ++row) {
    for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
      largest = larger(largest, load_lanes(x + row * stride + column, lanes));
    });
  }
  float scale = scale_of(largest_of(largest), power_of_two);
  for (int64_t row = 0; row < rows; ++row) {
    for_each_register(begin, end, [&](int64_t column, int64_t lanes) {
      int64_t at = row * stride + column;
      store_lanes(values + at, load_lanes(x + at, lanes) / scale, lanes);
    });
  }
  return scale;
}

// Calls f with a value of the storage type.
template <typename F>
JAXKERN_INLINE void with_float_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::f16) f(f16{});
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
