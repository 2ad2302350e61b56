// The launches of MLA prefill and of its gradients.
#include "cuda/mla_prefill/mla_prefill.h"

#include <algorithm>

#include "cuda/mla_prefill/backward.h"
#include "cuda/mla_prefill/forward.h"
#include "cuda/softmax.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

// Tiles of `rows` tokens, so that there are two for a block of threads if there are more than multiprocessors.
HeadTiles head_tiles(int64_t batch, int64_t tokens, int64_t heads, int rows) {
  int64_t tiles = ceil_div(tokens, rows), together = batch * heads * tiles <= multiprocessors() ? 1 : 2;
  return {.batch = static_cast<int>(batch),
          .heads = static_cast<int>(heads),
          .tiles = static_cast<int>(tiles),
          .together = static_cast<int>(together),
          .units = static_cast<int>(ceil_div(batch * heads, together) * tiles)};
}

// Of [batch, tokens, heads, width], boxes of `rows` tokens. Of 16 bits no more than the size of an element matters.
template <typename Shapes>
Error map_heads(TensorMap& map, const Shapes& g, const void* data, int64_t width, int rows) {
  int64_t columns = g.heads * width;
  return tensor_map<3>(map, data, Element::bfloat16, {columns, g.tokens, g.batch},
                       {columns * 2, columns * 2 * g.tokens}, {64, rows, 1}, Swizzle::bytes_128);
}

template <typename Number, int key_width>
Error prefill(const MlaPrefill& g, Stream stream) {
  using Kernel = MlaPrefillKernel<Number, key_width>;
  int64_t spans = g.batch * g.tokens;
  MlaPrefillParams p = {.q = {},
                        .k = {},
                        .v = {},
                        .out = {},
                        .first = {g.first, spans},
                        .last = {g.last, spans},
                        .lse = {g.lse, spans * g.heads},
                        .tiles = head_tiles(g.batch, g.tokens, g.heads, Kernel::query_rows),
                        .tokens = static_cast<int>(g.tokens),
                        .scale_log2 = g.softmax_scale * log2e};
  Error error = first_error({map_heads(p.q, g, g.q, key_width, Kernel::query_rows),
                             map_heads(p.k, g, g.k, key_width, Kernel::key_rows),
                             map_heads(p.v, g, g.v, prefill_value_width, Kernel::key_rows),
                             map_heads(p.out, g, g.out, prefill_value_width, 16)});
  if (!error.empty()) return error;
  return launch<Kernel>(std::min(p.tiles.units, multiprocessors()), 1, p, stream);
}

template <typename Number>
Error prefill(const MlaPrefill& g, Stream stream) {
  return g.key_width == 192 ? prefill<Number, 192>(g, stream) : prefill<Number, 128>(g, stream);
}

// `query_rows` and `key_rows`: of queries and of keys that a copy brings.
template <typename Kernel>
Error backward(const MlaPrefillBackward& g, int query_rows, int key_rows, Stream stream) {
  int64_t rows = ceil_div(g.tokens, prefill_tile_rows) * prefill_tile_rows, all = g.batch * rows;
  MlaPrefillBackwardParams p = {.q = {},
                                .k = {},
                                .v = {},
                                .d_out = {},
                                .dq = {},
                                .dk = {},
                                .dv = {},
                                .lse = {g.lse, all * g.heads},
                                .delta = {g.delta, all * g.heads},
                                .spans = {g.spans, 2 * all},
                                .bounds = {g.bounds, all / prefill_block_rows * 4},
                                .tiles = head_tiles(g.batch, g.tokens, g.heads, prefill_tile_rows),
                                .tokens = static_cast<int>(g.tokens),
                                .padded = static_cast<int>(rows),
                                .softmax_scale = g.softmax_scale,
                                .scale_log2 = g.softmax_scale * log2e};
  Error error = first_error(
      {map_heads(p.q, g, g.q, g.key_width, query_rows), map_heads(p.k, g, g.k, g.key_width, key_rows),
       map_heads(p.v, g, g.v, prefill_value_width, key_rows),
       map_heads(p.d_out, g, g.d_out, prefill_value_width, query_rows), map_heads(p.dq, g, g.dq, g.key_width, 16),
       map_heads(p.dk, g, g.dk, g.key_width, 16), map_heads(p.dv, g, g.dv, prefill_value_width, 16)});
  if (!error.empty()) return error;
  return launch<Kernel>(std::min(p.tiles.units, multiprocessors()), 1, p, stream);
}

template <int key_width>
Error backward(const MlaPrefillBackward& g, Stream stream) {
  using Keys = MlaPrefillKeysKernel<key_width>;
  using Queries = MlaPrefillQueriesKernel<key_width>;
  Error error = backward<Keys>(g, Keys::block_rows, Keys::tile_rows, stream);
  return error.empty() ? backward<Queries>(g, Keys::tile_rows, Keys::block_rows, stream) : error;
}

}  // namespace

Error mla_prefill(const MlaPrefill& g, Stream stream) {
  if (g.batch * g.tokens * g.heads == 0) return {};
  return g.type == Float::float16 ? prefill<float16>(g, stream) : prefill<bfloat16>(g, stream);
}

Error mla_prefill_backward(const MlaPrefillBackward& g, Stream stream) {
  if (g.batch * g.tokens * g.heads == 0) return {};
  return g.key_width == 192 ? backward<192>(g, stream) : backward<128>(g, stream);
}

Error prepare_mla_prefill() {
  return once_per_device([] {
    return first_error({prepare<MlaPrefillKernel<bfloat16, 192>>(), prepare<MlaPrefillKernel<bfloat16, 128>>(),
                        prepare<MlaPrefillKernel<float16, 192>>(), prepare<MlaPrefillKernel<float16, 128>>()});
  });
}

Error prepare_mla_prefill_backward() {
  return once_per_device([] {
    return first_error({prepare<MlaPrefillKeysKernel<192>>(), prepare<MlaPrefillKeysKernel<128>>(),
                        prepare<MlaPrefillQueriesKernel<192>>(), prepare<MlaPrefillQueriesKernel<128>>()});
  });
}

}  // namespace jaxkern::cuda
