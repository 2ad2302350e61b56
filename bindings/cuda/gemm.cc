#include "cuda/gemm/gemm.h"

#include "bindings/cuda/launch.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

// The scales of (1, 128) blocks, of a always and of b where it has them, lie with m or n contiguous: a layout, which
// the shapes that a handler sees do not tell of. jaxkern/gemm.py asks for it.
ffi::Error gemm(cuda::Stream stream, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales, Buffer accumulator,
                Result out, ffi::Span<const int64_t> b_block, int64_t accumulate) {
  Check check("gemm");
  check.rank("a", a, 3);
  check.rank("b", b, 3);
  check.that(b_block.size() == 2 && (b_block[0] == 1 || b_block[0] == 128) && b_block[1] == 128,
             "b_block must be (1, 128) or (128, 128)");
  if (check.failed()) return check.error();
  int64_t batch = a.dimensions()[0], m = a.dimensions()[1], k = a.dimensions()[2];
  int64_t b_batch = b.dimensions()[0], n = b.dimensions()[1];

  check.dtype("a", a, {F8E4M3FN});
  check.shape("a_scales", a_scales, {batch, m, blocks_of(k, 128)});
  check.dtype("a_scales", a_scales, {F32});
  check.that(b_batch == 1 || b_batch == batch, "b must have a's batch or one matrix");
  check.shape("b", b, {b_batch, n, k});
  check.dtype("b", b, {F8E4M3FN});
  check.shape("b_scales", b_scales, {b_batch, blocks_of(n, b_block[0]), blocks_of(k, 128)});
  check.dtype("b_scales", b_scales, {F32});
  check.that(n % 16 == 0 && k % 16 == 0, "n and k must be multiples of 16");
  check.shape("out", *out, {batch, m, n});
  check.dtype("out", *out, {F32, BF16});
  if (accumulate) {
    check.shape("accumulator", accumulator, {batch, m, n});
    check.dtype("accumulator", accumulator, {out->element_type()});
  }
  check.that(aligned({a.untyped_data(), a_scales.untyped_data(), b.untyped_data(), b_scales.untyped_data(),
                      accumulator.untyped_data(), out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("gemm", cuda::gemm({.a = static_cast<const uint8_t*>(a.untyped_data()),
                                      .a_scales = a_scales.typed_data<float>(),
                                      .b = static_cast<const uint8_t*>(b.untyped_data()),
                                      .b_scales = b_scales.typed_data<float>(),
                                      .accumulator = accumulate ? accumulator.untyped_data() : nullptr,
                                      .out = out->untyped_data(),
                                      .out_is_float32 = out->element_type() == F32,
                                      .b_block = static_cast<int>(b_block[0]),
                                      .batch = batch,
                                      .b_batch = b_batch,
                                      .m = m,
                                      .n = n,
                                      .k = k},
                                     stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(
    gemm, 1,
    signature(Operands<5>{}, Results<1>{}).Attr<ffi::Span<const int64_t>>("b_block").Attr<int64_t>("accumulate"));

}  // namespace jaxkern
