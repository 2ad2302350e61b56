// The launches of the kernels here.
#include "cuda/kv_cache/kv_cache.h"

#include "cuda/kv_cache/append.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

template <typename From, typename To>
Error append(const KvCacheAppend& g, Stream stream) {
  using Kernel = AppendRows<From, To>;
  using Element = typename Kernel::Element;
  int64_t count = g.batch * g.tokens, stride = g.packed ? g.row_bytes : g.width;
  // A warp for each row, until there are many: a block looks at all rows after its own.
  int block_rows = count <= Kernel::warps * multiprocessors() * 4 ? Kernel::warps : Kernel::most_rows;
  typename Kernel::Params p = {.rows = {static_cast<const From*>(g.rows), count * g.width},
                               .cache = {static_cast<Element*>(g.cache), g.pages * g.page * stride},
                               .block_table = {g.block_table, g.batch * g.table_pages},
                               .positions = {g.positions, count},
                               .count = static_cast<int>(count),
                               .block_rows = block_rows,
                               .width = static_cast<int>(g.width),
                               .latent = static_cast<int>(g.latent),
                               .stride = static_cast<int>(stride),
                               .tokens = static_cast<int>(g.tokens),
                               .pages = static_cast<int>(g.pages),
                               .page = static_cast<int>(g.page),
                               .table_pages = static_cast<int>(g.table_pages),
                               .vectors = g.width % 4 == 0};
  return launch<Kernel>(ceil_div(count, block_rows), 1, p, stream);
}

template <typename From>
Error prepare_from() {
  return first_error({prepare<AppendRows<From, float>>(), prepare<AppendRows<From, bfloat16>>(),
                      prepare<AppendRows<From, float16>>(), prepare<AppendRows<From, Packed>>()});
}

}  // namespace

Error kv_cache_append(const KvCacheAppend& g, Stream stream) {
  int64_t element = g.cache_type == Float::float32 ? 4 : 2, row_bytes = g.packed ? g.row_bytes : g.width * element;
  if (Error error = copy(g.cache, g.initial, g.pages * g.page * row_bytes, stream); !error.empty()) return error;
  if (g.batch * g.tokens * g.width == 0 || g.pages * g.page * g.table_pages == 0) return {};
  return with_type(g.rows_type, [&](auto from) {
    if (g.packed) return append<decltype(from), Packed>(g, stream);
    return with_type(g.cache_type, [&](auto to) { return append<decltype(from), decltype(to)>(g, stream); });
  });
}

Error prepare_kv_cache_append() {
  return once_per_device(
      [] { return first_error({prepare_from<float>(), prepare_from<bfloat16>(), prepare_from<float16>()}); });
}

}  // namespace jaxkern::cuda
