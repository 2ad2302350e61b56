#include "cpu/gemm.h"

#include <string_view>

#include "bindings/common.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;
using Block = ffi::Span<const int64_t>;

// A matrix [stored rows, stored columns], or a stack of them if rank is 3, with its scales; block is (0, 0) without.
cpu::Operand operand(Check& check, const char* name, const Buffer& x, const Buffer& scales, Block block,
                     bool transposed, size_t rank = 3) {
  check.rank(name, x, rank);
  check.that(
      block.size() == 2 && (block[0] == 0 || block[0] == 1 || block[0] == 128) && block[1] == (block[0] ? 128 : 0),
      "a block shape must be (0, 0), (1, 128) or (128, 128)");
  if (check.failed()) return {};
  int64_t rows = x.dimensions()[rank - 2], columns = x.dimensions()[rank - 1];
  cpu::Operand o = {};
  o.data = x.untyped_data();
  o.transposed = transposed;
  o.stride = columns;
  if (block[0]) {
    int64_t scale_rows = blocks_of(rows, block[0]), scale_columns = blocks_of(columns, block[1]);
    check.dtype(name, x, {F8E4M3FN});
    check.dtype("scales", scales, {F32, F8E8M0FNU});
    if (rank == 3)
      check.shape("scales", scales, {x.dimensions()[0], scale_rows, scale_columns});
    else
      check.shape("scales", scales, {scale_rows, scale_columns});
    o.scales = scales.untyped_data();
    o.scale_type = dtype_of(scales.element_type());
    o.block_rows = block[0];
    o.scale_stride = scale_columns;
  } else {
    check.dtype(name, x, {F32, BF16});
  }
  o.type = dtype_of(x.element_type());
  return o;
}

cpu::Groups groups_of(Check& check, const Buffer& group_sizes, int64_t groups, int64_t rows, int64_t alignment,
                      int64_t stride) {
  check.shape("group_sizes", group_sizes, {groups});
  check.dtype("group_sizes", group_sizes, {S32});
  check.that(is_size(alignment), "group_alignment must be a positive int32");
  check.that(stride == 0 || (is_size(stride) && rows == groups * stride),
             "group_stride must be 0 or the rows / groups");
  if (check.failed()) return {};
  return {group_sizes.typed_data<int32_t>(), groups, alignment, stride};
}

// Rows of a may start anywhere, so their scales must be their own, and along k. Nobody scales a and not b.
void check_scales(Check& check, const cpu::Operand& a, const cpu::Operand& b) {
  check.that(!a.scales || (a.block_rows == 1 && !a.transposed), "the blocks of a must be (1, 128), along k");
  check.that(!a.scales || b.scales || b.type == cpu::DType::e4m3, "a has scales and b has none");
}

int64_t scales_in(const Buffer& scales) { return scales.dimensions()[1] * scales.dimensions()[2]; }

ffi::Error gemm(ffi::ThreadPool pool, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales, Buffer accumulator,
                Result out, Block a_block, Block b_block, int64_t transpose_a, int64_t transpose_b, int64_t accumulate,
                std::string_view) {
  Check check("gemm");
  cpu::Operand a_operand = operand(check, "a", a, a_scales, a_block, transpose_a);
  cpu::Operand b_operand = operand(check, "b", b, b_scales, b_block, transpose_b);
  check.rank("out", *out, 3);
  if (check.failed()) return check.error();
  auto a_dims = a.dimensions(), b_dims = b.dimensions();
  int64_t batch = a_dims[0], m = a_dims[transpose_a ? 2 : 1], k = a_dims[transpose_a ? 1 : 2];
  int64_t n = b_dims[transpose_b ? 2 : 1];
  check_scales(check, a_operand, b_operand);
  check.that(b_dims[0] == 1 || b_dims[0] == batch, "b must have a's batch or one matrix");
  check.that(b_dims[transpose_b ? 1 : 2] == k, "a and b must have the same k");
  check.shape("out", *out, {batch, m, n});
  check.dtype("out", *out, {F32, BF16});
  if (accumulate) {
    check.shape("accumulator", accumulator, {batch, m, n});
    check.dtype("accumulator", accumulator, {out->element_type()});
  }
  if (check.failed()) return check.error();

  bool shared_b = b_dims[0] == 1;
  cpu::gemm({.a = a_operand,
             .b = b_operand,
             .a_batch_stride = m * k,
             .b_batch_stride = shared_b ? 0 : n * k,
             .a_scale_batch_stride = a_operand.scales ? scales_in(a_scales) : 0,
             .b_scale_batch_stride = b_operand.scales && !shared_b ? scales_in(b_scales) : 0,
             .accumulator = accumulate ? accumulator.untyped_data() : nullptr,
             .out = out->untyped_data(),
             .out_type = dtype_of(out->element_type()),
             .batch = batch,
             .m = m,
             .n = n,
             .k = k},
            threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error grouped_gemm(ffi::ThreadPool pool, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales, Buffer group_sizes,
                        Result out, Block a_block, Block b_block, int64_t transpose_b, int64_t group_alignment,
                        int64_t group_stride, int64_t zero_gaps, std::string_view) {
  Check check("grouped_gemm");
  cpu::Operand a_operand = operand(check, "a", a, a_scales, a_block, false);
  cpu::Operand b_operand = operand(check, "b", b, b_scales, b_block, transpose_b);
  if (check.failed()) return check.error();
  auto a_dims = a.dimensions(), b_dims = b.dimensions();
  int64_t m = a_dims[1], k = a_dims[2], groups = b_dims[0], n = b_dims[transpose_b ? 2 : 1];
  check_scales(check, a_operand, b_operand);
  check.that(a_dims[0] == 1, "a must have one matrix");
  check.that(b_dims[transpose_b ? 1 : 2] == k, "a and b must have the same k");
  cpu::Groups rows_of = groups_of(check, group_sizes, groups, m, group_alignment, group_stride);
  check.shape("out", *out, {m, n});
  check.dtype("out", *out, {F32, BF16});
  if (check.failed()) return check.error();

  cpu::grouped_gemm({.a = a_operand,
                     .b = b_operand,
                     .b_group_stride = n * k,
                     .b_scale_group_stride = b_operand.scales ? scales_in(b_scales) : 0,
                     .groups = rows_of,
                     .zero_gaps = zero_gaps != 0,
                     .out = out->untyped_data(),
                     .out_type = dtype_of(out->element_type()),
                     .m = m,
                     .n = n,
                     .k = k},
                    threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error k_grouped_gemm(ffi::ThreadPool pool, Buffer a, Buffer a_scales, Buffer b, Buffer b_scales,
                          Buffer group_sizes, Buffer accumulator, Result out, Block a_block, Block b_block,
                          int64_t group_alignment, int64_t group_stride, int64_t accumulate) {
  Check check("k_grouped_gemm");
  bool is_scaled = a_block.size() > 0 && a_block[0] != 0;
  cpu::Operand a_operand = operand(check, "a", a, a_scales, a_block, !is_scaled, 2);
  cpu::Operand b_operand = operand(check, "b", b, b_scales, b_block, !is_scaled, 2);
  check.rank("group_sizes", group_sizes, 1);
  if (check.failed()) return check.error();
  int t_axis = is_scaled ? 1 : 0;
  int64_t t = a.dimensions()[t_axis], m = a.dimensions()[1 - t_axis], n = b.dimensions()[1 - t_axis];
  int64_t groups = group_sizes.dimensions()[0];
  check.that(b.dimensions()[t_axis] == t, "a and b must have the same t");
  check.that(a_block[0] == b_block[0] && a_block[0] <= 1, "a and b must both have blocks (1, 128), along t, or none");
  check.that(!is_scaled || (group_alignment % 128 == 0 && group_stride % 128 == 0),
             "groups with scales must start at multiples of 128");
  cpu::Groups groups_of_t = groups_of(check, group_sizes, groups, t, group_alignment, group_stride);
  check.shape("out", *out, {groups, m, n});
  check.dtype("out", *out, {F32});
  if (accumulate) {
    check.shape("accumulator", accumulator, {groups, m, n});
    check.dtype("accumulator", accumulator, {F32});
  }
  if (check.failed()) return check.error();

  cpu::k_grouped_gemm({.a = a_operand,
                       .b = b_operand,
                       .groups = groups_of_t,
                       .accumulator = accumulate ? accumulator.typed_data<float>() : nullptr,
                       .out = out->typed_data<float>(),
                       .t = t,
                       .m = m,
                       .n = n},
                      threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemm_v1, gemm,
                              signature(Operands<5>{}, Results<1>{})
                                  .Attr<Block>("a_block")
                                  .Attr<Block>("b_block")
                                  .Attr<int64_t>("transpose_a")
                                  .Attr<int64_t>("transpose_b")
                                  .Attr<int64_t>("accumulate")
                                  .Attr<std::string_view>("out_dtype"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_gemm_v2, grouped_gemm,
                              signature(Operands<5>{}, Results<1>{})
                                  .Attr<Block>("a_block")
                                  .Attr<Block>("b_block")
                                  .Attr<int64_t>("transpose_b")
                                  .Attr<int64_t>("group_alignment")
                                  .Attr<int64_t>("group_stride")
                                  .Attr<int64_t>("zero_gaps")
                                  .Attr<std::string_view>("out_dtype"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(k_grouped_gemm_v1, k_grouped_gemm,
                              signature(Operands<6>{}, Results<1>{})
                                  .Attr<Block>("a_block")
                                  .Attr<Block>("b_block")
                                  .Attr<int64_t>("group_alignment")
                                  .Attr<int64_t>("group_stride")
                                  .Attr<int64_t>("accumulate"));

}  // namespace jaxkern
