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

  return to_error("gemm", cuda::gemm({.a = a.untyped_data(),
                                      .a_scales = a_scales.typed_data<float>(),
                                      .b = b.untyped_data(),
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

void check_groups(Check& check, const Buffer& group_sizes, int64_t groups, int64_t alignment, int64_t stride,
                  int64_t all) {
  check.shape("group_sizes", group_sizes, {groups});
  check.dtype("group_sizes", group_sizes, {S32});
  check.that(groups <= cuda::most_groups && all <= cuda::most_grouped, "too many groups, or rows in them");
  check.that(is_size(alignment) && (stride == 0 || is_size(stride)),
             "group_alignment and group_stride must be positive int32, or group_stride 0");
}

ffi::Error grouped_gemm(cuda::Stream stream, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales, Buffer group_sizes,
                        Result out, ffi::Span<const int64_t> b_block, int64_t group_alignment, int64_t group_stride,
                        int64_t zero_gaps) {
  Check check("grouped_gemm");
  check.rank("a", a, 3);
  check.rank("b", b, 3);
  check.that(b_block.size() == 2 &&
                 (b_block[1] == 128 ? b_block[0] == 1 || b_block[0] == 128 : b_block[0] == 0 && b_block[1] == 0),
             "b_block must be (1, 128), (128, 128) or, without scales, (0, 0)");
  if (check.failed()) return check.error();
  int64_t m = a.dimensions()[1], k = a.dimensions()[2], groups = b.dimensions()[0], n = b.dimensions()[1];

  bool scaled = b_block[0] != 0;
  check.shape("a", a, {1, m, k});
  check.dtype("a", a, {scaled ? F8E4M3FN : BF16});
  check.shape("b", b, {groups, n, k});
  check.dtype("b", b, {a.element_type()});
  if (scaled) {
    check.shape("a_scales", a_scales, {1, m, blocks_of(k, 128)});
    check.shape("b_scales", b_scales, {groups, blocks_of(n, b_block[0]), blocks_of(k, 128)});
  }
  check.dtype("a_scales", a_scales, {F32});
  check.dtype("b_scales", b_scales, {F32});
  check.that(n % 16 == 0 && k % 16 == 0, "n and k must be multiples of 16");
  check_groups(check, group_sizes, groups, group_alignment, group_stride, m);
  check.shape("out", *out, {m, n});
  check.dtype("out", *out, {F32, BF16});
  check.that(aligned({a.untyped_data(), a_scales.untyped_data(), b.untyped_data(), b_scales.untyped_data(),
                      out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("grouped_gemm", cuda::grouped_gemm({.a = a.untyped_data(),
                                                      .a_scales = a_scales.typed_data<float>(),
                                                      .b = b.untyped_data(),
                                                      .b_scales = b_scales.typed_data<float>(),
                                                      .group_sizes = group_sizes.typed_data<int32_t>(),
                                                      .out = out->untyped_data(),
                                                      .out_is_float32 = out->element_type() == F32,
                                                      .b_block = static_cast<int>(b_block[0]),
                                                      .zero_gaps = zero_gaps != 0,
                                                      .groups = groups,
                                                      .alignment = group_alignment,
                                                      .stride = group_stride,
                                                      .m = m,
                                                      .n = n,
                                                      .k = k},
                                                     stream));
}

// a [m, t], b [n, t] of e4m3, scaled along t; their scales lie with m and n contiguous. Or a [t, m], b [t, n] of
// bfloat16.
ffi::Error k_grouped_gemm(cuda::Stream stream, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales, Buffer group_sizes,
                          Buffer accumulator, Result out, int64_t group_alignment, int64_t group_stride,
                          int64_t accumulate) {
  Check check("k_grouped_gemm");
  check.rank("a", a, 2);
  check.rank("b", b, 2);
  check.rank("group_sizes", group_sizes, 1);
  if (check.failed()) return check.error();
  bool scaled = a.element_type() != BF16;
  int rows = scaled ? 0 : 1;  // the axis of a and b that is not t
  int64_t m = a.dimensions()[rows], t = a.dimensions()[1 - rows], n = b.dimensions()[rows];
  int64_t groups = group_sizes.dimensions()[0];

  check.dtype("a", a, {F8E4M3FN, BF16});
  check.dtype("b", b, {a.element_type()});
  check.dtype("a_scales", a_scales, {F32});
  check.dtype("b_scales", b_scales, {F32});
  if (scaled) {
    check.shape("a_scales", a_scales, {m, blocks_of(t, 128)});
    check.shape("b", b, {n, t});
    check.shape("b_scales", b_scales, {n, blocks_of(t, 128)});
    check.that(n % 16 == 0 && t % 16 == 0, "n and t must be multiples of 16");
    check.that((group_stride ? group_stride : group_alignment) % 128 == 0, "groups must start at multiples of 128");
  } else {
    check.shape("b", b, {t, n});
    check.that(m % 8 == 0 && n % 8 == 0, "m and n must be multiples of 8");
  }
  check_groups(check, group_sizes, groups, group_alignment, group_stride, t);
  check.shape("out", *out, {groups, m, n});
  check.dtype("out", *out, {F32});
  if (accumulate) {
    check.shape("accumulator", accumulator, {groups, m, n});
    check.dtype("accumulator", accumulator, {F32});
  }
  check.that(aligned({a.untyped_data(), a_scales.untyped_data(), b.untyped_data(), b_scales.untyped_data(),
                      accumulator.untyped_data(), out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("k_grouped_gemm",
                  cuda::k_grouped_gemm({.scaled = scaled,
                                        .a = a.untyped_data(),
                                        .a_scales = a_scales.typed_data<float>(),
                                        .b = b.untyped_data(),
                                        .b_scales = b_scales.typed_data<float>(),
                                        .group_sizes = group_sizes.typed_data<int32_t>(),
                                        .accumulator = accumulate ? accumulator.typed_data<float>() : nullptr,
                                        .out = out->typed_data<float>(),
                                        .groups = groups,
                                        .alignment = group_alignment,
                                        .stride = group_stride,
                                        .t = t,
                                        .m = m,
                                        .n = n},
                                       stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(
    gemm, 1,
    signature(Operands<5>{}, Results<1>{}).Attr<ffi::Span<const int64_t>>("b_block").Attr<int64_t>("accumulate"));

JAXKERN_HOPPER_HANDLERS(grouped_gemm, 2,
                        signature(Operands<5>{}, Results<1>{})
                            .Attr<ffi::Span<const int64_t>>("b_block")
                            .Attr<int64_t>("group_alignment")
                            .Attr<int64_t>("group_stride")
                            .Attr<int64_t>("zero_gaps"));

JAXKERN_HOPPER_HANDLERS(k_grouped_gemm, 1,
                        signature(Operands<6>{}, Results<1>{})
                            .Attr<int64_t>("group_alignment")
                            .Attr<int64_t>("group_stride")
                            .Attr<int64_t>("accumulate"));

}  // namespace jaxkern
