// The FP8 matrix product on Hopper. No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace jaxkern::cuda {

// out[i] = a[i] b[i]^T + accumulator[i], each 128 of k summed by the tensor cores and promoted to float32 with its
// scales. n and k are multiples of 16, every pointer is aligned to 16 bytes.
struct Gemm {
  const uint8_t* a;         // e4m3 [batch, m, k]
  const float* a_scales;    // [batch, ceil(k / 128), m]: m is contiguous
  const uint8_t* b;         // e4m3 [b_batch, n, k]
  const float* b_scales;    // b_block 128: [b_batch, ceil(n / 128), ceil(k / 128)]; 1: [b_batch, ceil(k / 128), n]
  const void* accumulator;  // as out, or null
  void* out;                // [batch, m, n], float32 or bfloat16
  bool out_is_float32;
  int b_block;             // rows of b that share a scale: 128 or 1
  int64_t batch, b_batch;  // b_batch is batch, or 1 for a b that all share
  int64_t m, n, k;
};

Error gemm(const Gemm& gemm, Stream stream);

// Loads every kernel that `gemm` may launch, on the current device: before the first launch, as launches must not load.
Error prepare_gemm();

}  // namespace jaxkern::cuda
