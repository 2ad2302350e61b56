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

// Four neighbouring elements, in words until they are used: nvcc takes 16-bit elements of a load apart where it
// arrives, and so waits for it before the next load.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  uint32_t word[sizeof(T)];
};

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <typename T>
DEVICE Bits<T> bits_at(const Four<T>& four, int i) {
  constexpr int bytes = sizeof(T);
  return static_cast<Bits<T>>(four.word[i * bytes / 4] >> i * bytes % 4 * 8);
}

// From element `at` on; those from `count` on, which may be negative, are zero. `vectors`: at and count are multiples
// of 4, and x is aligned for four.
template <bool vectors, typename T>
DEVICE Four<T> load_four(Global<const T> x, int64_t at, int count AND_WHERE) {
  constexpr int bytes = sizeof(T);
  Four<T> four = {};
  if constexpr (vectors) {
    if (count > 0) four = load_global<Four<T>>(x, at SIM(, where));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count)
        four.word[i * bytes / 4] |= uint32_t(load_global<Bits<T>>(x, at + i SIM(, where))) << i * bytes % 4 * 8;
  }
  return four;
}

template <bool vectors, typename T>
DEVICE void store_four(Global<T> x, int64_t at, int count, const Four<T>& four AND_WHERE) {
  if constexpr (vectors) {
    if (count > 0) store_global(x, at, four SIM(, where));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) store_global(x, at + i, bits_at(four, i) SIM(, where));
  }
}

template <typename T>
DEVICE Pack<float, 4> to_floats(const Four<T>& four) {
  Pack<float, 4> floats;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>)
      floats.item[i] = bits_float(four.word[i]);
    else
      floats.item[i] = to_float(T{bits_at(four, i)});
  }
  return floats;
}

template <typename T>
DEVICE Four<T> round_to(const Pack<float, 4>& floats AND_WHERE) {
  Four<T> four;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.word[i] = float_bits(floats.item[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) four.word[i] = to_pair(floats.item[2 * i], floats.item[2 * i + 1], T {} SIM(, where));
  }
  return four;
}

// Rounded to To; numbers that are already stay as they are, NaNs to the bit.
template <typename To, typename From>
DEVICE Four<To> convert(const Four<From>& four AND_WHERE) {
  if constexpr (std::is_same_v<From, To>)
    return four;
  else
    return round_to<To>(to_floats(four) SIM(, where));
}

}  // namespace jaxkern::cuda::kernels
