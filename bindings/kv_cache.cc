#include "cpu/kv_cache.h"

#include "bindings/common.h"
#include "bindings/kv_cache.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

ffi::Error kv_cache_append(ffi::ThreadPool pool, Buffer cache, Buffer rows, Buffer block_table, Buffer positions,
                           Result out, int64_t latent_dim) {
  Check check("kv_cache_append");
  AppendSizes s = check_append(check, cache, rows, block_table, positions, *out, latent_dim);
  check.that(cache.untyped_data() == out->untyped_data() || cache.element_count() == 0,
             "the result must be an alias of the cache");
  if (check.failed()) return check.error();

  cpu::kv_cache_append({.cache = out->untyped_data(),
                        .rows = rows.untyped_data(),
                        .rows_type = dtype_of(rows.element_type()),
                        .block_table = static_cast<const int32_t*>(block_table.untyped_data()),
                        .positions = static_cast<const int32_t*>(positions.untyped_data()),
                        .packed = s.packed,
                        .cache_type = dtype_of(cache.element_type()),
                        .row_bytes = s.row * static_cast<int64_t>(ffi::ByteWidth(cache.element_type())),
                        .width = s.width,
                        .latent = latent_dim,
                        .pages = s.pages,
                        .page = s.page,
                        .table_pages = s.table_pages,
                        .batch = s.batch,
                        .tokens = s.tokens},
                       threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kv_cache_append_v1, kv_cache_append,
                              signature(Operands<4>{}, Results<1>{}).Attr<int64_t>("latent_dim"));

}  // namespace jaxkern
