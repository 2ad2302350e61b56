// Types of elements, and arrays of any float type, four neighbouring elements at once.
#pragma once

#include <type_traits>

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::kernels {

// The format of a cache's rows that jaxkern/kv_cache.py describes, in place of a number's.
struct Packed {};

template <typename T>
constexpr const char* format_name = "float";
template <>
inline constexpr const char* format_name<bfloat16> = "bfloat16";
template <>
inline constexpr const char* format_name<float16> = "float16";
template <>
inline constexpr const char* format_name<Packed> = "Packed";

// f of a number of that type.
template <typename F>
Error with_type(Float type, F f) {
  switch (type) {
    case Float::float32:
      return f(float{});
    case Float::bfloat16:
      return f(bfloat16{});
    default:
      return f(float16{});
  }
}

// Two of a 16-bit type, low in the lower half.
DEVICE uint32_t to_pair(float low, float high, bfloat16 AND_WHERE) { return cvt_bf16x2(low, high SIM(, where)); }
DEVICE uint32_t to_pair(float low, float high, float16 AND_WHERE) { return cvt_f16x2(low, high SIM(, where)); }

// From element `at` on; those from `count` on, which may be negative, are zero. `vectors`: at and count are multiples
// of 4, and x is aligned for four.
template <typename T>
DEVICE Pack<T, 4> load_four(Global<const T> x, int64_t at, int count, bool vectors AND_WHERE) {
  Pack<T, 4> four = {};
  if (vectors) {
    if (count > 0) four = load_global<Pack<T, 4>>(x, at SIM(, where));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) four.item[i] = load_global<T>(x, at + i SIM(, where));
  }
  return four;
}

template <typename T>
DEVICE void store_four(Global<T> x, int64_t at, int count, const Pack<T, 4>& four, bool vectors AND_WHERE) {
  if (vectors) {
    if (count > 0) store_global(x, at, four SIM(, where));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) store_global(x, at + i, four.item[i] SIM(, where));
  }
}

// Rounded to To; numbers that are already stay as they are, NaNs to the bit.
template <typename To, typename From>
DEVICE Pack<To, 4> convert(const Pack<From, 4>& four AND_WHERE) {
  if constexpr (std::is_same_v<From, To>) {
    return four;
  } else if constexpr (std::is_same_v<To, float>) {
    return {to_float(four.item[0]), to_float(four.item[1]), to_float(four.item[2]), to_float(four.item[3])};
  } else {
    Pack<To, 4> result;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t pair = to_pair(to_float(four.item[i]), to_float(four.item[i + 1]), To {} SIM(, where));
      result.item[i] = {static_cast<uint16_t>(pair)};
      result.item[i + 1] = {static_cast<uint16_t>(pair >> 16)};
    }
    return result;
  }
}

}  // namespace jaxkern::cuda::kernels
