// The launches of cuda/quantize/kernel.h.
#include "cuda/quantize/quantize.h"

#include <initializer_list>

#include "cuda/quantize/kernel.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Kernel, typename T>
Error launch_tiles(const Quantize& q, int tile_m, int tile_k, Stream stream) {
  QuantizeParams<T> p = {};
  int64_t k_blocks = ceil_div(q.k, block_k), scales = q.batch * ceil_div(q.m, q.block_m) * k_blocks;
  p.x = {static_cast<const T*>(q.x), q.batch * q.m * q.k};
  p.values = {q.values, q.batch * q.m * q.k};
  if (q.scale_format == ScaleFormat::ue8m0)
    p.exponents = {static_cast<uint8_t*>(q.scales), scales};
  else
    p.scales = {static_cast<float*>(q.scales), scales};
  p.power_of_two = q.scale_format != ScaleFormat::float32;
  p.vectors = q.k % per_load<T> == 0 && aligned(q.x) && aligned(q.values);
  p.m = q.m;
  p.k = q.k;
  p.m_tiles = ceil_div(q.m, tile_m);
  p.k_tiles = ceil_div(k_blocks, tile_k);
  return launch<Kernel>(q.batch * p.m_tiles * p.k_tiles, 1, p, stream);
}

template <typename T>
Error launch_type(const Quantize& q, Stream stream) {
  using Rows = QuantizeRows<T>;
  if (q.block_m == 1) return launch_tiles<Rows, T>(q, Rows::tile_m, Rows::tile_k, stream);
  return launch_tiles<QuantizeBlocks<T>, T>(q, 128, 1, stream);
}

}  // namespace

Error quantize(const Quantize& q, Stream stream) {
  if (q.batch * q.m * q.k == 0) return {};
  switch (q.x_type) {
    case Float::float32:
      return launch_type<float>(q, stream);
    case Float::bfloat16:
      return launch_type<bfloat16>(q, stream);
    default:
      return launch_type<float16>(q, stream);
  }
}

Error prepare_quantize() {
  return once_per_device([] {
    return first_error({prepare<QuantizeRows<float>>(), prepare<QuantizeRows<bfloat16>>(),
                        prepare<QuantizeRows<float16>>(), prepare<QuantizeBlocks<float>>(),
                        prepare<QuantizeBlocks<bfloat16>>(), prepare<QuantizeBlocks<float16>>()});
  });
}

}  // namespace jaxkern::cuda
