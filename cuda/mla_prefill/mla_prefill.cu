// The launch of MLA prefill.
#include "cuda/mla_prefill/mla_prefill.h"

#include <algorithm>

#include "cuda/mla_prefill/forward.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

template <typename Number, int key_width>
Error prefill(const MlaPrefill& g, Stream stream) {
  using Kernel = MlaPrefillKernel<Number, key_width>;
  int64_t tiles = ceil_div(g.tokens, Kernel::query_rows), spans = g.batch * g.tokens;
  int64_t together = g.batch * g.heads * tiles <= multiprocessors() ? 1 : 2;
  int64_t units = ceil_div(g.batch * g.heads, together) * tiles;
  MlaPrefillParams p = {.q = {},
                        .k = {},
                        .v = {},
                        .out = {},
                        .first = {g.first, spans},
                        .last = {g.last, spans},
                        .lse = {g.lse, spans * g.heads},
                        .batch = static_cast<int>(g.batch),
                        .tokens = static_cast<int>(g.tokens),
                        .heads = static_cast<int>(g.heads),
                        .tiles = static_cast<int>(tiles),
                        .together = static_cast<int>(together),
                        .units = static_cast<int>(units),
                        .scale_log2 = g.softmax_scale * log2e};
  // Of 16 bits no more than the size of an element matters.
  auto map = [&](TensorMap& map, const void* data, int64_t width, int rows) {
    int64_t columns = g.heads * width;
    return tensor_map<3>(map, data, Element::bfloat16, {columns, g.tokens, g.batch},
                         {columns * 2, columns * 2 * g.tokens}, {64, rows, 1}, Swizzle::bytes_128);
  };
  Error error =
      first_error({map(p.q, g.q, key_width, Kernel::query_rows), map(p.k, g.k, key_width, Kernel::key_rows),
                   map(p.v, g.v, prefill_value_width, Kernel::key_rows), map(p.out, g.out, prefill_value_width, 16)});
  if (!error.empty()) return error;
  return launch<Kernel>(std::min<int64_t>(units, multiprocessors()), 1, p, stream);
}

template <typename Number>
Error prefill(const MlaPrefill& g, Stream stream) {
  return g.key_width == 192 ? prefill<Number, 192>(g, stream) : prefill<Number, 128>(g, stream);
}

}  // namespace

Error mla_prefill(const MlaPrefill& g, Stream stream) {
  if (g.batch * g.tokens * g.heads == 0) return {};
  return g.type == Float::float16 ? prefill<float16>(g, stream) : prefill<bfloat16>(g, stream);
}

Error prepare_mla_prefill() {
  return once_per_device([] {
    return first_error({prepare<MlaPrefillKernel<bfloat16, 192>>(), prepare<MlaPrefillKernel<bfloat16, 128>>(),
                        prepare<MlaPrefillKernel<float16, 192>>(), prepare<MlaPrefillKernel<float16, 128>>()});
  });
}

}  // namespace jaxkern::cuda
