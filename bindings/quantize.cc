#include "cpu/quantize.h"

#include <string_view>

#include "bindings/common.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

ffi::Error quantize(ffi::ThreadPool pool, Buffer x, Result values, Result scales, ffi::Span<const int64_t> block_shape,
                    std::string_view scale_format) {
  Check check("quantize");
  check.rank("x", x, 3);
  check.that(block_shape.size() == 2 && is_size(block_shape[0]) && is_size(block_shape[1]),
             "block_shape must be two sizes");
  if (check.failed()) return check.error();
  int64_t batch = x.dimensions()[0], m = x.dimensions()[1], k = x.dimensions()[2];
  check.dtype("x", x, {F32, BF16, F16});
  check.shape("values", *values, {batch, m, k});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {batch, blocks_of(m, block_shape[0]), blocks_of(k, block_shape[1])});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  if (check.failed()) return check.error();

  cpu::quantize({.x = x.untyped_data(),
                 .x_type = dtype_of(x.element_type()),
                 .values = static_cast<uint8_t*>(values->untyped_data()),
                 .scales = scales->untyped_data(),
                 .scale_type = dtype_of(scales->element_type()),
                 .power_of_two = scale_format != "float32",
                 .batch = batch,
                 .m = m,
                 .k = k,
                 .block_m = block_shape[0],
                 .block_k = block_shape[1]},
                threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error dequantize(ffi::ThreadPool pool, Buffer values, Buffer scales, Result x,
                      ffi::Span<const int64_t> block_shape, std::string_view) {
  Check check("dequantize");
  check.rank("values", values, 3);
  check.that(block_shape.size() == 2 && is_size(block_shape[0]) && is_size(block_shape[1]),
             "block_shape must be two sizes");
  if (check.failed()) return check.error();
  int64_t batch = values.dimensions()[0], m = values.dimensions()[1], k = values.dimensions()[2];
  check.dtype("values", values, {F8E4M3FN});
  check.shape("scales", scales, {batch, blocks_of(m, block_shape[0]), blocks_of(k, block_shape[1])});
  check.dtype("scales", scales, {F32, F8E8M0FNU});
  check.shape("x", *x, {batch, m, k});
  check.dtype("x", *x, {F32, BF16, F16});
  if (check.failed()) return check.error();

  cpu::dequantize({.values = static_cast<const uint8_t*>(values.untyped_data()),
                   .scales = scales.untyped_data(),
                   .scale_type = dtype_of(scales.element_type()),
                   .x = x->untyped_data(),
                   .x_type = dtype_of(x->element_type()),
                   .batch = batch,
                   .m = m,
                   .k = k,
                   .block_m = block_shape[0],
                   .block_k = block_shape[1]},
                  threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quantize_v1, quantize,
                              signature(Operands<1>{}, Results<2>{})
                                  .Attr<ffi::Span<const int64_t>>("block_shape")
                                  .Attr<std::string_view>("scale_format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dequantize_v1, dequantize,
                              signature(Operands<2>{}, Results<1>{})
                                  .Attr<ffi::Span<const int64_t>>("block_shape")
                                  .Attr<std::string_view>("dtype"));

}  // namespace jaxkern
