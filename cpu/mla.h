// MLA decoding: q [batch, queries, heads, width] attends to a paged cache [pages, page, width] that all heads share;
// a row of it is a key, its first `latent` numbers the value. A packed row is `latent` e4m3, a float32 scale for each
// 128 of them, and width - latent bfloat16.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

struct MlaDecodeParams {
  const void* q;
  DType q_type;  // f32, bf16, f16; that of out too
  const void* cache;
  DType cache_type;            // f32, bf16, f16, or e4m3 for packed rows
  const int32_t* block_table;  // [batch, table_pages]; an entry outside [0, pages) holds no keys
  const int32_t* seq_lens;     // [batch]
  void* out;                   // [batch, queries, heads, latent]
  float* lse;                  // [batch, queries, heads]
  float softmax_scale;
  bool causal;
  int64_t num_splits;  // 0: by the request's length
  int64_t batch, queries, heads, width, latent;
  int64_t pages, page, table_pages;
};

constexpr int64_t kLatentBlock = 128;  // of a packed row, with one scale

constexpr int64_t row_bytes(DType type, int64_t width, int64_t latent) {
  if (type != DType::e4m3) return width * size_of(type);
  return latent + (latent + kLatentBlock - 1) / kLatentBlock * 4 + (width - latent) * 2;
}

JAXKERN_KERNEL(mla_decode, MlaDecodeParams)

// Joins the attention to `parts` disjoint sets of keys: outs [parts, rows, width] with the natural logarithms lses
// [parts, rows] of their sums of exponentials. A part of -inf has no keys.
struct MergeAttentionParams {
  const void* outs;
  DType type;  // f32, bf16, f16; that of out too
  const float* lses;
  void* out;   // [rows, width]
  float* lse;  // [rows]
  int64_t parts, rows, width;
};

JAXKERN_KERNEL(merge_attention, MergeAttentionParams)

}  // namespace jaxkern::cpu
