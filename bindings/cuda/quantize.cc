#include "cuda/quantize/quantize.h"

#include <string_view>

#include "bindings/cuda/launch.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

// The scales of (1, 128) blocks lie with m contiguous, as in gemm.
ffi::Error quantize(cuda::Stream stream, Buffer x, Result values, Result scales, ffi::Span<const int64_t> block_shape,
                    std::string_view scale_format) {
  Check check("quantize");
  check.rank("x", x, 3);
  check.that(block_shape.size() == 2 && (block_shape[0] == 1 || block_shape[0] == 128) && block_shape[1] == 128,
             "block_shape must be (1, 128) or (128, 128)");
  if (check.failed()) return check.error();
  int64_t batch = x.dimensions()[0], m = x.dimensions()[1], k = x.dimensions()[2];

  check.dtype("x", x, {F32, BF16, F16});
  check.shape("values", *values, {batch, m, k});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {batch, blocks_of(m, block_shape[0]), blocks_of(k, 128)});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  check.that(aligned({x.untyped_data(), values->untyped_data(), scales->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("quantize", cuda::quantize({.x = x.untyped_data(),
                                              .x_type = float_of(x.element_type()),
                                              .values = static_cast<uint8_t*>(values->untyped_data()),
                                              .scales = scales->untyped_data(),
                                              .scale_format = scale_format_of(scale_format),
                                              .block_m = static_cast<int>(block_shape[0]),
                                              .batch = batch,
                                              .m = m,
                                              .k = k},
                                             stream));
}

ffi::Error quantize_along_tokens(cuda::Stream stream, Buffer x, Buffer group_sizes, Result values, Result scales,
                                 int64_t group_alignment, std::string_view scale_format) {
  Check check("quantize_along_tokens");
  check.rank("x", x, 2);
  check.rank("group_sizes", group_sizes, 1);
  check.rank("values", *values, 2);
  if (check.failed()) return check.error();
  int64_t t = x.dimensions()[0], m = x.dimensions()[1], groups = group_sizes.dimensions()[0];
  int64_t tokens = values->dimensions()[1];

  check.dtype("x", x, {F32, BF16, F16});
  check.dtype("group_sizes", group_sizes, {S32});
  check.that(groups <= cuda::most_groups && t <= cuda::most_grouped, "too many groups, or tokens in them");
  check.that(is_size(group_alignment), "group_alignment must be a positive int32");
  check.that(tokens % 128 == 0 && is_size(tokens + 1), "values must have a multiple of 128 tokens");
  check.shape("values", *values, {m, tokens});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {m, tokens / 128});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  check.that(aligned({x.untyped_data(), values->untyped_data(), scales->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("quantize_along_tokens",
                  cuda::quantize_along_tokens({.x = x.untyped_data(),
                                               .x_type = float_of(x.element_type()),
                                               .group_sizes = group_sizes.typed_data<int32_t>(),
                                               .groups = groups,
                                               .alignment = group_alignment,
                                               .values = static_cast<uint8_t*>(values->untyped_data()),
                                               .scales = scales->untyped_data(),
                                               .scale_format = scale_format_of(scale_format),
                                               .t = t,
                                               .m = m,
                                               .tokens = tokens},
                                              stream));
}

ffi::Error swiglu_quantize(cuda::Stream stream, Buffer gate, Buffer up, Buffer weights, Buffer num_rows, Result values,
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
  check.that(is_size(batch * m + 1), "gate must have less than 2^31 rows");
  check.shape("values", *values, {batch, m, width});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {batch, m, blocks_of(width, 128)});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  check.that(aligned({gate.untyped_data(), up.untyped_data(), values->untyped_data(), scales->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  int64_t element = gate.element_type() == F32 ? 4 : 2;
  const char* second_half = static_cast<const char*>(gate.untyped_data()) + width * element;
  return to_error("swiglu_quantize",
                  cuda::swiglu_quantize({.gate = gate.untyped_data(),
                                         .up = paired ? up.untyped_data() : second_half,
                                         .type = float_of(gate.element_type()),
                                         .stride = stride,
                                         .weights = weighted ? weights.typed_data<float>() : nullptr,
                                         .num_rows = counted ? num_rows.typed_data<int32_t>() : nullptr,
                                         .values = static_cast<uint8_t*>(values->untyped_data()),
                                         .scales = scales->untyped_data(),
                                         .scale_format = scale_format_of(scale_format),
                                         .batch = batch,
                                         .m = m,
                                         .width = width},
                                        stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(quantize, 1,
                        signature(Operands<1>{}, Results<2>{})
                            .Attr<ffi::Span<const int64_t>>("block_shape")
                            .Attr<std::string_view>("scale_format"));

JAXKERN_HOPPER_HANDLERS(
    quantize_along_tokens, 1,
    signature(Operands<2>{}, Results<2>{}).Attr<int64_t>("group_alignment").Attr<std::string_view>("scale_format"));

JAXKERN_HOPPER_HANDLERS(swiglu_quantize, 2,
                        signature(Operands<4>{}, Results<2>{})
                            .Attr<int64_t>("paired")
                            .Attr<int64_t>("weighted")
                            .Attr<int64_t>("counted")
                            .Attr<std::string_view>("scale_format"));

}  // namespace jaxkern
