// Block-scaled FP8 on Hopper. No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace jaxkern::cuda {

enum class Float { float32, bfloat16, float16 };
enum class ScaleFormat { float32, power_of_two, ue8m0 };

// values = x / scale, rounded to e4m3; a block is 1 x 128 or 128 x 128.
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

Error prepare_quantize();

}  // namespace jaxkern::cuda
