// The paged cache: rows of new tokens written to the pages of their requests, in place.
#pragma once

#include "cpu/levels.h"
#include "cpu/types.h"

namespace jaxkern::cpu {

// rows [batch, tokens, width]. Token `position` of request i has row position % page of page block_table[i, position /
// page] of the cache; a row whose position or page does not exist is dropped, and of two for one slot the later one
// wins.
struct KvCacheAppendParams {
  void* cache;  // [pages, page] rows of row_bytes
  const void* rows;
  DType rows_type;             // f32, bf16, f16
  const int32_t* block_table;  // [batch, table_pages]
  const int32_t* positions;    // [batch, tokens]
  // A row of the cache: width numbers of cache_type (f32, bf16, f16); or, packed, the first `latent` of them as e4m3,
  // a float32 scale for each 128 of these, and the rest as bf16.
  bool packed;
  DType cache_type;
  int64_t row_bytes, width, latent;
  int64_t pages, page, table_pages, batch, tokens;
};

JAXKERN_KERNEL(kv_cache_append, KvCacheAppendParams)

}  // namespace jaxkern::cpu
