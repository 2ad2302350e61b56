// Absorbed MLA decoding on Hopper, and the merging of attention to parts of the keys. No CUDA header is needed to
// include it.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace jaxkern::cuda {

constexpr int mla_width = 576, mla_latent = 512;  // of a key, and of its value
constexpr int mla_packed_bytes = mla_latent + mla_latent / 128 * 4 + (mla_width - mla_latent) * 2;  // of a packed key
constexpr int mla_rows = 64;         // query rows of one piece of work
constexpr int most_mla_parts = 160;  // blocks of the decoding kernel: no Hopper GPU has more multiprocessors

// out = softmax(scale q keys^T) values, keys and values being rows of the cache. Rows are those of one request: its
// queries and heads. q, cache and out are of one type, with pages of a multiple of 16 rows, or the cache is packed, as
// jaxkern/kv_cache.py describes it, and the others bfloat16. They are aligned to 16 bytes.
struct MlaDecode {
  const void* q;               // [batch, queries, heads, mla_width]
  const void* cache;           // [pages, page, mla_width], or bytes [pages, page, mla_packed_bytes]
  const int32_t* block_table;  // [batch, table_pages]
  const int32_t* seq_lens;     // [batch]
  void* out;                   // [batch, queries, heads, mla_latent]
  float* lse;                  // [batch, queries, heads], natural logarithm
  Float type;                  // bfloat16 or float16
  bool packed;
  int32_t* starts;     // workspace [mla_starts(batch)]
  float* partial_out;  // workspace [mla_slots, mla_rows, mla_latent]
  float* partial_lse;  // workspace [mla_slots, mla_rows]
  float softmax_scale;
  bool causal;
  int64_t num_splits;  // parts of a request; 0: as schedule.h cuts them, for the blocks that there are
  int64_t batch, queries, heads;
  int64_t pages, page, table_pages;
};

// Where requests begin, and two more numbers: see schedule.h.
constexpr int64_t mla_starts(int64_t batch) { return batch + 2; }

// Partial results that there may be; one at least, for a buffer.
constexpr int64_t mla_slots(int64_t batch, int64_t rows, int64_t num_splits) {
  if (num_splits == 1) return 1;
  int64_t groups = (rows + mla_rows - 1) / mla_rows;
  if (num_splits > 0) return batch * num_splits * groups;
  return batch * groups + (groups > most_mla_parts ? groups : most_mla_parts);
}

Error mla_decode(const MlaDecode& mla, Stream stream);

// Attention to all keys from the attention to parts of them; a part whose lse is -inf has none. outs and out are
// aligned to 16 bytes.
struct MergeAttention {
  const void* outs;  // [parts, rows, width]
  Float type;
  const float* lses;  // [parts, rows], natural logarithms
  void* out;          // [rows, width]
  float* lse;         // [rows]
  int64_t parts, rows, width;
};

Error merge_attention(const MergeAttention& merge, Stream stream);

// Load every kernel that each may launch, on the current device.
Error prepare_mla_decode();
Error prepare_merge_attention();

}  // namespace jaxkern::cuda
