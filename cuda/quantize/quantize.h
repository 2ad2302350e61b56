// Block-scaled FP8 on Hopper. No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/limits.h"
#include "cuda/stream.h"

namespace jaxkern::cuda {

enum class ScaleFormat { float32, power_of_two, ue8m0 };

// values = x / scale, rounded to e4m3; a block is 1 x 128 or 128 x 128. Every pointer is aligned to 16 bytes.
struct Quantize {
  const void* x;  // [batch, m, k]
  Float x_type;
  uint8_t* values;  // e4m3 [batch, m, k]
  void* scales;     // block_m 1: [batch, ceil(k / 128), m], m contiguous, as the GEMM loads them;
                    // block_m 128: [batch, ceil(m / 128), ceil(k / 128)]. float32, or e8m0 bytes for ue8m0
  ScaleFormat scale_format;
  int block_m;  // 1 or 128
  int64_t batch, m, k;
};

Error quantize(const Quantize& quantize, Stream stream);

// x transposed, in blocks of 128 tokens: values = x^T / scale. Group i of x begins where the one before it ends,
// rounded up to `alignment`, and in the result at a multiple of 128; what is no group's becomes zero there. At most
// most_groups groups and most_grouped tokens. Every pointer is aligned to 16 bytes.
struct QuantizeAlongTokens {
  const void* x;  // [t, m]
  Float x_type;
  const int32_t* group_sizes;  // [groups], on the device
  int64_t groups, alignment;
  uint8_t* values;  // e4m3 [m, tokens]
  void* scales;     // [tokens / 128, m]
  ScaleFormat scale_format;
  int64_t t, m, tokens;  // tokens is a multiple of 128
};

Error quantize_along_tokens(const QuantizeAlongTokens& quantize, Stream stream);

// silu(gate) * up * weights in blocks of 1 x 128; rows that do not count are left alone. Every pointer but `up` is
// aligned to 16 bytes, `up` to 4 elements if width is a multiple of 4.
struct SwigluQuantize {
  const void* gate;  // batch * m rows of `width` elements, `stride` apart
  const void* up;    // likewise
  Float type;
  int64_t stride;
  const float* weights;     // [batch, m], or null
  const int32_t* num_rows;  // [batch], on the device: how many count of each m; or null: all
  uint8_t* values;          // e4m3 [batch, m, width]
  void* scales;             // [batch, ceil(width / 128), m]
  ScaleFormat scale_format;
  int64_t batch, m, width;
};

Error swiglu_quantize(const SwigluQuantize& quantize, Stream stream);

// Load every kernel that each may launch, on the current device.
Error prepare_quantize();
Error prepare_quantize_along_tokens();
Error prepare_swiglu_quantize();

}  // namespace jaxkern::cuda
