#include "cpu/moe.h"

#include "bindings/common.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

template <typename T>
T* data(const Buffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

ffi::Error route(ffi::ThreadPool pool, Buffer scores, Buffer bias, Result expert_ids, int64_t num_groups,
                 int64_t topk_groups, int64_t top_k) {
  Check check("route");
  check.rank("scores", scores, 2);
  if (check.failed()) return check.error();
  int64_t tokens = scores.dimensions()[0], experts = scores.dimensions()[1];
  check.dtype("scores", scores, {F32});
  check.dtype("bias", bias, {F32});
  check.shape("bias", bias, {experts});
  check.dtype("expert_ids", *expert_ids, {S32});
  check.shape("expert_ids", *expert_ids, {tokens, top_k});
  check.that(num_groups > 0 && experts % num_groups == 0, "num_groups must divide the experts");
  check.that(0 < topk_groups && topk_groups <= num_groups, "topk_groups must be in 1..num_groups");
  check.that(0 < top_k && top_k <= experts, "top_k must be in 1..experts");
  if (check.failed()) return check.error();

  cpu::route({.scores = data<const float>(scores),
              .bias = data<const float>(bias),
              .expert_ids = data<int32_t>(*expert_ids),
              .tokens = tokens,
              .experts = experts,
              .num_groups = num_groups,
              .topk_groups = topk_groups,
              .top_k = top_k},
             threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error assign_slots(ffi::ThreadPool pool, Buffer ids, Result slots, Result source, Result sizes, Result dropped,
                        int64_t num_groups, int64_t slabs, int64_t alignment) {
  Check check("assign_slots");
  check.rank("ids", ids, 2);
  check.rank("source", *source, 1);
  if (check.failed()) return check.error();
  int64_t tokens = ids.dimensions()[0], top_k = ids.dimensions()[1], rows = source->dimensions()[0];
  check.dtype("ids", ids, {S32});
  check.shape("slots", *slots, {tokens, top_k});
  check.shape("sizes", *sizes, {num_groups});
  check.shape("dropped", *dropped, {num_groups});
  for (Result result : {slots, source, sizes, dropped}) check.dtype("a result", *result, {S32});
  check.that(is_size(num_groups) && is_size(alignment), "num_groups and alignment must be positive int32");
  check.that(rows <= INT32_MAX && tokens * top_k <= INT32_MAX, "rows and assignments must fit int32");
  if (check.failed()) return check.error();

  cpu::assign_slots({.ids = data<const int32_t>(ids),
                     .slots = data<int32_t>(*slots),
                     .source = data<int32_t>(*source),
                     .sizes = data<int32_t>(*sizes),
                     .dropped = data<int32_t>(*dropped),
                     .assignments = tokens * top_k,
                     .num_groups = num_groups,
                     .rows = rows,
                     .alignment = alignment,
                     .slabs = slabs != 0},
                    threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error gather_rows(ffi::ThreadPool pool, Buffer x, Buffer source, Buffer weights, Result out, int64_t top_k,
                       int64_t weighted) {
  Check check("gather_rows");
  check.rank("x", x, 2);
  check.rank("source", source, 1);
  if (check.failed()) return check.error();
  int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1], rows = source.dimensions()[0];
  check.dtype("source", source, {S32});
  check.shape("out", *out, {rows, hidden});
  check.dtype("out", *out, {x.element_type()});
  check.that(is_size(top_k), "top_k must be a positive int32");
  check.dtype("x", x, {F32, BF16, F16, S32, U8, F8E4M3FN, F8E8M0FNU});
  if (weighted) {
    check.dtype("x", x, {F32, BF16});
    check.dtype("weights", weights, {F32});
    check.shape("weights", weights, {tokens, top_k});
  }
  if (check.failed()) return check.error();

  cpu::gather_rows({.x = x.untyped_data(),
                    .source = data<const int32_t>(source),
                    .weights = weighted ? data<const float>(weights) : nullptr,
                    .out = out->untyped_data(),
                    .type = dtype_of(x.element_type()),
                    .element_size = static_cast<int64_t>(ffi::ByteWidth(x.element_type())),
                    .tokens = tokens,
                    .top_k = top_k,
                    .hidden = hidden,
                    .rows = rows},
                   threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error gather_quantize_rows(ffi::ThreadPool pool, Buffer x, Buffer source, Buffer slots, Result values,
                                Result scales, int64_t top_k, std::string_view scale_format) {
  Check check("gather_quantize_rows");
  check.rank("x", x, 2);
  check.rank("source", source, 1);
  check.that(is_size(top_k), "top_k must be a positive int32");
  if (check.failed()) return check.error();
  int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1], rows = source.dimensions()[0];
  check.dtype("x", x, {F32, BF16});
  check.dtype("source", source, {S32});
  check.dtype("slots", slots, {S32});
  check.shape("slots", slots, {tokens, top_k});
  check.shape("values", *values, {rows, hidden});
  check.dtype("values", *values, {F8E4M3FN});
  check.shape("scales", *scales, {rows, blocks_of(hidden, 128)});
  check.dtype("scales", *scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  if (check.failed()) return check.error();

  cpu::gather_quantize_rows({.x = x.untyped_data(),
                             .x_type = dtype_of(x.element_type()),
                             .source = data<const int32_t>(source),
                             .slots = data<const int32_t>(slots),
                             .values = data<uint8_t>(*values),
                             .scales = scales->untyped_data(),
                             .scale_type = dtype_of(scales->element_type()),
                             .power_of_two = scale_format != "float32",
                             .tokens = tokens,
                             .top_k = top_k,
                             .hidden = hidden,
                             .rows = rows},
                            threads_of(pool));
  return ffi::Error::Success();
}

// bias is [0, 0] where there is none.
ffi::Error sum_rows(ffi::ThreadPool pool, Buffer rows, Buffer slots, Buffer keys, Buffer weights, Buffer bias,
                    Result out, int64_t num_keys, std::string_view) {
  Check check("sum_rows");
  check.rank("rows", rows, 2);
  check.rank("slots", slots, 2);
  if (check.failed()) return check.error();
  int64_t num_rows = rows.dimensions()[0], hidden = rows.dimensions()[1];
  int64_t tokens = slots.dimensions()[0], top_k = slots.dimensions()[1];
  check.dtype("rows", rows, {F32, BF16});
  check.dtype("slots", slots, {S32});
  check.dtype("keys", keys, {S32});
  check.shape("keys", keys, {tokens, top_k});
  check.dtype("weights", weights, {F32});
  check.shape("weights", weights, {tokens, top_k});
  check.dtype("bias", bias, {F32, BF16});
  if (bias.element_count() > 0) check.shape("bias", bias, {tokens, hidden});
  check.dtype("out", *out, {F32, BF16});
  check.shape("out", *out, {tokens, hidden});
  check.that(top_k <= cpu::kMaxTopK, "slots must hold at most 64 choices a token");
  if (check.failed()) return check.error();

  cpu::sum_rows({.rows = rows.untyped_data(),
                 .type = dtype_of(rows.element_type()),
                 .slots = data<const int32_t>(slots),
                 .keys = data<const int32_t>(keys),
                 .weights = data<const float>(weights),
                 .bias = bias.element_count() > 0 ? bias.untyped_data() : nullptr,
                 .bias_type = dtype_of(bias.element_type()),
                 .out = out->untyped_data(),
                 .out_type = dtype_of(out->element_type()),
                 .num_rows = num_rows,
                 .num_keys = num_keys,
                 .tokens = tokens,
                 .top_k = top_k,
                 .hidden = hidden},
                threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error dot_rows(ffi::ThreadPool pool, Buffer rows, Buffer slots, Buffer x, Result out) {
  Check check("dot_rows");
  check.rank("rows", rows, 2);
  check.rank("slots", slots, 2);
  if (check.failed()) return check.error();
  int64_t num_rows = rows.dimensions()[0], hidden = rows.dimensions()[1];
  int64_t tokens = slots.dimensions()[0], top_k = slots.dimensions()[1];
  check.dtype("rows", rows, {F32, BF16});
  check.dtype("slots", slots, {S32});
  check.dtype("x", x, {F32, BF16});
  check.shape("x", x, {tokens, hidden});
  check.dtype("out", *out, {F32});
  check.shape("out", *out, {tokens, top_k});
  if (check.failed()) return check.error();

  cpu::dot_rows({.rows = rows.untyped_data(),
                 .type = dtype_of(rows.element_type()),
                 .slots = data<const int32_t>(slots),
                 .x = x.untyped_data(),
                 .x_type = dtype_of(x.element_type()),
                 .out = data<float>(*out),
                 .num_rows = num_rows,
                 .tokens = tokens,
                 .top_k = top_k,
                 .hidden = hidden},
                threads_of(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(route_v1, route,
                              signature(Operands<2>{}, Results<1>{})
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("topk_groups")
                                  .Attr<int64_t>("top_k"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(assign_slots_v1, assign_slots,
                              signature(Operands<1>{}, Results<4>{})
                                  .Attr<int64_t>("num_groups")
                                  .Attr<int64_t>("slabs")
                                  .Attr<int64_t>("alignment"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gather_rows_v1, gather_rows,
                              signature(Operands<3>{}, Results<1>{}).Attr<int64_t>("top_k").Attr<int64_t>("weighted"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gather_quantize_rows_v1, gather_quantize_rows,
    signature(Operands<3>{}, Results<2>{}).Attr<int64_t>("top_k").Attr<std::string_view>("scale_format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sum_rows_v2, sum_rows,
    signature(Operands<5>{}, Results<1>{}).Attr<int64_t>("num_keys").Attr<std::string_view>("out_dtype"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dot_rows_v1, dot_rows, signature(Operands<3>{}, Results<1>{}));

}  // namespace jaxkern
