// One SIMD register of float32 and its conversions, for the level that this translation unit is compiled for.
//
// The vectors are the compiler's own (GCC and Clang vector extensions), so +, -, *, / and comparisons are operators and
// a * b + c is one fma where the level has it. Everything is forced inline into namespace jaxkern::cpu::<level>, so
// that code of one level can never be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/types.h"

#ifdef JAXKERN_LEVEL_avx2
#include <immintrin.h>
#endif
#ifdef JAXKERN_LEVEL_avx512
#include <immintrin.h>
#endif

#define JAXKERN_INLINE inline __attribute__((always_inline))

namespace jaxkern::cpu::JAXKERN_LEVEL {

#if defined(JAXKERN_LEVEL_avx512)
constexpr int kLanes = 16;
#elif defined(JAXKERN_LEVEL_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(kLanes * 4)));
typedef int32_t i32v __attribute__((vector_size(kLanes * 4)));
typedef uint32_t u32v __attribute__((vector_size(kLanes * 4)));
typedef uint16_t u16v __attribute__((vector_size(kLanes * 2)));
typedef uint8_t u8v __attribute__((vector_size(kLanes)));

template <typename To, typename From>
JAXKERN_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename V>
JAXKERN_INLINE V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V>
JAXKERN_INLINE void store_raw(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

JAXKERN_INLINE f32v splat(float x) { return x - f32v{}; }
JAXKERN_INLINE u32v splat(uint32_t x) { return x - u32v{}; }
JAXKERN_INLINE f32v select(i32v mask, f32v a, f32v b) { return mask ? a : b; }
JAXKERN_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
JAXKERN_INLINE f32v abs(f32v x) { return bit_cast<f32v>(bit_cast<u32v>(x) & splat(0x7fffffffu)); }

// 2^x for x < 128, within 2 ulp; 0 below 2^-126, and NaN for NaN.
JAXKERN_INLINE f32v exp2(f32v x) {
  f32v shifted = x + 0x1.8p23f;  // x rounded to an integer is in its low bits
  f32v rest = x - (shifted - 0x1.8p23f);
  f32v scale = bit_cast<f32v>((bit_cast<u32v>(shifted) << 23) + (127u << 23));
  f32v y = splat(1.5252734e-5f);  // ln(2)^n / n!
  y = y * rest + 1.5403530e-4f;
  y = y * rest + 1.3333558e-3f;
  y = y * rest + 9.6181291e-3f;
  y = y * rest + 5.5504109e-2f;
  y = y * rest + 2.4022651e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.0f;
  return x < -126.0f ? f32v{} : y * scale;
}

// ---- scalar conversions; the vector ones below agree with them to the bit ----

JAXKERN_INLINE float to_f32(float x) { return x; }
JAXKERN_INLINE float to_f32(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

JAXKERN_INLINE float to_f32(e4m3 x) {
  uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7f) return bit_cast<float>(0x7fc00000u | uint32_t(x.bits & 0x80) << 24);
  float value = magnitude < 8 ? float(magnitude) * 0x1p-9f : bit_cast<float>((magnitude << 20) + (120u << 23));
  return x.bits & 0x80 ? -value : value;
}

JAXKERN_INLINE float to_f32(f16 x) {
  uint32_t magnitude = x.bits & 0x7fffu;
  float value = magnitude < 0x400    ? float(magnitude) * 0x1p-24f
                : magnitude < 0x7c00 ? bit_cast<float>((magnitude << 13) + (112u << 23))
                                     : bit_cast<float>((magnitude << 13) | 0x7f800000u);
  return x.bits & 0x8000 ? -value : value;
}

// 2^-127 is a float32 denormal, which a thread may flush; it is given as its bits.
JAXKERN_INLINE float to_f32(e8m0 x) {
  return bit_cast<float>(x.bits == 0 ? 0x00400000u : x.bits == 255 ? 0x7fc00000u : uint32_t{x.bits} << 23);
}

// ---- a register of float32 from any storage type ----

JAXKERN_INLINE f32v load(const float* p) { return load_raw<f32v>(p); }

JAXKERN_INLINE f32v load(const bf16* p) {
// GCC widens half a register at a time if left to itself.
#if defined(JAXKERN_LEVEL_avx512)
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(p)), 16);
#elif defined(JAXKERN_LEVEL_avx2)
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(p)), 16);
#else
  return bit_cast<f32v>(__builtin_convertvector(load_raw<u16v>(p), u32v) << 16);
#endif
}

JAXKERN_INLINE f32v load(const f16* p) {
#if defined(JAXKERN_LEVEL_avx512)
  return (f32v)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(JAXKERN_LEVEL_avx2)
  return (f32v)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_f32(p[i]);
  return v;
#endif
}

#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
// An e4m3's bits are those of a float16 that is 2^8 smaller, but for the NaN code, which becomes a number. The
// conversion takes float16 denormals whatever the thread flushes.
typedef int16_t i16v __attribute__((vector_size(kLanes * 2)));
typedef int16_t i16x2v __attribute__((vector_size(kLanes * 4)));
template <typename V>
JAXKERN_INLINE V f16_bits(V codes) {  // sign-extended
  return (codes << 7) & int16_t(0xbf80);
}
JAXKERN_INLINE i16v f16_bits(const e4m3* p) {
#if defined(JAXKERN_LEVEL_avx512)
  i16v wide = (i16v)_mm256_cvtepi8_epi16(load_raw<__m128i>(p));
#else
  i16v wide = (i16v)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  return f16_bits(wide);
}
JAXKERN_INLINE f32v from_f16_bits(i16v bits) {
#if defined(JAXKERN_LEVEL_avx512)
  return (f32v)_mm512_cvtph_ps((__m256i)bits);
#else
  return (f32v)_mm256_cvtph_ps((__m128i)bits);
#endif
}
#endif

JAXKERN_INLINE f32v load(const e4m3* p) {
#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
  i16v bits = f16_bits(p);
  i16v is_nan = (bits & 0x3f80) == 0x3f80;
  return from_f16_bits(bits | (is_nan & 0x7e00)) * 0x1p8f;
#else
  u32v bits = __builtin_convertvector(load_raw<u8v>(p), u32v);
  u32v magnitude = bits & 0x7f;
  // No float32 denormals on the way: threads may flush them to zero.
  f32v small = __builtin_convertvector(bit_cast<i32v>(magnitude), f32v) * 0x1p-9f;
  f32v normal = bit_cast<f32v>((magnitude << 20) + (120u << 23));
  f32v value = magnitude < 8 ? small : normal;
  value = magnitude == 0x7f ? splat(__builtin_nanf("")) : value;
  return bit_cast<f32v>(bit_cast<u32v>(value) | (bits & 0x80) << 24);
#endif
}

// Faster for many: load_fast(p) * kFastUnit is load(p), but for NaN codes, for which any_nan must be asked. Of any
// other type it is load(p).
template <typename T>
JAXKERN_INLINE f32v load_fast(const T* p) {
  return load(p);
}
#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
constexpr float kFastUnit = 0x1p8f;
JAXKERN_INLINE f32v load_fast(const e4m3* p) { return from_f16_bits(f16_bits(p)); }
#else
constexpr float kFastUnit = 1.0f;
JAXKERN_INLINE f32v load_fast(const e4m3* p) { return load(p); }
#endif

// load_fast of two registers, for less than twice the price where it can be had.
template <typename T>
JAXKERN_INLINE void load_fast_pair(const T* p, f32v& x, f32v& y) {
  x = load_fast(p);
  y = load_fast(p + kLanes);
}
#if defined(JAXKERN_LEVEL_avx2)
JAXKERN_INLINE void load_fast_pair(const e4m3* p, f32v& x, f32v& y) {
  __m256i bits = (__m256i)f16_bits((i16x2v)_mm256_cvtepi8_epi16(load_raw<__m128i>(p)));
  x = from_f16_bits((i16v)_mm256_castsi256_si128(bits));
  y = from_f16_bits((i16v)_mm256_extracti128_si256(bits, 1));
}
#endif

// ---- four registers of consecutive elements, in the order that is cheapest to convert ----

constexpr int kQuad = 4;
constexpr int kQuadLanes = kQuad * kLanes;

// load_quad's registers times quad_unit are the elements, but for NaN codes of e4m3, which become numbers: of these,
// `codes` remembers whether there were any. Element quad_element(i) of an e4m3 quad is lane i; of others, element i is.
// Small elements of an e4m3 quad are float32 denormals, for which there must be a KeepDenormals.
template <typename T>
constexpr float quad_unit = 1.0f;

template <typename T, typename Codes>
JAXKERN_INLINE void load_quad(const T* p, f32v (&x)[kQuad], Codes&) {
#pragma GCC unroll 4
  for (int v = 0; v < kQuad; ++v) x[v] = load(p + v * kLanes);
}

#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
// An e4m3's bits, shifted, are those of a float32 that is 2^120 smaller. Bytes 3, 1, 2 and 0 of each 32-bit lane.
template <>
constexpr float quad_unit<e4m3> = 0x1p120f;
JAXKERN_INLINE constexpr int quad_element(int i) {
  return i % kLanes * 4 + (3 - i / kLanes * 2 + i / (2 * kLanes) * 3);
}
#if defined(JAXKERN_LEVEL_avx512)
using Codes = __m512i;
JAXKERN_INLINE Codes max_codes(Codes a, Codes b) { return _mm512_max_epu8(a, b); }
#else
using Codes = __m256i;
JAXKERN_INLINE Codes max_codes(Codes a, Codes b) { return _mm256_max_epu8(a, b); }
#endif
JAXKERN_INLINE void load_quad(const e4m3* p, f32v (&x)[kQuad], Codes& codes) {
  i16x2v bits = load_raw<i16x2v>(p);
  codes = max_codes(codes, (Codes)(bits | int16_t(0x8080)));
  // Two elements at a time, as if they were bfloat16.
  u32v odd = bit_cast<u32v>((bits >> 4) & int16_t(0x87f0)), even = bit_cast<u32v>(((bits << 8) >> 4) & int16_t(0x87f0));
  x[0] = bit_cast<f32v>(odd & 0xffff0000);
  x[1] = bit_cast<f32v>(odd << 16);
  x[2] = bit_cast<f32v>(even & 0xffff0000);
  x[3] = bit_cast<f32v>(even << 16);
}
class KeepDenormals {
 public:
  JAXKERN_INLINE KeepDenormals() { _mm_setcsr(before_ & ~kDenormalsAreZero); }
  JAXKERN_INLINE ~KeepDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kDenormalsAreZero = 0x40;
  const unsigned before_ = _mm_getcsr();
};
JAXKERN_INLINE bool is_any_nan(Codes codes) {
  uint8_t bytes[sizeof(Codes)];
  store_raw(bytes, codes);
  bool any = false;
  for (uint8_t byte : bytes) any |= byte == 0xff;
  return any;
}
#else
struct Codes {};
struct KeepDenormals {};
JAXKERN_INLINE constexpr int quad_element(int i) { return i; }
JAXKERN_INLINE bool is_any_nan(Codes) { return false; }
#endif

// Whether there is a NaN code among p[0] to p[n - 1].
JAXKERN_INLINE bool any_nan(const e4m3* p, int64_t n) {
  int64_t i = 0;
  bool any = false;
#if defined(JAXKERN_LEVEL_avx512)
  const __m512i sign = _mm512_set1_epi8(-128), nan = _mm512_set1_epi8(-1);
  __mmask64 found = 0;
  for (; i + 64 <= n; i += 64) found |= _mm512_cmpeq_epi8_mask(_mm512_or_si512(load_raw<__m512i>(p + i), sign), nan);
  any = found != 0;
#elif defined(JAXKERN_LEVEL_avx2)
  const __m256i sign = _mm256_set1_epi8(-128), nan = _mm256_set1_epi8(-1);
  __m256i found = {};
  for (; i + 32 <= n; i += 32) found |= _mm256_cmpeq_epi8(_mm256_or_si256(load_raw<__m256i>(p + i), sign), nan);
  any = !_mm256_testz_si256(found, found);
#endif
  for (; i < n; ++i) any |= (p[i].bits & 0x7f) == 0x7f;
  return any;
}

// The first n of a register, n < kLanes; the other lanes are zero.
template <typename T>
JAXKERN_INLINE f32v load_first(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <typename T>
JAXKERN_INLINE f32v load_lanes(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_first(p, lanes);
}

// ---- and back, rounding to nearest, ties to even ----

JAXKERN_INLINE void store(float* p, f32v x) { store_raw(p, x); }

JAXKERN_INLINE void store(bf16* p, f32v x) {
  u32v bits = bit_cast<u32v>(x);
  u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32v nan = (bits >> 16) | 0x40;  // quiet, sign kept
  rounded = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
  store_raw(p, __builtin_convertvector(rounded, u16v));
}

JAXKERN_INLINE void store(f16* p, f32v x) {
#if defined(JAXKERN_LEVEL_avx512)
  store_raw(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(JAXKERN_LEVEL_avx2)
  store_raw(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  u32v bits = bit_cast<u32v>(x), magnitude = bits & 0x7fffffff;
  u32v normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  f32v shifted = abs(x) + 0.5f;  // ulp 2^-24, the ulp of a float16 denormal
  u32v small = bit_cast<u32v>(shifted) - 0x3f000000u;
  u32v result = magnitude < (113u << 23) ? small : normal;
  result = magnitude >= 0x477ff000u ? splat(0x7c00u) : result;
  result = magnitude > 0x7f800000u ? splat(0x7e00u) : result;
  store_raw(p, __builtin_convertvector(result | (bits >> 16 & 0x8000), u16v));
#endif
}

// As ml_dtypes has it: above 464 there is no e4m3, so it becomes NaN; 448 to 464 round down to 448.
JAXKERN_INLINE void store(e4m3* p, f32v x) {
  u32v bits = bit_cast<u32v>(x), magnitude = bits & 0x7fffffff;
  u32v normal = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  f32v shifted = abs(x) + 0x1p14f;  // ulp 2^-9, the ulp of an e4m3 denormal
  u32v small = bit_cast<u32v>(shifted) - 0x46800000u;
  u32v result = magnitude < (121u << 23) ? small : normal;
  result = magnitude > 0x43e80000u ? splat(0x7fu) : result;  // 464
  store_raw(p, __builtin_convertvector(result | (bits >> 24 & 0x80), u8v));
}

template <typename T>
JAXKERN_INLINE void store_first(T* p, f32v x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

template <typename T>
JAXKERN_INLINE void store_lanes(T* p, f32v x, int64_t lanes) {
  lanes >= kLanes ? store(p, x) : store_first(p, x, lanes);
}

// ---- past the caches, if aligned: for what they would not hold until it is read ----

JAXKERN_INLINE void stream(char* to, const char* from, int64_t bytes) {
#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
  if ((reinterpret_cast<uintptr_t>(to) | bytes) % sizeof(__m256i) == 0) {
    for (int64_t i = 0; i < bytes; i += sizeof(__m256i))
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load_raw<__m256i>(from + i));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Before another thread may read what this one streamed.
JAXKERN_INLINE void end_of_stream() {
#if defined(JAXKERN_LEVEL_avx512) || defined(JAXKERN_LEVEL_avx2)
  _mm_sfence();
#endif
}

// ---- a square of registers, transposed: row i, lane j <-> row j, lane i ----

template <int kStep, int... kLane>
JAXKERN_INLINE void exchange(f32v& a, f32v& b, std::integer_sequence<int, kLane...>) {
  f32v low = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  f32v high = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = low;
  b = high;
}

template <int kStep = kLanes / 2>
JAXKERN_INLINE void transpose(f32v (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// ---- reductions, always in the same order ----

template <int kStep, int... kLane>
JAXKERN_INLINE f32v add_halves(f32v x, std::integer_sequence<int, kLane...> lanes) {
  x += __builtin_shufflevector(x, x, (kLane ^ kStep)...);
  if constexpr (kStep > 1) x = add_halves<kStep / 2>(x, lanes);
  return x;
}

JAXKERN_INLINE float sum(f32v x) { return add_halves<kLanes / 2>(x, std::make_integer_sequence<int, kLanes>{})[0]; }

JAXKERN_INLINE float reduce_max(f32v x) {
  float lanes[kLanes];
  store(lanes, x);
  float m = lanes[0];
  for (int i = 1; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
