// MLA decoding: q [batch, queries, heads, width] attends to a paged cache [pages, page, width] that all heads share;
// a row of it is a key, its first `latent` numbers the value.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

struct MlaDecodeParams {
  const void* q;
  DType q_type;  // f32, bf16; that of out too
  const void* cache;
  DType cache_type;            // f32, bf16
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

JAXKERN_KERNEL(mla_decode, MlaDecodeParams)

}  // namespace jaxkern::cpu
