#include "cpu/moe.h"

#include "bindings/common.h"
#include "bindings/moe.h"

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
  RouteSizes s = check_route(check, scores, bias, *expert_ids, num_groups, topk_groups, top_k);
  if (check.failed()) return check.error();

  cpu::route({.scores = data<const float>(scores),
              .bias = data<const float>(bias),
              .expert_ids = data<int32_t>(*expert_ids),
              .tokens = s.tokens,
              .experts = s.experts,
              .num_groups = num_groups,
              .topk_groups = topk_groups,
              .top_k = top_k},
             threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error assign_slots(ffi::ThreadPool pool, Buffer ids, Result slots, Result source, Result sizes, Result dropped,
                        int64_t num_groups, int64_t slabs, int64_t alignment) {
  Check check("assign_slots");
  SlotSizes s = check_assign_slots(check, ids, *slots, *source, *sizes, *dropped, num_groups, alignment);
  if (check.failed()) return check.error();

  cpu::assign_slots({.ids = data<const int32_t>(ids),
                     .slots = data<int32_t>(*slots),
                     .source = data<int32_t>(*source),
                     .sizes = data<int32_t>(*sizes),
                     .dropped = data<int32_t>(*dropped),
                     .assignments = s.tokens * s.top_k,
                     .num_groups = num_groups,
                     .rows = s.rows,
                     .alignment = alignment,
                     .slabs = slabs != 0},
                    threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error gather_rows(ffi::ThreadPool pool, Buffer x, Buffer source, Buffer weights, Result out, int64_t top_k,
                       int64_t weighted, int64_t zero_gaps) {
  Check check("gather_rows");
  GatherSizes s = check_gather_rows(check, x, source, weights, *out, top_k, weighted);
  if (check.failed()) return check.error();

  cpu::gather_rows({.x = x.untyped_data(),
                    .source = data<const int32_t>(source),
                    .weights = weighted ? data<const float>(weights) : nullptr,
                    .out = out->untyped_data(),
                    .type = dtype_of(x.element_type()),
                    .zero_gaps = zero_gaps != 0,
                    .element_size = static_cast<int64_t>(ffi::ByteWidth(x.element_type())),
                    .tokens = s.tokens,
                    .top_k = s.top_k,
                    .hidden = s.hidden,
                    .rows = s.rows},
                   threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error gather_quantize_rows(ffi::ThreadPool pool, Buffer x, Buffer source, Buffer slots, Result values,
                                Result scales, int64_t top_k, int64_t zero_gaps, std::string_view scale_format) {
  Check check("gather_quantize_rows");
  GatherSizes s = check_gather_quantize_rows(check, x, source, slots, *values, *scales, top_k, scale_format);
  if (check.failed()) return check.error();

  cpu::gather_quantize_rows({.x = x.untyped_data(),
                             .x_type = dtype_of(x.element_type()),
                             .source = data<const int32_t>(source),
                             .slots = data<const int32_t>(slots),
                             .values = data<uint8_t>(*values),
                             .scales = scales->untyped_data(),
                             .scale_type = dtype_of(scales->element_type()),
                             .power_of_two = scale_format != "float32",
                             .zero_gaps = zero_gaps != 0,
                             .tokens = s.tokens,
                             .top_k = s.top_k,
                             .hidden = s.hidden,
                             .rows = s.rows},
                            threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error sum_rows(ffi::ThreadPool pool, Buffer rows, Buffer slots, Buffer keys, Buffer weights, Buffer bias,
                    Result out, int64_t num_keys, std::string_view) {
  Check check("sum_rows");
  SumSizes s = check_sum_rows(check, rows, slots, keys, weights, bias, *out, cpu::kMaxTopK);
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
                 .num_rows = s.num_rows,
                 .num_keys = num_keys,
                 .tokens = s.tokens,
                 .top_k = s.top_k,
                 .hidden = s.hidden},
                threads_of(pool));
  return ffi::Error::Success();
}

ffi::Error dot_rows(ffi::ThreadPool pool, Buffer rows, Buffer slots, Buffer x, Result out) {
  Check check("dot_rows");
  SumSizes s = check_dot_rows(check, rows, slots, x, *out);
  if (check.failed()) return check.error();

  cpu::dot_rows({.rows = rows.untyped_data(),
                 .type = dtype_of(rows.element_type()),
                 .slots = data<const int32_t>(slots),
                 .x = x.untyped_data(),
                 .x_type = dtype_of(x.element_type()),
                 .out = data<float>(*out),
                 .num_rows = s.num_rows,
                 .tokens = s.tokens,
                 .top_k = s.top_k,
                 .hidden = s.hidden},
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gather_rows_v2, gather_rows,
    signature(Operands<3>{}, Results<1>{}).Attr<int64_t>("top_k").Attr<int64_t>("weighted").Attr<int64_t>("zero_gaps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gather_quantize_rows_v2, gather_quantize_rows,
                              signature(Operands<3>{}, Results<2>{})
                                  .Attr<int64_t>("top_k")
                                  .Attr<int64_t>("zero_gaps")
                                  .Attr<std::string_view>("scale_format"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sum_rows_v2, sum_rows,
    signature(Operands<5>{}, Results<1>{}).Attr<int64_t>("num_keys").Attr<std::string_view>("out_dtype"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dot_rows_v1, dot_rows, signature(Operands<3>{}, Results<1>{}));

}  // namespace jaxkern
