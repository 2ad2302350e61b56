// Registers of 32 bfloat16, and products of pairs of them, for code compiled at level avx512.
//
// A product sums over pairs: lane i of a and of b holds two bfloat16, the first in the low half, and the sum's lane i
// becomes sum + a0 * b0 + a1 * b1 in float32; denormals count as zero.
#pragma once

#ifdef JAXKERN_LEVEL_avx512

#include <immintrin.h>

#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {

// 32 elements as bfloat16.
JAXKERN_INLINE __m512i load_bf16(const bf16* p) { return _mm512_loadu_si512(p); }

// Normal codes need another exponent bias only; those with the smallest and the largest exponent (denormals, NaN) come
// from a table.
JAXKERN_INLINE __m512i load_bf16(const e4m3* p) {
  const __m512i table = _mm512_set_epi64(0x7fc043e043d043c0, 0x43b043a043904380, 0, 0, 0, 0,  //
                                         0x3c603c403c203c00, 0x3bc03b803b000000);
  __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(0x7f0));
  __m512i value = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
  __mmask32 special = _mm512_testn_epi16_mask(_mm512_add_epi16(code, _mm512_set1_epi16(8)), _mm512_set1_epi16(0x70));
  value = _mm512_mask_permutexvar_epi16(value, special, code, table);
  return _mm512_ternarylogic_epi32(value, code, _mm512_set1_epi16(int16_t(0x8000)), 0xf8);  // value | (code & sign)
}

// The first n, if there are no more; the others are zero.
template <typename T>
JAXKERN_INLINE __m512i load_bf16_lanes(const T* p, int64_t n) {
  if (n >= 2 * kLanes) return load_bf16(p);
  T buffer[2 * kLanes] = {};
  if (n > 0) std::memcpy(buffer, p, n * sizeof(T));
  return load_bf16(buffer);
}

// Only on Level::bf16 and above, as all that follows: the two bytes of a bfloat16 for each of the 128 magnitudes of an
// e4m3.
struct PairTables {
  alignas(64) uint8_t low[128], high[128];
};

constexpr PairTables make_pair_tables() {
  PairTables t = {};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3, mantissa = code & 7, bits = (exponent + 120) << 7 | mantissa << 4;
    if (exponent == 0) {  // a multiple of 2^-9
      bits = 0;
      for (int top = 0; top < 3; ++top)
        if (mantissa >> top == 1) bits = (118 + top) << 7 | (mantissa << (7 - top) & 0x7f);
    }
    if (code == 127) bits = 0x7fc0;
    t.low[code] = uint8_t(bits);
    t.high[code] = uint8_t(bits >> 8);
  }
  return t;
}

constexpr PairTables kPairTables = make_pair_tables();

JAXKERN_INLINE __m512i look_up(__m512i codes, const uint8_t (&table)[128]) {
  asm("vpermi2b %2, %1, %0" : "+v"(codes) : "v"(_mm512_load_si512(table)), "v"(_mm512_load_si512(table + 64)));
  return codes;
}

// x[0] gets the first half of each 16 codes and x[1] the other.
JAXKERN_INLINE void to_bf16(__m512i codes, __m512i (&x)[2]) {
  __m512i low = look_up(codes, kPairTables.low), high = look_up(codes, kPairTables.high);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // high | (codes & sign)
  x[0] = _mm512_unpacklo_epi8(low, high);
  x[1] = _mm512_unpackhi_epi8(low, high);
}

// 64 elements in order.
JAXKERN_INLINE void load_bf16(const e4m3* p, __m512i (&x)[2]) {
  to_bf16(_mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(p)), x);
}

JAXKERN_INLINE f32v add_product(f32v sum, u32v a, u32v b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
}

// Rounded to nearest, ties to even.
JAXKERN_INLINE u32v to_pairs(f32v first, f32v second) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i halves;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(second), "v"(first));
  return (u32v)_mm512_permutexvar_epi16(interleaved, halves);
}

// The bfloat16 of two registers as pairs: those of the first 16 columns, then of the next.
JAXKERN_INLINE void interleave(__m512i first, __m512i second, u32v (&pairs)[2]) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  pairs[0] = (u32v)_mm512_permutex2var_epi16(first, low, second);
  pairs[1] = (u32v)_mm512_permutex2var_epi16(first, high, second);
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL

#endif
