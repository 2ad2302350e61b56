// The launches of MLA decoding.
#include "cuda/mla/mla.h"

#include <algorithm>

#include "cuda/mla/decode.h"
#include "cuda/mla/merge.h"

namespace jaxkern::cuda {

namespace {

using namespace jaxkern::cuda::kernels;

template <typename Format, int cluster>
Error decode(const MlaDecode& g, Stream stream) {
  using Number = NumberOf<Format>;
  int64_t rows = g.queries * g.heads, row_groups = ceil_div(rows, mla_rows);
  if (g.batch == 0 || rows == 0) return {};
  int parts = std::min(multiprocessors(), most_mla_parts);
  if (g.num_splits > 0) parts = std::min<int64_t>(parts, g.batch * row_groups * g.num_splits);
  parts = std::max(parts - parts % cluster, cluster);
  int together = std::min<int64_t>(row_groups, parts), stretches = parts / together;
  MlaSizes sizes = {.seq_lens = {g.seq_lens, g.batch},
                    .batch = static_cast<int>(g.batch),
                    .rows = static_cast<int>(rows),
                    .row_groups = static_cast<int>(row_groups),
                    .splits = static_cast<int>(g.num_splits),
                    .together = together,
                    .stretches = stretches,
                    .longest = static_cast<int>(g.table_pages * g.page)};
  int64_t slots = mla_slots(g.batch, rows, g.num_splits);
  MlaParams<Format> p = {.q = {},
                         .cache = {},
                         .out = {},
                         .partial_out = {},
                         .packed = {static_cast<const uint8_t*>(g.cache), g.pages * g.page * mla_packed_bytes},
                         .block_table = {g.block_table, g.batch * g.table_pages},
                         .lse = {g.lse, g.batch * rows},
                         .partial_lse = {g.partial_lse, slots * mla_rows},
                         .starts = {g.starts, mla_starts(g.batch)},
                         .sizes = sizes,
                         .heads = static_cast<int>(g.heads),
                         .queries = static_cast<int>(g.queries),
                         .pages = static_cast<int>(g.pages),
                         .page = static_cast<int>(g.page),
                         .table_pages = static_cast<int>(g.table_pages),
                         .box_rows = g.page % 64 == 0   ? 64
                                     : g.page % 32 == 0 ? 32
                                                        : 16,
                         .causal = g.causal,
                         .scale_log2 = g.softmax_scale * log2e};
  // Of 16 bits no more than the size of an element matters.
  constexpr Element half = Element::bfloat16;
  constexpr Swizzle swizzle = Swizzle::bytes_128;
  Error error = tensor_map<3>(p.q, g.q, half, {mla_width, rows, g.batch}, {mla_width * 2, mla_width * 2 * rows},
                              {64, mla_rows, 1}, swizzle);
  if (error.empty() && !g.packed)
    error = tensor_map<2>(p.cache, g.cache, half, {mla_width, g.pages * g.page}, {mla_width * 2}, {64, p.box_rows},
                          swizzle);
  if (error.empty())
    error = tensor_map<3>(p.out, g.out, half, {mla_latent, rows, g.batch}, {mla_latent * 2, mla_latent * 2 * rows},
                          {64, 16, 1}, swizzle);
  if (error.empty() && g.num_splits != 1)
    error = tensor_map<3>(p.partial_out, g.partial_out, Element::float32,
                          {mla_latent, std::min<int64_t>(rows, mla_rows), slots},
                          {mla_latent * 4, mla_latent * 4 * mla_rows}, {32, 16, 1}, swizzle);
  if (error.empty()) error = launch<MlaDecodeKernel<Format, cluster>>(parts, cluster, p, stream);
  if (!error.empty() || g.num_splits == 1) return error;
  using Merge = MlaMergeKernel<Number>;
  typename Merge::Params merge = {.partial_out = {g.partial_out, slots * mla_rows * mla_latent},
                                  .partial_lse = {g.partial_lse, p.partial_lse.size},
                                  .out = {static_cast<Number*>(g.out), g.batch * rows * mla_latent},
                                  .lse = p.lse,
                                  .starts = {g.starts, p.starts.size},
                                  .sizes = sizes};
  return launch<Merge>(std::min<int64_t>(g.batch * rows, multiprocessors() * Merge::resident), 1, merge, stream);
}

}  // namespace

Error mla_decode(const MlaDecode& g, Stream stream) {
  // Groups of rows by twos, if none is left over.
  bool twos = ceil_div(g.queries * g.heads, mla_rows) % 2 == 0;
  auto decode_as = [&](auto format) {
    using Format = decltype(format);
    return twos ? decode<Format, 2>(g, stream) : decode<Format, 1>(g, stream);
  };
  if (g.packed) return decode_as(Packed{});
  return g.type == Float::float16 ? decode_as(float16{}) : decode_as(bfloat16{});
}

Error prepare_mla_decode() {
  return once_per_device([] {
    return first_error({prepare<MlaDecodeKernel<bfloat16, 1>>(), prepare<MlaDecodeKernel<bfloat16, 2>>(),
                        prepare<MlaDecodeKernel<float16, 1>>(), prepare<MlaDecodeKernel<float16, 2>>(),
                        prepare<MlaDecodeKernel<Packed, 1>>(), prepare<MlaDecodeKernel<Packed, 2>>(),
                        prepare<MlaMergeKernel<bfloat16>>(), prepare<MlaMergeKernel<float16>>()});
  });
}

Error merge_attention(const MergeAttention& g, Stream stream) {
  if (g.rows == 0) return {};
  return with_type(g.type, [&](auto type) {
    using T = decltype(type);
    using Kernel = MergeAttentionKernel<T>;
    typename Kernel::Params p = {.outs = {static_cast<const T*>(g.outs), g.parts * g.rows * g.width},
                                 .lses = {g.lses, g.parts * g.rows},
                                 .out = {static_cast<T*>(g.out), g.rows * g.width},
                                 .lse = {g.lse, g.rows},
                                 .rows = g.rows,
                                 .parts = static_cast<int>(g.parts),
                                 .width = static_cast<int>(g.width),
                                 .vectors = g.width % 4 == 0};
    int64_t blocks = ceil_div(g.rows, Kernel::threads / warp_size);
    return launch<Kernel>(std::min<int64_t>(blocks, multiprocessors() * 16), 1, p, stream);
  });
}

Error prepare_merge_attention() {
  return once_per_device([] {
    return first_error({prepare<MergeAttentionKernel<float>>(), prepare<MergeAttentionKernel<bfloat16>>(),
                        prepare<MergeAttentionKernel<float16>>()});
  });
}

}  // namespace jaxkern::cuda
