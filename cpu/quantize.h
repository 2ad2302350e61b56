// Block-scaled FP8: x [batch, m, k] <-> values e4m3 [batch, m, k] and scales [batch, ceil(m / bm), ceil(k / bk)].
// Scales are f32 or e8m0; with power_of_two, as e8m0 needs it, they are rounded up to one.
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

// x [t, m] -> values [m, tokens], scales [m, tokens / 128]. The groups of x are laid out with `alignment`, those of the
// result with 128; sizes that do not fit into t are cut. What is in no group is zero.
struct QuantizeAlongTokensParams {
  const void* x;
  DType x_type;  // f32, bf16, f16
  const int32_t* group_sizes;
  int64_t groups, alignment;
  uint8_t* values;
  void* scales;
  DType scale_type;
  bool power_of_two;
  int64_t t, m, tokens;
};

// silu(gate) * up * weight of the row -> values [batch, m, width], scales [batch, m, ceil(width / 128)]. Rows that do
// not count are left alone.
struct SwigluQuantizeParams {
  const void *gate, *up;  // rows `stride` elements apart
  int64_t stride;
  DType type;               // f32, bf16, f16
  const float* weights;     // [batch, m], or null
  const int32_t* num_rows;  // [batch], how many count of each m; or null: all
  uint8_t* values;
  void* scales;
  DType scale_type;
  bool power_of_two;
  int64_t batch, m, width;
};

JAXKERN_KERNEL(quantize, QuantizeParams)
JAXKERN_KERNEL(quantize_along_tokens, QuantizeAlongTokensParams)
JAXKERN_KERNEL(swiglu_quantize, SwigluQuantizeParams)
JAXKERN_KERNEL(dequantize, DequantizeParams)

}  // namespace jaxkern::cpu
