#include "cuda/kv_cache/kv_cache.h"

#include "bindings/cuda/launch.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

ffi::Error kv_cache_append(cuda::Stream stream, Buffer cache, Buffer rows, Buffer block_table, Buffer positions,
                           Result out, int64_t latent_dim) {
  Check check("kv_cache_append");
  check.rank("cache", cache, 3);
  check.rank("rows", rows, 3);
  check.rank("block_table", block_table, 2);
  check.that(is_size(latent_dim), "latent_dim must be a positive int32");
  if (check.failed()) return check.error();
  int64_t pages = cache.dimensions()[0], page = cache.dimensions()[1], row = cache.dimensions()[2];
  int64_t batch = rows.dimensions()[0], tokens = rows.dimensions()[1], width = rows.dimensions()[2];
  int64_t table_pages = block_table.dimensions()[1];
  bool packed = cache.element_type() == U8;
  if (packed) {
    check.that(latent_dim <= width && latent_dim % 4 == 0,
               "latent_dim must be a multiple of 4 and at most rows' width");
    row = latent_dim + 4 * blocks_of(latent_dim, 128) + 2 * (width - latent_dim);
    check.that(row % 4 == 0, "packed rows must have a multiple of 4 bytes");
  } else {
    row = width;
  }
  check.dtype("cache", cache, {F32, BF16, F16, U8});
  check.shape("cache", cache, {pages, page, row});
  check.dtype("rows", rows, {F32, BF16, F16});
  check.dtype("block_table", block_table, {S32});
  check.shape("block_table", block_table, {batch, table_pages});
  check.dtype("positions", positions, {S32});
  check.shape("positions", positions, {batch, tokens});
  check.that(is_size(pages * page + 1) && is_size(batch * tokens + (1 << 10)) && is_size(row + (1 << 10)),
             "rows, those of the cache and their width must be int32");
  check.dtype("the result", *out, {cache.element_type()});
  check.shape("the result", *out, {pages, page, row});
  check.that(aligned({rows.untyped_data(), out->untyped_data()}), "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("kv_cache_append",
                  cuda::kv_cache_append({.cache = out->untyped_data(),
                                         // Inside a loop XLA may trace a CUDA graph without the alias.
                                         .initial = cache.untyped_data(),
                                         .rows = rows.untyped_data(),
                                         .rows_type = float_of(rows.element_type()),
                                         .cache_type = float_of(cache.element_type()),
                                         .packed = packed,
                                         .block_table = block_table.typed_data<int32_t>(),
                                         .positions = positions.typed_data<int32_t>(),
                                         .latent = latent_dim,
                                         .width = width,
                                         .row_bytes = row,
                                         .batch = batch,
                                         .tokens = tokens,
                                         .pages = pages,
                                         .page = page,
                                         .table_pages = table_pages},
                                        stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(kv_cache_append, 1, signature(Operands<4>{}, Results<1>{}).Attr<int64_t>("latent_dim"));

}  // namespace jaxkern
