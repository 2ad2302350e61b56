#include "cuda/quantize/quantize.h"

#include <string_view>

#include "bindings/cuda/launch.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

cuda::Float float_of(ffi::DataType type) {
  return type == BF16 ? cuda::Float::bfloat16 : type == F16 ? cuda::Float::float16 : cuda::Float::float32;
}

cuda::ScaleFormat scale_format_of(std::string_view name) {
  return name == "ue8m0"          ? cuda::ScaleFormat::ue8m0
         : name == "power_of_two" ? cuda::ScaleFormat::power_of_two
                                  : cuda::ScaleFormat::float32;
}

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

}  // namespace

JAXKERN_HOPPER_HANDLERS(quantize, 1,
                        signature(Operands<1>{}, Results<2>{})
                            .Attr<ffi::Span<const int64_t>>("block_shape")
                            .Attr<std::string_view>("scale_format"));

}  // namespace jaxkern
