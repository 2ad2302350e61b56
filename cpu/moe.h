// Routing, and the moves of rows between tokens and experts.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

constexpr int64_t kMaxTopK = 64;

// Group-limited top-k of scores + bias. scores [tokens, experts], bias [experts], expert_ids [tokens, top_k].
struct RouteParams {
  const float* scores;
  const float* bias;
  int32_t* expert_ids;
  int64_t tokens, experts, num_groups, topk_groups, top_k;
};

// A row for each assignment, stable within its group. ids and slots [assignments], source [rows], sizes and dropped
// [num_groups]. Groups follow one another, each start rounded up to `alignment`; with slabs each has the same share
// of the rows.
struct AssignSlotsParams {
  const int32_t* ids;
  int32_t* slots;
  int32_t* source;
  int32_t* sizes;
  int32_t* dropped;
  int64_t assignments, num_groups, rows, alignment;
  bool slabs;
};

// out[i] = x[source[i] / top_k], times weights[source[i]] if there are any; where source is no assignment zero, or left
// alone.
// With weights x is f32 or bf16; without it is any type of element_size bytes, which zero bits are the zero of.
struct GatherRowsParams {
  const void* x;
  const int32_t* source;
  const float* weights;  // null: copy
  void* out;
  DType type;
  bool zero_gaps;
  int64_t element_size, tokens, top_k, hidden, rows;
};

// values and scales of the same rows, quantised in blocks of 1 x 128; where there is no row zero bytes, or left alone.
// `slots` tells where each assignment's row is, so that a token is quantised once; rows that it does not tell of, or
// tells wrong, are quantised by themselves.
struct GatherQuantizeRowsParams {
  const void* x;
  DType x_type;           // f32, bf16
  const int32_t* source;  // [rows]
  const int32_t* slots;   // [tokens, top_k]
  uint8_t* values;
  void* scales;
  DType scale_type;
  bool power_of_two, zero_gaps;
  int64_t tokens, top_k, hidden, rows;
};

// out[t] = sum over j of weights[t, j] * rows[slots[t, j]], float32, along a binary tree over keys [0, num_keys), plus
// bias[t].
struct SumRowsParams {
  const void* rows;
  DType type;
  const int32_t* slots;
  const int32_t* keys;
  const float* weights;
  const void* bias;  // [tokens, hidden], or null
  DType bias_type;
  void* out;
  DType out_type;
  int64_t num_rows, num_keys, tokens, top_k, hidden;
};

// out[t, j] = <x[t], rows[slots[t, j]]>, zero where there is no row.
struct DotRowsParams {
  const void* rows;
  DType type;
  const int32_t* slots;
  const void* x;
  DType x_type;
  float* out;
  int64_t num_rows, tokens, top_k, hidden;
};

JAXKERN_KERNEL(route, RouteParams)
JAXKERN_KERNEL(assign_slots, AssignSlotsParams)
JAXKERN_KERNEL(gather_rows, GatherRowsParams)
JAXKERN_KERNEL(gather_quantize_rows, GatherQuantizeRowsParams)
JAXKERN_KERNEL(sum_rows, SumRowsParams)
JAXKERN_KERNEL(dot_rows, DotRowsParams)

}  // namespace jaxkern::cpu
