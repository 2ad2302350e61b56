#include "cuda/mla/mla.h"

#include "bindings/cuda/launch.h"
#include "bindings/mla.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

// The last three results are workspaces.
ffi::Error mla_decode(cuda::Stream stream, Buffer q, Buffer cache, Buffer block_table, Buffer seq_lens, Result out,
                      Result lse, Result starts, Result partial_out, Result partial_lse, float softmax_scale,
                      int64_t causal, int64_t num_splits) {
  Check check("mla_decode");
  check.rank("q", q, 4);
  check.rank("cache", cache, 3);
  check.rank("block_table", block_table, 2);
  check.that(0 <= num_splits && num_splits <= 1024, "num_splits must be in 0..1024");
  if (check.failed()) return check.error();
  int64_t batch = q.dimensions()[0], queries = q.dimensions()[1], heads = q.dimensions()[2];
  int64_t pages = cache.dimensions()[0], page = cache.dimensions()[1], table_pages = block_table.dimensions()[1];
  int64_t slots = cuda::mla_slots(batch, queries * heads, num_splits);

  bool packed = cache.element_type() == U8;

  check.shape("q", q, {batch, queries, heads, cuda::mla_width});
  check.dtype("q", q, {BF16, F16});
  check.shape("cache", cache, {pages, page, packed ? cuda::mla_packed_bytes : cuda::mla_width});
  check.dtype("cache", cache, {q.element_type(), U8});
  check.that(!packed || q.element_type() == BF16, "q must be bfloat16 if the cache is packed");
  check.that(pages > 0 && page > 0 && (packed || page % 16 == 0),
             "pages must hold rows, a multiple of 16 if they are not packed, and there must be some");
  check.shape("block_table", block_table, {batch, table_pages});
  check.dtype("block_table", block_table, {S32});
  check.shape("seq_lens", seq_lens, {batch});
  check.dtype("seq_lens", seq_lens, {S32});
  check.that(is_size(pages * page) && table_pages * page < (int64_t{1} << 31) && is_size(batch * queries * heads + 1) &&
                 is_size(batch * (table_pages * page / 64 + 1) + 1),
             "rows of the cache, of a table and of q, and all blocks of keys must be int32");
  check.shape("out", *out, {batch, queries, heads, cuda::mla_latent});
  check.dtype("out", *out, {q.element_type()});
  check.shape("lse", *lse, {batch, queries, heads});
  check.dtype("lse", *lse, {F32});
  check.shape("starts", *starts, {cuda::mla_starts(batch)});
  check.dtype("starts", *starts, {S32});
  check.shape("partial_out", *partial_out, {slots, cuda::mla_rows, cuda::mla_latent});
  check.dtype("partial_out", *partial_out, {F32});
  check.shape("partial_lse", *partial_lse, {slots, cuda::mla_rows});
  check.dtype("partial_lse", *partial_lse, {F32});
  check.that(aligned({q.untyped_data(), cache.untyped_data(), out->untyped_data(), partial_out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("mla_decode", cuda::mla_decode({.q = q.untyped_data(),
                                                  .cache = cache.untyped_data(),
                                                  .block_table = block_table.typed_data<int32_t>(),
                                                  .seq_lens = seq_lens.typed_data<int32_t>(),
                                                  .out = out->untyped_data(),
                                                  .lse = lse->typed_data<float>(),
                                                  .type = float_of(q.element_type()),
                                                  .packed = packed,
                                                  .starts = starts->typed_data<int32_t>(),
                                                  .partial_out = partial_out->typed_data<float>(),
                                                  .partial_lse = partial_lse->typed_data<float>(),
                                                  .softmax_scale = softmax_scale,
                                                  .causal = causal != 0,
                                                  .num_splits = num_splits,
                                                  .batch = batch,
                                                  .queries = queries,
                                                  .heads = heads,
                                                  .pages = pages,
                                                  .page = page,
                                                  .table_pages = table_pages},
                                                 stream));
}

ffi::Error merge_attention(cuda::Stream stream, Buffer outs, Buffer lses, Result out, Result lse) {
  Check check("merge_attention");
  MergeSizes s = check_merge(check, outs, lses, *out, *lse);
  check.that(is_size(s.parts + 1) && is_size(s.width + (1 << 10)), "parts and width must be int32");
  check.that(aligned({outs.untyped_data(), out->untyped_data()}), "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("merge_attention", cuda::merge_attention({.outs = outs.untyped_data(),
                                                            .type = float_of(outs.element_type()),
                                                            .lses = lses.typed_data<float>(),
                                                            .out = out->untyped_data(),
                                                            .lse = lse->typed_data<float>(),
                                                            .parts = s.parts,
                                                            .rows = s.rows,
                                                            .width = s.width},
                                                           stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(mla_decode, 1,
                        signature(Operands<4>{}, Results<5>{})
                            .Attr<float>("softmax_scale")
                            .Attr<int64_t>("causal")
                            .Attr<int64_t>("num_splits"));

JAXKERN_HOPPER_HANDLERS(merge_attention, 1, signature(Operands<2>{}, Results<2>{}));

}  // namespace jaxkern
