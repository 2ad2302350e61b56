#include "cuda/moe/moe.h"

#include "bindings/cuda/launch.h"
#include "bindings/moe.h"

namespace jaxkern {
namespace {

using enum ffi::DataType;

// What the kernels count in int32: rows and columns, and a little beyond.
bool are_counts(std::initializer_list<int64_t> sizes) {
  return std::ranges::all_of(sizes, [](int64_t size) { return is_size(size + (1 << 22)); });
}

ffi::Error route(cuda::Stream stream, Buffer scores, Buffer bias, Result expert_ids, int64_t num_groups,
                 int64_t topk_groups, int64_t top_k) {
  Check check("route");
  RouteSizes s = check_route(check, scores, bias, *expert_ids, num_groups, topk_groups, top_k);
  check.that(s.experts <= cuda::most_experts && num_groups <= cuda::most_expert_groups, "too many experts, or groups");
  check.that(are_counts({s.tokens}), "tokens must be int32");
  if (check.failed()) return check.error();

  return to_error("route", cuda::route({.scores = scores.typed_data<float>(),
                                        .bias = bias.typed_data<float>(),
                                        .expert_ids = expert_ids->typed_data<int32_t>(),
                                        .tokens = s.tokens,
                                        .experts = s.experts,
                                        .num_groups = num_groups,
                                        .topk_groups = topk_groups,
                                        .top_k = top_k},
                                       stream));
}

ffi::Error assign_slots(cuda::Stream stream, Buffer ids, Result slots, Result source, Result sizes, Result dropped,
                        Result counts, int64_t num_groups, int64_t slabs, int64_t alignment) {
  Check check("assign_slots");
  SlotSizes s = check_assign_slots(check, ids, *slots, *source, *sizes, *dropped, num_groups, alignment);
  check.that(num_groups <= cuda::most_groups, "too many groups");
  check.shape("counts", *counts, {cuda::counting_blocks, num_groups});
  check.dtype("counts", *counts, {S32});
  if (check.failed()) return check.error();

  return to_error("assign_slots", cuda::assign_slots({.ids = ids.typed_data<int32_t>(),
                                                      .slots = slots->typed_data<int32_t>(),
                                                      .source = source->typed_data<int32_t>(),
                                                      .sizes = sizes->typed_data<int32_t>(),
                                                      .dropped = dropped->typed_data<int32_t>(),
                                                      .counts = counts->typed_data<int32_t>(),
                                                      .assignments = s.tokens * s.top_k,
                                                      .num_groups = num_groups,
                                                      .rows = s.rows,
                                                      .alignment = alignment,
                                                      .slabs = slabs != 0},
                                                     stream));
}

ffi::Error gather_rows(cuda::Stream stream, Buffer x, Buffer source, Buffer weights, Result out, int64_t top_k,
                       int64_t weighted, int64_t zero_gaps) {
  Check check("gather_rows");
  GatherSizes s = check_gather_rows(check, x, source, weights, *out, top_k, weighted);
  check.that(are_counts({s.rows, s.hidden}), "rows and their width must be int32");
  if (check.failed()) return check.error();

  return to_error("gather_rows",
                  cuda::gather_rows({.x = x.untyped_data(),
                                     .source = source.typed_data<int32_t>(),
                                     .weights = weighted ? weights.typed_data<float>() : nullptr,
                                     .out = out->untyped_data(),
                                     .type = float_of(x.element_type()),
                                     .zero_gaps = zero_gaps != 0,
                                     .element_size = static_cast<int64_t>(ffi::ByteWidth(x.element_type())),
                                     .tokens = s.tokens,
                                     .top_k = s.top_k,
                                     .hidden = s.hidden,
                                     .rows = s.rows},
                                    stream));
}

ffi::Error gather_quantize_rows(cuda::Stream stream, Buffer x, Buffer source, Buffer slots, Result values,
                                Result scales, int64_t top_k, int64_t zero_gaps, std::string_view scale_format) {
  Check check("gather_quantize_rows");
  GatherSizes s = check_gather_quantize_rows(check, x, source, slots, *values, *scales, top_k, scale_format);
  check.that(are_counts({s.rows + s.tokens * blocks_of(s.hidden, 128), s.hidden}),
             "rows, blocks and their width must be int32");
  check.that(aligned({x.untyped_data(), values->untyped_data()}), "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("gather_quantize_rows",
                  cuda::gather_quantize_rows({.x = x.untyped_data(),
                                              .x_type = float_of(x.element_type()),
                                              .source = source.typed_data<int32_t>(),
                                              .slots = slots.typed_data<int32_t>(),
                                              .values = static_cast<uint8_t*>(values->untyped_data()),
                                              .scales = scales->untyped_data(),
                                              .scale_format = scale_format_of(scale_format),
                                              .zero_gaps = zero_gaps != 0,
                                              .tokens = s.tokens,
                                              .top_k = s.top_k,
                                              .hidden = s.hidden,
                                              .rows = s.rows},
                                             stream));
}

ffi::Error sum_rows(cuda::Stream stream, Buffer rows, Buffer slots, Buffer keys, Buffer weights, Buffer bias,
                    Result out, int64_t num_keys) {
  Check check("sum_rows");
  SumSizes s = check_sum_rows(check, rows, slots, keys, weights, bias, *out, cuda::most_choices);
  check.that(is_size(num_keys), "num_keys must be a positive int32");
  check.that(are_counts({s.num_rows, s.tokens, s.hidden}), "rows and their width must be int32");
  check.that(aligned({rows.untyped_data(), bias.untyped_data(), out->untyped_data()}),
             "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("sum_rows", cuda::sum_rows({.rows = rows.untyped_data(),
                                              .type = float_of(rows.element_type()),
                                              .slots = slots.typed_data<int32_t>(),
                                              .keys = keys.typed_data<int32_t>(),
                                              .weights = weights.typed_data<float>(),
                                              .bias = bias.element_count() > 0 ? bias.untyped_data() : nullptr,
                                              .bias_type = float_of(bias.element_type()),
                                              .out = out->untyped_data(),
                                              .out_type = float_of(out->element_type()),
                                              .num_rows = s.num_rows,
                                              .num_keys = num_keys,
                                              .tokens = s.tokens,
                                              .top_k = s.top_k,
                                              .hidden = s.hidden},
                                             stream));
}

ffi::Error dot_rows(cuda::Stream stream, Buffer rows, Buffer slots, Buffer x, Result out) {
  Check check("dot_rows");
  SumSizes s = check_dot_rows(check, rows, slots, x, *out);
  check.that(are_counts({s.num_rows, s.tokens, s.top_k, s.hidden}), "rows, choices and columns must be int32");
  check.that(aligned({rows.untyped_data(), x.untyped_data()}), "every buffer must be aligned to 16 bytes");
  if (check.failed()) return check.error();

  return to_error("dot_rows", cuda::dot_rows({.rows = rows.untyped_data(),
                                              .type = float_of(rows.element_type()),
                                              .slots = slots.typed_data<int32_t>(),
                                              .x = x.untyped_data(),
                                              .x_type = float_of(x.element_type()),
                                              .out = out->typed_data<float>(),
                                              .num_rows = s.num_rows,
                                              .tokens = s.tokens,
                                              .top_k = s.top_k,
                                              .hidden = s.hidden},
                                             stream));
}

}  // namespace

JAXKERN_HOPPER_HANDLERS(route, 1,
                        signature(Operands<2>{}, Results<1>{})
                            .Attr<int64_t>("num_groups")
                            .Attr<int64_t>("topk_groups")
                            .Attr<int64_t>("top_k"));

JAXKERN_HOPPER_HANDLERS(assign_slots, 1,
                        signature(Operands<1>{}, Results<5>{})
                            .Attr<int64_t>("num_groups")
                            .Attr<int64_t>("slabs")
                            .Attr<int64_t>("alignment"));

JAXKERN_HOPPER_HANDLERS(
    gather_rows, 2,
    signature(Operands<3>{}, Results<1>{}).Attr<int64_t>("top_k").Attr<int64_t>("weighted").Attr<int64_t>("zero_gaps"));

JAXKERN_HOPPER_HANDLERS(gather_quantize_rows, 2,
                        signature(Operands<3>{}, Results<2>{})
                            .Attr<int64_t>("top_k")
                            .Attr<int64_t>("zero_gaps")
                            .Attr<std::string_view>("scale_format"));

JAXKERN_HOPPER_HANDLERS(sum_rows, 1, signature(Operands<5>{}, Results<1>{}).Attr<int64_t>("num_keys"));

JAXKERN_HOPPER_HANDLERS(dot_rows, 1, signature(Operands<3>{}, Results<1>{}));

}  // namespace jaxkern
