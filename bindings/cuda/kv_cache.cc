#include "cuda/kv_cache/kv_cache.h"

#include "bindings/cuda/launch.h"
#include "bindings/kv_cache.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

ffi::Error kv_cache_append(cuda::Stream stream, Buffer cache, Buffer rows, Buffer block_table, Buffer positions,
                           Result out, int64_t latent_dim) {
  Check check("kv_cache_append");
  AppendSizes s = check_append(check, cache, rows, block_table, positions, *out, latent_dim);
  check.that(!s.packed || s.row % 4 == 0, "packed rows must have a multiple of 4 bytes");
  check.that(is_size(s.pages * s.page + 1) && is_size(s.batch * s.tokens + (1 << 10)) && is_size(s.row + (1 << 10)),
             "rows, those of the cache and their width must be int32");
  check.that(aligned({rows.untyped_data(), out->untyped_data()}), "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("kv_cache_append",
                  cuda::kv_cache_append({.cache = out->untyped_data(),
                                         // Inside a loop XLA may trace a CUDA graph without the alias.
                                         .initial = cache.untyped_data(),
                                         .rows = rows.untyped_data(),
                                         .rows_type = float_of(rows.element_type()),
                                         .cache_type = float_of(cache.element_type()),
                                         .packed = s.packed,
                                         .block_table = block_table.typed_data<int32_t>(),
                                         .positions = positions.typed_data<int32_t>(),
                                         .latent = latent_dim,
                                         .width = s.width,
                                         .row_bytes = s.row,
                                         .batch = s.batch,
                                         .tokens = s.tokens,
                                         .pages = s.pages,
                                         .page = s.page,
                                         .table_pages = s.table_pages},
                                        stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(kv_cache_append, 1, signature(Operands<4>{}, Results<1>{}).Attr<int64_t>("latent_dim"));

}  // namespace jaxkern
