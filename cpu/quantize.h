// Block-scaled FP8: x [batch, m, k] <-> values e4m3 [batch, m, k] and scales [batch, ceil(m / bm), ceil(k / bk)].
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

struct QuantizeParams {
  const void* x;
  DType x_type;  // f32, bf16, f16
  uint8_t* values;
  void* scales;
  DType scale_type;  // f32, e8m0
  bool power_of_two;
  int64_t batch, m, k;
  int64_t block_m, block_k;
};

struct DequantizeParams {
  const uint8_t* values;
  const void* scales;
  DType scale_type;  // f32, e8m0
  void* x;
  DType x_type;  // f32, bf16, f16
  int64_t batch, m, k;
  int64_t block_m, block_k;
};

JAXKERN_KERNEL(quantize, QuantizeParams)
JAXKERN_KERNEL(dequantize, DequantizeParams)

}  // namespace jaxkern::cpu
