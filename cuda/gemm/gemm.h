// FP8 and bfloat16 matrix products on Hopper: one, a batch, or groups. No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/limits.h"
#include "cuda/stream.h"

namespace jaxkern::cuda {

// out[i] = a[i] b[i]^T + accumulator[i], each 128 of k summed by the tensor cores and promoted to float32 with its
// scales. n and k are multiples of 16, every pointer is aligned to 16 bytes.
struct Gemm {
  const void* a;            // e4m3 [batch, m, k]
  const float* a_scales;    // [batch, ceil(k / 128), m]: m is contiguous
  const void* b;            // e4m3 [b_batch, n, k]
  const float* b_scales;    // b_block 128: [b_batch, ceil(n / 128), ceil(k / 128)]; 1: [b_batch, ceil(k / 128), n]
  const void* accumulator;  // as out, or null
  void* out;                // [batch, m, n], float32 or bfloat16
  bool out_is_float32;
  int b_block;             // rows of b that share a scale: 128 or 1
  int64_t batch, b_batch;  // b_batch is batch, or 1 for a b that all share
  int64_t m, n, k;
};

Error gemm(const Gemm& gemm, Stream stream);

// The rows of group i of a, times b[i]^T, of e4m3 or, where b_block is 0, of bfloat16 without scales. Group i begins
// where the one before it ends, rounded up to `alignment`, or, if `stride` is not 0, at row i * stride; sizes are cut
// to the rows that there are. Rows in no group become zero, or are left alone. m < 2^26, at most 1024 groups; the rest
// as in Gemm.
struct GroupedGemm {
  const void* a;               // [m, k]
  const float* a_scales;       // [ceil(k / 128), m]
  const void* b;               // [groups, n, k]
  const float* b_scales;       // both as in Gemm; none are read where b_block is 0
  const int32_t* group_sizes;  // [groups], on the device
  void* out;                   // [m, n]
  bool out_is_float32;
  int b_block;
  bool zero_gaps;
  int64_t groups, alignment, stride;
  int64_t m, n, k;
};

Error grouped_gemm(const GroupedGemm& gemm, Stream stream);

// out[i] = a_i b_i^T + accumulator[i], of the columns of a and b that are group i's. `alignment` or `stride` is a
// multiple of 128, t and n of 16; at most most_groups groups and most_grouped of t. Or, not `scaled`, a_i^T b_i of the
// rows that are group i's: any alignment, m and n multiples of 8.
struct KGroupedGemm {
  bool scaled;
  const void* a;               // e4m3 [m, t]; bfloat16 [t, m]
  const float* a_scales;       // [ceil(t / 128), m]
  const void* b;               // e4m3 [n, t]; bfloat16 [t, n]
  const float* b_scales;       // [ceil(t / 128), n]; both are read only if scaled
  const int32_t* group_sizes;  // [groups], on the device
  const float* accumulator;    // as out, or null
  float* out;                  // [groups, m, n]
  int64_t groups, alignment, stride;
  int64_t t, m, n;
};

Error k_grouped_gemm(const KGroupedGemm& gemm, Stream stream);

// Load every kernel that each may launch, on the current device: before the first launch, as launches must not load.
Error prepare_gemm();
Error prepare_grouped_gemm();
Error prepare_k_grouped_gemm();

}  // namespace jaxkern::cuda
