// Number formats and the conversions and functions that have instructions of their own.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/arch/base.h"

namespace jaxkern::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

HOST_DEVICE uint32_t float_bits(float x) {
  PTX(uint32_t bits; memcpy(&bits, &x, 4); return bits;)
  SIM(return sim::bits(x);)
}
HOST_DEVICE float bits_float(uint32_t bits) {
  PTX(float x; memcpy(&x, &bits, 4); return x;)
  SIM(return sim::unbits<float>(bits);)
}

HOST_DEVICE float to_float(float x) { return x; }
HOST_DEVICE float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(float16 x) {
  PTX(float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y;)
  SIM(return sim::from_float16(x.bits);)
}

// cvt.rn.bf16x2.f32: low in the lower half. PTX 9.7.9.21.
DEVICE uint32_t cvt_bf16x2(float low, float high AND_WHERE) {
  PTX(uint32_t packed; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low)); return packed;)
  SIM(sim::check_number(low, where); sim::check_number(high, where);
      return sim::to_bfloat16(low) | sim::to_bfloat16(high) << 16;)
}

// cvt.rn.f16x2.f32. PTX 9.7.9.21.
DEVICE uint32_t cvt_f16x2(float low, float high AND_WHERE) {
  PTX(uint32_t packed; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low)); return packed;)
  SIM(sim::check_number(low, where); sim::check_number(high, where);
      return sim::to_float16(low) | sim::to_float16(high) << 16;)
}

// cvt.rn.satfinite.e4m3x2.f32: to the nearest, ties to even, beyond 448 to 448. PTX 9.7.9.21.
DEVICE uint16_t cvt_e4m3x2(float low, float high AND_WHERE) {
  PTX(uint16_t packed; asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
      return packed;)
  SIM(sim::check_number(low, where); sim::check_number(high, where);
      return static_cast<uint16_t>(sim::to_e4m3(low) | sim::to_e4m3(high) << 8);)
}

// cvt.rn.f16x2.e4m3x2: exact; the lower byte becomes the lower half. PTX 9.7.9.21.
DEVICE uint32_t cvt_f16x2_e4m3x2(uint16_t packed) {
  PTX(uint32_t pair; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(packed)); return pair;)
  SIM(return sim::to_float16(sim::from_e4m3(packed & 0xff)) | sim::to_float16(sim::from_e4m3(packed >> 8)) << 16;)
}

// ex2.approx.ftz: 2^x to 2 ulp. PTX 9.7.3.21.
DEVICE float ex2(float x) {
  PTX(float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;)
  SIM(return std::exp2(x);)
}

// lg2.approx.ftz. PTX 9.7.3.20.
DEVICE float lg2(float x) {
  PTX(float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;)
  SIM(return std::log2(x);)
}

// div.rn: correctly rounded whatever the compiler's flags. PTX 9.7.3.8.
DEVICE float div(float x, float y) {
  PTX(return __fdiv_rn(x, y);)
  SIM(return x / y;)
}

// rcp.rn: 1 / x, correctly rounded. PTX 9.7.3.13.
DEVICE float rcp(float x) {
  PTX(return __frcp_rn(x);)
  SIM(return 1 / x;)
}

// mul.rn: never part of an fma, whatever the compiler's flags. PTX 9.7.3.5.
DEVICE float mul(float x, float y) {
  PTX(return __fmul_rn(x, y);)
  SIM(volatile float product = x * y; return product;)
}

// fma.rn: x y + z, rounded once, whatever the compiler's flags. PTX 9.7.3.6.
DEVICE float fma(float x, float y, float z) {
  PTX(return __fmaf_rn(x, y, z);)
  SIM(return std::fma(x, y, z);)
}

// The place of the lowest bit that is set; there must be one. brev, bfind: PTX 9.7.1.17, 9.7.1.16.
DEVICE int lowest_bit(uint32_t x) {
  PTX(return __ffs(x) - 1;)
  SIM(return __builtin_ctz(x);)
}

// The number of bits that are set. PTX 9.7.1.14.
DEVICE int popc(uint32_t x) {
  PTX(return __popc(x);)
  SIM(return __builtin_popcount(x);)
}

// max.u16x2: of the two halves each. PTX 9.7.1.13.
DEVICE uint32_t max_u16x2(uint32_t x, uint32_t y) {
  PTX(uint32_t z; asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y)); return z;)
  SIM(uint32_t low = (x & 0xffff) > (y & 0xffff) ? x & 0xffff : y & 0xffff;
      uint32_t high = x >> 16 > y >> 16 ? x >> 16 : y >> 16; return high << 16 | low;)
}

}  // namespace jaxkern::cuda
