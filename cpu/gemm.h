// Matrix products with float32 sums of float32, bfloat16 and block-scaled FP8 operands: one, a batch, or groups of
// rows.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

// A matrix of rows x k (k is what the product sums over) as it is stored: row-major [rows, k], or, transposed, [k,
// rows].
struct Operand {
  const void* data;
  DType type;  // f32, bf16; e4m3 if and only if it has scales
  bool transposed;
  int64_t stride;                 // elements from one stored row to the next
  const void* scales = nullptr;   // [ceil(stored rows / block_rows), ceil(stored columns / 128)]
  DType scale_type = DType::f32;  // f32, e8m0
  int64_t block_rows = 1;         // 1 or 128
  int64_t scale_stride = 0;
};

// out[i] = a[i] b[i]^T + accumulator[i] for each i of a batch.
struct GemmParams {
  Operand a, b;
  int64_t a_batch_stride, b_batch_stride;              // elements; 0 where all share one matrix
  int64_t a_scale_batch_stride, b_scale_batch_stride;  // scales
  const void* accumulator;                             // of out_type, or null
  void* out;                                           // [batch, m, n]
  DType out_type;                                      // f32, bf16
  int64_t batch, m, n, k;
};

// Where groups of rows lie. A group starts where the one before it ends, rounded up to `alignment`; or, with a `stride`
// that is not 0, group i starts at row i * stride and has at most that many. Sizes that do not fit are cut.
struct Groups {
  const int32_t* sizes;
  int64_t count, alignment, stride;
};

// The rows of group i of a, times b[i]^T. Rows in no group become zero, or are left alone.
struct GroupedGemmParams {
  Operand a, b;
  int64_t b_group_stride, b_scale_group_stride;
  Groups groups;
  bool zero_gaps;
  void* out;  // [m, n]
  DType out_type;
  int64_t m, n, k;
};

// out[i] = a_i^T b_i + accumulator[i], where a_i and b_i are group i of the t of a and b: stored as a [t, m] and b [t,
// n], transposed, or, with scales, as a [m, t] and b [n, t]. Groups then start at multiples of 128.
struct KGroupedGemmParams {
  Operand a, b;
  Groups groups;
  const float* accumulator;  // or null
  float* out;                // [groups.count, m, n]
  int64_t t, m, n;
};

JAXKERN_KERNEL(gemm, GemmParams)
JAXKERN_KERNEL(grouped_gemm, GroupedGemmParams)
JAXKERN_KERNEL(k_grouped_gemm, KGroupedGemmParams)

}  // namespace jaxkern::cpu
