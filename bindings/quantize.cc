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

ffi::Error quantize_along_tokens(ffi::ThreadPool pool, Buffer x, Buffer group_sizes, Result values, Result scales,
                                 int64_t group_alignment, std::string_view scale_format) {
  Check check("quantize_along_tokens");
  check.rank("x", x, 2);
  check.rank("group_sizes", group_sizes, 1);
  check.rank("values", *values, 2);
  if (check.failed()) return check.error();
  int64_t t = x.dimensions()[0], m = x.dimensions()[1], tokens = values->dimensions()[1];
  check.dtype("x", x, {F32, BF16, F16});
  check.dtype("group_sizes", group_sizes, {S32});
  check.that(is_size(group_alignment), "group_alignment must be a positive int32");
  check.that(tokens % 128 == 0, "the tokens of values must be a multiple of 128");
  check.shape("values", *values, {m, tokens});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {m, tokens / 128});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  if (check.failed()) return check.error();

  cpu::quantize_along_tokens({.x = x.untyped_data(),
                              .x_type = dtype_of(x.element_type()),
                              .group_sizes = group_sizes.typed_data<int32_t>(),
                              .groups = group_sizes.dimensions()[0],
                              .alignment = group_alignment,
                              .values = static_cast<uint8_t*>(values->untyped_data()),
                              .scales = scales->untyped_data(),
                              .scale_type = dtype_of(scales->element_type()),
                              .power_of_two = scale_format != "float32",
                              .t = t,
                              .m = m,
                              .tokens = tokens},
                             threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error swiglu_quantize(ffi::ThreadPool pool, Buffer gate, Buffer up, Buffer weights, Buffer num_rows, Result values,
                           Result scales, int64_t paired, int64_t weighted, int64_t counted,
                           std::string_view scale_format) {
  Check check("swiglu_quantize");
  check.rank("gate", gate, 3);
  if (check.failed()) return check.error();
  int64_t batch = gate.dimensions()[0], m = gate.dimensions()[1], stride = gate.dimensions()[2];
  int64_t width = paired ? stride : stride / 2;
  check.dtype("gate", gate, {F32, BF16, F16});
  check.that(paired || stride % 2 == 0, "gate and up must have the same width");
  if (paired) {
    check.shape("up", up, {batch, m, width});
    check.dtype("up", up, {gate.element_type()});
  }
  if (weighted) {
    check.shape("weights", weights, {batch, m});
    check.dtype("weights", weights, {F32});
  }
  if (counted) {
    check.shape("num_rows", num_rows, {batch, 1});
    check.dtype("num_rows", num_rows, {S32});
  }
  check.shape("values", *values, {batch, m, width});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {batch, m, blocks_of(width, 128)});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  if (check.failed()) return check.error();

  cpu::DType type = dtype_of(gate.element_type());
  const char* second_half = static_cast<const char*>(gate.untyped_data()) + width * cpu::size_of(type);
  cpu::swiglu_quantize({.gate = gate.untyped_data(),
                        .up = paired ? up.untyped_data() : second_half,
                        .stride = stride,
                        .type = type,
                        .weights = weighted ? weights.typed_data<float>() : nullptr,
                        .num_rows = counted ? num_rows.typed_data<int32_t>() : nullptr,
                        .values = static_cast<uint8_t*>(values->untyped_data()),
                        .scales = scales->untyped_data(),
                        .scale_type = dtype_of(scales->element_type()),
                        .power_of_two = scale_format != "float32",
                        .batch = batch,
                        .m = m,
                        .width = width},
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    quantize_along_tokens_v1, quantize_along_tokens,
    signature(Operands<2>{}, Results<2>{}).Attr<int64_t>("group_alignment").Attr<std::string_view>("scale_format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(swiglu_quantize_v2, swiglu_quantize,
                              signature(Operands<4>{}, Results<2>{})
                                  .Attr<int64_t>("paired")
                                  .Attr<int64_t>("weighted")
                                  .Attr<int64_t>("counted")
                                  .Attr<std::string_view>("scale_format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dequantize_v1, dequantize,
                              signature(Operands<2>{}, Results<1>{})
                                  .Attr<ffi::Span<const int64_t>>("block_shape")
                                  .Attr<std::string_view>("dtype"));

}  // namespace jaxkern
