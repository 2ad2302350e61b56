// Operands as float32 in the order that the inner loops of a matrix product read: dequantised, scales folded in.
#pragma once

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kScaleBlock = 128;
constexpr int64_t kBlockK = 256;              // of k at a time, a multiple of kScaleBlock
constexpr int64_t kRowStride = kBlockK + 16;  // of packed rows: no power of two, so that rows spread over the cache
constexpr int kPanelVectors = 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;  // rows in a full panel

JAXKERN_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
JAXKERN_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
JAXKERN_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product runs; see gemm.cc.
enum class Form { dot, outer, pairs };

// One product, out = a b^T + accumulator, and its place in a chunk of them.
struct Segment {
  Operand a, b;
  const void* accumulator;  // of the result's type, or null
  void* out;                // [m, n]
  DType out_type;
  int64_t m, n, k;
  Form form;
  int64_t full_tasks, task_rows, tail_rows;  // tasks of task_rows rows of b each, then of tail_rows
  // Where the chunk's tasks and its packed a begin for this segment.
  int64_t first_task, first_packing;
  int64_t packed;  // in floats
};

constexpr int64_t kDotAheadBytes = 16384;  // of b, fetched into the second cache before they are needed

// What a dot product's row of b needs kDotAheadBytes after the block at x.
template <typename B>
JAXKERN_INLINE void prefetch_block(const B* x) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kScaleBlock; i += 64 / int64_t(sizeof(B)))
    __builtin_prefetch(x + kDotAheadBytes / int64_t(sizeof(B)) + i, 0, 2);
}

// Calls f with a value of the storage type.
template <typename F>
JAXKERN_INLINE void with_type(DType type, F f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::e4m3) f(e4m3{});
}

// The operand from stored row and column on; with scales, both at the start of a block.
JAXKERN_INLINE Operand from(Operand o, int64_t row, int64_t column) {
  o.data = static_cast<const char*>(o.data) + (row * o.stride + column) * size_of(o.type);
  int64_t scale = (o.block_rows == 1 ? row : row / kScaleBlock) * o.scale_stride + column / kScaleBlock;
  if (o.scales) o.scales = static_cast<const char*>(o.scales) + scale * size_of(o.scale_type);
  return o;
}

JAXKERN_INLINE float scale_at(const Operand& o, int64_t row, int64_t column) {
  int64_t i = (o.block_rows == 1 ? row : row / kScaleBlock) * o.scale_stride + column / kScaleBlock;
  return o.scale_type == DType::e8m0 ? to_f32(static_cast<const e8m0*>(o.scales)[i])
                                     : static_cast<const float*>(o.scales)[i];
}

// The factor of load_fast for n elements of stored row `row` from `column` on, all in one scale block: NaN for all of
// them if one is NaN, which is what a product over k makes of them in any case.
JAXKERN_INLINE float fast_scale(const Operand& o, int64_t row, int64_t column, int64_t n) {
  const e4m3* x = static_cast<const e4m3*>(o.data) + row * o.stride + column;
  if (any_nan(x, n)) return __builtin_nanf("");
  float scale = scale_at(o, row, column), fast = scale * kFastUnit;
  return fast > __FLT_MAX__ && scale <= __FLT_MAX__ ? __FLT_MAX__ : fast;  // the scale of a block near float32's end
}

template <typename T>
JAXKERN_INLINE f32v load_fast_lanes(const T* p, int64_t lanes) {
  if (lanes >= kLanes) return load_fast(p);
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, lanes * sizeof(T));
  return load_fast(buffer);
}

// A register of dequantised elements of one stored row; the columns lie in one scale block.
template <typename T>
JAXKERN_INLINE f32v dequantized(const Operand& o, int64_t row, int64_t column, int64_t lanes) {
  f32v x = load_lanes(static_cast<const T*>(o.data) + row * o.stride + column, lanes);
  if constexpr (std::is_same_v<T, e4m3>) x *= splat(scale_at(o, row, column));
  return x;
}

// Rows [row, row + rows) of k [k0, k0 + kc) as rows [rows][kRowStride]: what the inner loop broadcasts. Rows are
// written up to a multiple of kLanes.
template <typename T>
void pack_rows(const Operand& o, int64_t row, int64_t rows, int64_t k0, int64_t kc, float* to) {
  if (!o.transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = static_cast<const T*>(o.data) + (row + r) * o.stride + k0;
      // The pieces of rows are too short for the hardware to fetch the next ones ahead.
      const T* next = x + kBlockK;
      for (int64_t begin = 0; begin < kc; begin += kScaleBlock) {
        int64_t end = min(kc, begin + kScaleBlock);
        for (int64_t i = begin; i < end; i += 64 / sizeof(T)) __builtin_prefetch(next + i);
        f32v scale = {};
        if constexpr (std::is_same_v<T, e4m3>) scale = splat(fast_scale(o, row + r, k0 + begin, end - begin));
        float* row_to = to + r * kRowStride;
        auto put = [&](int64_t i, f32v v) __attribute__((always_inline)) {
          if constexpr (std::is_same_v<T, e4m3>) v *= scale;
          store(row_to + i, v);
        };
        int64_t i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
          f32v v, w;
          load_fast_pair(x + i, v, w);
          put(i, v);
          put(i + kLanes, w);
        }
        for (; i < end; i += kLanes) put(i, load_fast_lanes(x + i, end - i));
      }
    }
    return;
  }
  for (int64_t i = 0; i < kc; i += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      f32v square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        square[j] = i + j < kc ? dequantized<T>(o, k0 + i + j, row + r, rows - r) : f32v{};
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (r + j) * kRowStride + i, square[j]);
    }
  }
}

// Rows [row, row + rows) of k [k0, k0 + kc) as a panel [kc][width]: what the inner loop loads as registers. `width` is
// kLanes or kPanel; rows that are not there become zero.
template <typename T>
void pack_panel(const Operand& o, int64_t row, int64_t rows, int64_t width, int64_t k0, int64_t kc, float* to) {
  for (int64_t v = 0; v < width; v += kLanes) {
    int64_t here = min(kLanes, rows - v);
    if (o.transposed) {
      for (int64_t i = 0; i < kc; ++i)
        store(to + i * width + v, here > 0 ? dequantized<T>(o, k0 + i, row + v, here) : f32v{});
      continue;
    }
    for (int64_t i = 0; i < kc; i += kLanes) {
      f32v square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = j < here ? dequantized<T>(o, row + v + j, k0 + i, kc - i) : f32v{};
      transpose(square);
      int64_t count = min(kLanes, kc - i);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        if (j < count) store(to + (i + j) * width + v, square[j]);
    }
  }
}

}  // namespace
}  // namespace jaxkern::cpu::JAXKERN_LEVEL
