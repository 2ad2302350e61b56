// Routing, and the moves of rows between tokens and experts, on Hopper. An assignment is token * top_k + choice. No
// CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/limits.h"
#include "cuda/quantize/quantize.h"
#include "cuda/stream.h"

namespace jaxkern::cuda {

constexpr int64_t most_experts = 1024, most_expert_groups = 256;  // that tokens choose from
constexpr int64_t most_choices = 64;                              // of a token whose rows are summed
constexpr int64_t counting_blocks = 64;                           // of threads, that at most share the assignments

// The experts with the largest scores + bias of a token, in falling order, ties to the lower index, of its topk_groups
// best groups: those whose two largest have the largest sum. A NaN is the least of all.
struct Route {
  const float* scores;  // [tokens, experts], at most most_experts in most_expert_groups
  const float* bias;    // [experts]
  int32_t* expert_ids;  // [tokens, top_k]
  int64_t tokens, experts, num_groups, topk_groups, top_k;
};

Error route(const Route& route, Stream stream);

// A row for each assignment, stable within its group, at most most_groups of them. Groups follow one another, each
// start rounded up to `alignment`; with slabs each has the same share of the rows. What finds no row is dropped.
struct AssignSlots {
  const int32_t* ids;  // [assignments]: the group of each; whatever is none selects nothing
  int32_t* slots;      // [assignments]: the row, -1 if there is none
  int32_t* source;     // [rows]: the assignment of each, -1 if there is none
  int32_t* sizes;      // [num_groups]
  int32_t* dropped;    // [num_groups]
  int32_t* counts;     // workspace [counting_blocks, num_groups]
  int64_t assignments, num_groups, rows, alignment;
  bool slabs;
};

Error assign_slots(const AssignSlots& assign, Stream stream);

// out[i] = x[source[i] / top_k], times weights[source[i]] if there are any, which x of float32 or bfloat16 can have;
// where source is no assignment zero bytes, or left alone.
struct GatherRows {
  const void* x;          // [tokens, hidden]
  const int32_t* source;  // [rows]
  const float* weights;   // [tokens, top_k], or null: a copy
  void* out;              // [rows, hidden]
  Float type;             // matters with weights
  bool zero_gaps;
  int64_t element_size, tokens, top_k, hidden, rows;
};

Error gather_rows(const GatherRows& gather, Stream stream);

// The same rows of float32 or bfloat16, quantised in blocks of 1 x 128; where there is none zero bytes, or left alone.
// `slots` tells where each assignment's row is, so that a token is read and quantised once; rows that it does not tell
// of, or tells wrong, are quantised by themselves. x and values are aligned to 16 bytes.
struct GatherQuantizeRows {
  const void* x;  // [tokens, hidden]
  Float x_type;
  const int32_t* source;  // [rows]
  const int32_t* slots;   // [tokens, top_k]
  uint8_t* values;        // e4m3 [rows, hidden]
  void* scales;           // [ceil(hidden / 128), rows], rows contiguous, as the grouped GEMM loads them
  ScaleFormat scale_format;
  bool zero_gaps;
  int64_t tokens, top_k, hidden, rows;
};

Error gather_quantize_rows(const GatherQuantizeRows& gather, Stream stream);

// out[t] = the sum over j of weights[t, j] * rows[slots[t, j]], in float32 along a binary tree over keys [0, num_keys),
// plus bias[t]; no product is fused with a sum. Slots and keys out of range are left out. Every pointer is aligned to
// 16 bytes but those of [tokens, top_k].
struct SumRows {
  const void* rows;  // [num_rows, hidden]
  Float type;
  const int32_t* slots;  // [tokens, top_k], top_k at most most_choices
  const int32_t* keys;
  const float* weights;
  const void* bias;  // [tokens, hidden], or null
  Float bias_type;
  void* out;  // [tokens, hidden]
  Float out_type;
  int64_t num_rows, num_keys, tokens, top_k, hidden;
};

Error sum_rows(const SumRows& sum, Stream stream);

// out[t, j] = <x[t], rows[slots[t, j]]>, zero where there is no such row. rows and x are aligned to 16 bytes.
struct DotRows {
  const void* rows;  // [num_rows, hidden]
  Float type;
  const int32_t* slots;  // [tokens, top_k]
  const void* x;         // [tokens, hidden]
  Float x_type;
  float* out;  // [tokens, top_k]
  int64_t num_rows, tokens, top_k, hidden;
};

Error dot_rows(const DotRows& dot, Stream stream);

// Load every kernel that each may launch, on the current device.
Error prepare_route();
Error prepare_assign_slots();
Error prepare_gather_rows();
Error prepare_gather_quantize_rows();
Error prepare_sum_rows();
Error prepare_dot_rows();

}  // namespace jaxkern::cuda
