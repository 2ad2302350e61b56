// What the handlers of kv_cache.append, of the CPU and of Hopper, read off their buffers and check alike.
#pragma once

#include "bindings/check.h"

namespace jaxkern {

struct AppendSizes {
  int64_t pages, page, row;  // of the cache, row in its elements
  int64_t batch, tokens, width;
  int64_t table_pages;
  bool packed;
};

// The sizes mean something unless the check has failed.
inline AppendSizes check_append(Check& check, const Buffer& cache, const Buffer& rows, const Buffer& block_table,
                                const Buffer& positions, const Buffer& out, int64_t latent_dim) {
  using enum ffi::DataType;
  check.rank("cache", cache, 3);
  check.rank("rows", rows, 3);
  check.rank("block_table", block_table, 2);
  check.that(is_size(latent_dim), "latent_dim must be a positive int32");
  if (check.failed()) return {};
  AppendSizes s = {.pages = cache.dimensions()[0],
                   .page = cache.dimensions()[1],
                   .row = rows.dimensions()[2],
                   .batch = rows.dimensions()[0],
                   .tokens = rows.dimensions()[1],
                   .width = rows.dimensions()[2],
                   .table_pages = block_table.dimensions()[1],
                   .packed = cache.element_type() == U8};
  if (s.packed) {
    check.that(latent_dim <= s.width && latent_dim % 4 == 0,
               "latent_dim must be a multiple of 4 and at most rows' width");
    s.row = latent_dim + 4 * blocks_of(latent_dim, 128) + 2 * (s.width - latent_dim);
  }
  check.dtype("cache", cache, {F32, BF16, F16, U8});
  check.shape("cache", cache, {s.pages, s.page, s.row});
  check.dtype("rows", rows, {F32, BF16, F16});
  check.dtype("block_table", block_table, {S32});
  check.shape("block_table", block_table, {s.batch, s.table_pages});
  check.dtype("positions", positions, {S32});
  check.shape("positions", positions, {s.batch, s.tokens});
  check.dtype("the result", out, {cache.element_type()});
  check.shape("the result", out, {s.pages, s.page, s.row});
  return s;
}

}  // namespace jaxkern
