// The launches of the kernels here.
#include "cuda/quantize/quantize.h"

#include <algorithm>

#include "cuda/quantize/kernel.h"
#include "cuda/quantize/swiglu.h"
#include "cuda/quantize/tokens.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

template <typename Kernel, typename T>
Error launch_tiles(const Quantize& q, int tile_m, int tile_k, Stream stream) {
  int64_t k_blocks = ceil_div(q.k, block_k), elements = q.batch * q.m * q.k;
  QuantizeParams<T> p =
      quantize_params<T>(q.values, q.scales, q.scale_format, elements, q.batch * ceil_div(q.m, q.block_m) * k_blocks);
  p.x = {static_cast<const T*>(q.x), elements};
  p.vectors = q.k % per_load<T> == 0;
  p.m = q.m;
  p.k = q.k;
  p.m_tiles = ceil_div(q.m, tile_m);
  p.k_tiles = ceil_div(k_blocks, tile_k);
  return launch<Kernel>(q.batch * p.m_tiles * p.k_tiles, 1, p, stream);
}

}  // namespace

Error quantize(const Quantize& q, Stream stream) {
  if (q.batch * q.m * q.k == 0) return {};
  return with_type(q.x_type, [&](auto type) {
    using T = decltype(type);
    using Rows = QuantizeRows<T>;
    if (q.block_m == 1) return launch_tiles<Rows, T>(q, Rows::tile_m, Rows::tile_k, stream);
    return launch_tiles<QuantizeBlocks<T>, T>(q, 128, 1, stream);
  });
}

Error quantize_along_tokens(const QuantizeAlongTokens& q, Stream stream) {
  if (q.m * q.tokens == 0) return {};
  return with_type(q.x_type, [&](auto type) {
    using T = decltype(type);
    using Kernel = QuantizeTokens<T>;
    TokensParams<T> p = {};
    p.x = {static_cast<const T*>(q.x), q.t * q.m};
    p.groups = {.sizes = {q.group_sizes, q.groups},
                .count = static_cast<int>(q.groups),
                .alignment = static_cast<int>(q.alignment),
                .stride = 0,
                .all = static_cast<int>(q.t)};
    p.quantized =
        quantize_params<float>(q.values, q.scales, q.scale_format, q.m * q.tokens, q.m * (q.tokens / block_k));
    p.quantized.m = q.m;
    p.quantized.k = q.tokens;
    p.quantized.m_tiles = ceil_div(q.m, Kernel::columns);
    p.quantized.k_tiles = q.tokens / block_k;
    int64_t tiles = int64_t(p.quantized.m_tiles) * p.quantized.k_tiles;
    return launch<Kernel>(std::min<int64_t>(tiles, multiprocessors() * Kernel::resident), 1, p, stream);
  });
}

Error swiglu_quantize(const SwigluQuantize& q, Stream stream) {
  int64_t rows = q.batch * q.m, k_blocks = ceil_div(q.width, block_k);
  if (rows * q.width == 0) return {};
  return with_type(q.type, [&](auto type) {
    using T = decltype(type);
    using Kernel = QuantizeSwiglu<T>;
    SwigluParams<T> p = {};
    int64_t elements = (rows - 1) * q.stride + q.width;
    p.gate = {static_cast<const T*>(q.gate), elements};
    p.up = {static_cast<const T*>(q.up), elements};
    p.weights = {q.weights, q.weights ? rows : 0};
    p.num_rows = {q.num_rows, q.num_rows ? q.batch : 0};
    p.quantized = quantize_params<float>(q.values, q.scales, q.scale_format, rows * q.width, rows * k_blocks);
    p.quantized.vectors = q.width % 4 == 0;
    p.quantized.m = rows;
    p.quantized.k = q.width;
    p.quantized.m_tiles = ceil_div(rows, Kernel::tile_m);
    p.quantized.k_tiles = k_blocks;
    p.batch_rows = q.m;
    p.stride = q.stride;
    return launch<Kernel>(p.quantized.m_tiles * k_blocks, 1, p, stream);
  });
}

Error prepare_quantize() {
  return once_per_device([] {
    return first_error({prepare<QuantizeRows<float>>(), prepare<QuantizeRows<bfloat16>>(),
                        prepare<QuantizeRows<float16>>(), prepare<QuantizeBlocks<float>>(),
                        prepare<QuantizeBlocks<bfloat16>>(), prepare<QuantizeBlocks<float16>>()});
  });
}

Error prepare_quantize_along_tokens() {
  return once_per_device([] {
    return first_error(
        {prepare<QuantizeTokens<float>>(), prepare<QuantizeTokens<bfloat16>>(), prepare<QuantizeTokens<float16>>()});
  });
}

Error prepare_swiglu_quantize() {
  return once_per_device([] {
    return first_error(
        {prepare<QuantizeSwiglu<float>>(), prepare<QuantizeSwiglu<bfloat16>>(), prepare<QuantizeSwiglu<float16>>()});
  });
}

}  // namespace jaxkern::cuda
