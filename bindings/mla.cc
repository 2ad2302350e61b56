#include "cpu/mla.h"

#include "bindings/common.h"
#include "bindings/mla.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

ffi::Error mla_decode(ffi::ThreadPool pool, Buffer q, Buffer cache, Buffer block_table, Buffer seq_lens, Result out,
                      Result lse, float softmax_scale, int64_t latent_dim, int64_t causal, int64_t num_splits) {
  Check check("mla_decode");
  check.rank("q", q, 4);
  check.rank("cache", cache, 3);
  check.rank("block_table", block_table, 2);
  if (check.failed()) return check.error();
  int64_t batch = q.dimensions()[0], queries = q.dimensions()[1], heads = q.dimensions()[2], width = q.dimensions()[3];
  int64_t pages = cache.dimensions()[0], page = cache.dimensions()[1], table_pages = block_table.dimensions()[1];
  check.that(latent_dim > 0 && latent_dim <= width, "latent_dim must be from 1 to q's last size");
  check.that(0 <= num_splits && num_splits <= 1024, "num_splits must be in 0..1024");
  bool packed = cache.element_type() == U8;
  check.that(!packed || latent_dim % 4 == 0, "latent_dim of a packed cache must be a multiple of 4");
  int64_t row = packed ? cpu::row_bytes(cpu::DType::e4m3, width, latent_dim) : width;
  check.dtype("q", q, {F32, BF16, F16});
  check.shape("cache", cache, {pages, page, row});
  check.dtype("cache", cache, {F32, BF16, F16, U8});
  check.shape("block_table", block_table, {batch, table_pages});
  check.dtype("block_table", block_table, {S32});
  check.shape("seq_lens", seq_lens, {batch});
  check.dtype("seq_lens", seq_lens, {S32});
  check.shape("out", *out, {batch, queries, heads, latent_dim});
  check.dtype("out", *out, {q.element_type()});
  check.shape("lse", *lse, {batch, queries, heads});
  check.dtype("lse", *lse, {F32});
  if (check.failed()) return check.error();

  cpu::mla_decode({.q = q.untyped_data(),
                   .q_type = dtype_of(q.element_type()),
                   .cache = cache.untyped_data(),
                   .cache_type = packed ? cpu::DType::e4m3 : dtype_of(cache.element_type()),
                   .block_table = static_cast<const int32_t*>(block_table.untyped_data()),
                   .seq_lens = static_cast<const int32_t*>(seq_lens.untyped_data()),
                   .out = out->untyped_data(),
                   .lse = static_cast<float*>(lse->untyped_data()),
                   .softmax_scale = softmax_scale,
                   .causal = causal != 0,
                   .num_splits = num_splits,
                   .batch = batch,
                   .queries = queries,
                   .heads = heads,
                   .width = width,
                   .latent = latent_dim,
                   .pages = pages,
                   .page = page,
                   .table_pages = table_pages},
                  threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error merge_attention(ffi::ThreadPool pool, Buffer outs, Buffer lses, Result out, Result lse) {
  Check check("merge_attention");
  MergeSizes s = check_merge(check, outs, lses, *out, *lse);
  if (check.failed()) return check.error();

  cpu::merge_attention({.outs = outs.untyped_data(),
                        .type = dtype_of(outs.element_type()),
                        .lses = static_cast<const float*>(lses.untyped_data()),
                        .out = out->untyped_data(),
                        .lse = static_cast<float*>(lse->untyped_data()),
                        .parts = s.parts,
                        .rows = s.rows,
                        .width = s.width},
                       threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_decode_v1, mla_decode,
                              signature(Operands<4>{}, Results<2>{})
                                  .Attr<float>("softmax_scale")
                                  .Attr<int64_t>("latent_dim")
                                  .Attr<int64_t>("causal")
                                  .Attr<int64_t>("num_splits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(merge_attention_v1, merge_attention, signature(Operands<2>{}, Results<2>{}));

}  // namespace jaxkern
