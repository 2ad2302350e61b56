// Rows of new tokens written into the pages of a cache, on Hopper. No CUDA header is needed to include it.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace jaxkern::cuda {

// Row (i, s) goes to row positions[i, s] % page of page block_table[i, positions[i, s] / page], in place; nowhere if
// there is no such page. Of two rows for one place the later one wins. A packed row is `latent` e4m3, a float32 scale
// for each 128 of them and the others as bfloat16; its bytes are then a multiple of 4, as is latent. rows and cache are
// aligned to 16 bytes.
struct KvCacheAppend {
  void* cache;          // [pages, page, width] of cache_type, or if packed [pages, page, row_bytes]
  const void* initial;  // what it holds before: itself, or else the array that is copied to it
  const void* rows;     // [batch, tokens, width]
  Float rows_type, cache_type;
  bool packed;
  const int32_t* block_table;  // [batch, table_pages]
  const int32_t* positions;    // [batch, tokens]
  int64_t latent, width, row_bytes;
  int64_t batch, tokens;
  int64_t pages, page, table_pages;
};

Error kv_cache_append(const KvCacheAppend& append, Stream stream);

// Loads every kernel that it may launch, on the current device.
Error prepare_kv_cache_append();

}  // namespace jaxkern::cuda
