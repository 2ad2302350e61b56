// What the handlers of routing and of the moves of rows, of the CPU and of Hopper, read off their buffers and check
// alike.
#pragma once

#include <string_view>

#include "bindings/check.h"

namespace jaxkern {

struct RouteSizes {
  int64_t tokens, experts;
};

// The sizes mean something unless the check has failed; so of all of these.
inline RouteSizes check_route(Check& check, const Buffer& scores, const Buffer& bias, const Buffer& expert_ids,
                              int64_t num_groups, int64_t topk_groups, int64_t top_k) {
  using enum ffi::DataType;
  check.rank("scores", scores, 2);
  if (check.failed()) return {};
  RouteSizes s = {.tokens = scores.dimensions()[0], .experts = scores.dimensions()[1]};
  check.dtype("scores", scores, {F32});
  check.dtype("bias", bias, {F32});
  check.shape("bias", bias, {s.experts});
  check.dtype("expert_ids", expert_ids, {S32});
  check.shape("expert_ids", expert_ids, {s.tokens, top_k});
  check.that(num_groups > 0 && s.experts % num_groups == 0, "num_groups must divide the experts");
  check.that(0 < topk_groups && topk_groups <= num_groups, "topk_groups must be in 1..num_groups");
  check.that(0 < top_k && top_k <= s.experts, "top_k must be in 1..experts");
  return s;
}

struct SlotSizes {
  int64_t tokens, top_k, rows;
};

inline SlotSizes check_assign_slots(Check& check, const Buffer& ids, const Buffer& slots, const Buffer& source,
                                    const Buffer& sizes, const Buffer& dropped, int64_t num_groups, int64_t alignment) {
  using enum ffi::DataType;
  check.rank("ids", ids, 2);
  check.rank("source", source, 1);
  if (check.failed()) return {};
  SlotSizes s = {.tokens = ids.dimensions()[0], .top_k = ids.dimensions()[1], .rows = source.dimensions()[0]};
  check.dtype("ids", ids, {S32});
  check.shape("slots", slots, {s.tokens, s.top_k});
  check.shape("sizes", sizes, {num_groups});
  check.shape("dropped", dropped, {num_groups});
  for (const Buffer& result : {slots, source, sizes, dropped}) check.dtype("a result", result, {S32});
  check.that(is_size(num_groups) && is_size(alignment), "num_groups and alignment must be positive int32");
  check.that(s.rows <= INT32_MAX && s.tokens * s.top_k <= INT32_MAX, "rows and assignments must fit int32");
  return s;
}

struct GatherSizes {
  int64_t tokens, top_k, hidden, rows;
};

inline GatherSizes check_x_and_source(Check& check, const Buffer& x, const Buffer& source, int64_t top_k) {
  check.rank("x", x, 2);
  check.rank("source", source, 1);
  if (check.failed()) return {};
  check.dtype("source", source, {ffi::DataType::S32});
  check.that(is_size(top_k), "top_k must be a positive int32");
  return {.tokens = x.dimensions()[0], .top_k = top_k, .hidden = x.dimensions()[1], .rows = source.dimensions()[0]};
}

inline GatherSizes check_gather_rows(Check& check, const Buffer& x, const Buffer& source, const Buffer& weights,
                                     const Buffer& out, int64_t top_k, bool weighted) {
  using enum ffi::DataType;
  GatherSizes s = check_x_and_source(check, x, source, top_k);
  if (check.failed()) return {};
  check.shape("out", out, {s.rows, s.hidden});
  check.dtype("out", out, {x.element_type()});
  check.dtype("x", x, {F32, BF16, F16, S32, U8, F8E4M3FN, F8E8M0FNU});
  if (weighted) {
    check.dtype("x", x, {F32, BF16});
    check.dtype("weights", weights, {F32});
    check.shape("weights", weights, {s.tokens, top_k});
  }
  return s;
}

inline GatherSizes check_gather_quantize_rows(Check& check, const Buffer& x, const Buffer& source, const Buffer& slots,
                                              const Buffer& values, const Buffer& scales, int64_t top_k,
                                              std::string_view scale_format) {
  using enum ffi::DataType;
  GatherSizes s = check_x_and_source(check, x, source, top_k);
  if (check.failed()) return {};
  check.dtype("x", x, {F32, BF16});
  check.dtype("slots", slots, {S32});
  check.shape("slots", slots, {s.tokens, top_k});
  check.shape("values", values, {s.rows, s.hidden});
  check.dtype("values", values, {F8E4M3FN});
  check.shape("scales", scales, {s.rows, blocks_of(s.hidden, 128)});
  check.dtype("scales", scales, {scale_format == "ue8m0" ? F8E8M0FNU : F32});
  return s;
}

struct SumSizes {
  int64_t num_rows, tokens, top_k, hidden;
};

inline SumSizes check_rows_and_slots(Check& check, const Buffer& rows, const Buffer& slots) {
  using enum ffi::DataType;
  check.rank("rows", rows, 2);
  check.rank("slots", slots, 2);
  if (check.failed()) return {};
  check.dtype("rows", rows, {F32, BF16});
  check.dtype("slots", slots, {S32});
  return {.num_rows = rows.dimensions()[0],
          .tokens = slots.dimensions()[0],
          .top_k = slots.dimensions()[1],
          .hidden = rows.dimensions()[1]};
}

// bias is [0, 0] where there is none.
inline SumSizes check_sum_rows(Check& check, const Buffer& rows, const Buffer& slots, const Buffer& keys,
                               const Buffer& weights, const Buffer& bias, const Buffer& out, int64_t most_choices) {
  using enum ffi::DataType;
  SumSizes s = check_rows_and_slots(check, rows, slots);
  if (check.failed()) return {};
  check.dtype("keys", keys, {S32});
  check.shape("keys", keys, {s.tokens, s.top_k});
  check.dtype("weights", weights, {F32});
  check.shape("weights", weights, {s.tokens, s.top_k});
  check.dtype("bias", bias, {F32, BF16});
  if (bias.element_count() > 0) check.shape("bias", bias, {s.tokens, s.hidden});
  check.dtype("out", out, {F32, BF16});
  check.shape("out", out, {s.tokens, s.hidden});
  check.that(s.top_k <= most_choices, "slots hold too many choices of a token");
  return s;
}

inline SumSizes check_dot_rows(Check& check, const Buffer& rows, const Buffer& slots, const Buffer& x,
                               const Buffer& out) {
  using enum ffi::DataType;
  SumSizes s = check_rows_and_slots(check, rows, slots);
  if (check.failed()) return {};
  check.dtype("x", x, {F32, BF16});
  check.shape("x", x, {s.tokens, s.hidden});
  check.dtype("out", out, {F32});
  check.shape("out", out, {s.tokens, s.top_k});
  return s;
}

}  // namespace jaxkern
