// The launches of the kernels here.
#include "cuda/moe/moe.h"

#include <algorithm>

#include "cuda/moe/route.h"
#include "cuda/moe/rows.h"
#include "cuda/moe/slots.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

// Few enough for one block of threads, which then needs no counts of others.
constexpr int64_t few_assignments = 4 * slot_threads, few_rows = 64 * slot_threads;

// f of a number of that type, which is no float16.
template <typename F>
Error with_row_type(Float type, F f) {
  return type == Float::float32 ? f(float{}) : f(bfloat16{});
}

template <typename Kernel>
int blocks_for(int64_t blocks) {
  return static_cast<int>(std::min<int64_t>(blocks, multiprocessors() * Kernel::resident));
}

// ---- slots ----

int bits_of(int64_t x) {
  int bits = 0;
  for (; x > 0; x /= 2) ++bits;
  return bits;
}

// ---- copies ----

template <int bytes, typename Number>
Error take(const GatherRows& g, Stream stream) {
  using Kernel = TakeRows<bytes, Number>;
  using Unit = typename Kernel::Unit;
  int64_t units = g.hidden * g.element_size / bytes;
  int lanes = 1;
  while (lanes < units && lanes < warp_size) lanes *= 2;
  int64_t parts = ceil_div(units, lanes * Kernel::each);
  typename Kernel::Params p = {.x = {static_cast<const Unit*>(g.x), g.tokens * units},
                               .source = {g.source, g.rows},
                               .weights = {g.weights, g.weights ? g.tokens * g.top_k : 0},
                               .out = {static_cast<Unit*>(g.out), g.rows * units},
                               .assignments = g.tokens * g.top_k,
                               .top_k = static_cast<int>(g.top_k),
                               .rows = static_cast<int>(g.rows),
                               .units = static_cast<int>(units),
                               .lanes = lanes,
                               .parts = static_cast<int>(parts),
                               .zero_gaps = g.zero_gaps};
  return launch<Kernel>(blocks_for<Kernel>(ceil_div(g.rows * parts, Kernel::threads / lanes)), 1, p, stream);
}

// In the largest units that rows and arrays are aligned to.
bool in_units_of(const GatherRows& g, int64_t bytes) {
  return (g.hidden * g.element_size | reinterpret_cast<intptr_t>(g.x) | reinterpret_cast<intptr_t>(g.out)) % bytes == 0;
}

// ---- sums ----

template <typename T, typename Out, bool deep>
Error add(const SumRows& g, Stream stream) {
  using Kernel = AddRows<T, Out, deep>;
  // Four units of work for each warp that the machine holds, so that all end at about the same time; but no less than a
  // step of columns.
  int64_t steps = ceil_div(g.hidden, Kernel::columns), warps = multiprocessors() * Kernel::resident * Kernel::warps;
  int64_t parts = std::clamp<int64_t>(ceil_div(4 * warps, g.tokens), 1, steps);
  int64_t part = ceil_div(steps, parts) * Kernel::columns;
  parts = ceil_div(g.hidden, part);
  int64_t elements = g.tokens * g.hidden, choices = g.tokens * g.top_k;
  bool narrow = g.bias_type != Float::float32;
  typename Kernel::Params p = {.rows = {static_cast<const T*>(g.rows), g.num_rows * g.hidden},
                               .slots = {g.slots, choices},
                               .keys = {g.keys, choices},
                               .weights = {g.weights, choices},
                               .bias = {static_cast<const float*>(g.bias), g.bias && !narrow ? elements : 0},
                               .narrow_bias = {static_cast<const bfloat16*>(g.bias), g.bias && narrow ? elements : 0},
                               .out = {static_cast<Out*>(g.out), elements},
                               .num_rows = static_cast<int>(g.num_rows),
                               .num_keys = static_cast<int>(g.num_keys),
                               .tokens = static_cast<int>(g.tokens),
                               .top_k = static_cast<int>(g.top_k),
                               .hidden = static_cast<int>(g.hidden),
                               .parts = static_cast<int>(parts),
                               .part = static_cast<int>(part),
                               .vectors = g.hidden % 4 == 0};
  return launch<Kernel>(ceil_div(g.tokens * parts, Kernel::warps), 1, p, stream);
}

template <typename T, typename Out>
Error prepare_add() {
  return first_error({prepare<AddRows<T, Out, false>>(), prepare<AddRows<T, Out, true>>()});
}

}  // namespace

Error route(const Route& g, Stream stream) {
  if (g.tokens == 0) return {};
  ChooseExperts::Params p = {.scores = {g.scores, g.tokens * g.experts},
                             .bias = {g.bias, g.experts},
                             .expert_ids = {g.expert_ids, g.tokens * g.top_k},
                             .tokens = static_cast<int>(g.tokens),
                             .experts = static_cast<int>(g.experts),
                             .groups = static_cast<int>(g.num_groups),
                             .topk_groups = static_cast<int>(g.topk_groups),
                             .top_k = static_cast<int>(g.top_k)};
  return launch<ChooseExperts>(blocks_for<ChooseExperts>(ceil_div(g.tokens, ChooseExperts::warps)), 1, p, stream);
}

Error prepare_route() {
  return once_per_device([] { return prepare<ChooseExperts>(); });
}

Error assign_slots(const AssignSlots& g, Stream stream) {
  bool few = g.assignments <= few_assignments && g.rows <= few_rows;
  int64_t blocks = few ? 1 : std::clamp<int64_t>(ceil_div(g.assignments, slot_threads), 1, counting_blocks);
  Assignments a = {.ids = {g.ids, g.assignments},
                   .source = {g.source, g.rows},
                   .count = g.assignments,
                   .groups = static_cast<int>(g.num_groups),
                   .bits = bits_of(g.num_groups - 1),
                   .blocks = static_cast<int>(blocks),
                   .steps = static_cast<int>(ceil_div(g.assignments, blocks * slot_threads)),
                   .rows = static_cast<int>(g.rows)};
  if (blocks > 1) {
    int64_t clearing = std::min<int64_t>(ceil_div(g.rows, 4 * slot_threads), 2 * multiprocessors());
    Error error =
        launch<CountAssignments>(std::max(blocks, clearing), 1, {a, {g.counts, blocks * g.num_groups}}, stream);
    if (!error.empty()) return error;
  }
  PlaceAssignments::Params p = {.assignments = a,
                                .counts = {g.counts, blocks * g.num_groups},
                                .slots = {g.slots, g.assignments},
                                .sizes = {g.sizes, g.num_groups},
                                .dropped = {g.dropped, g.num_groups},
                                .alignment = static_cast<int>(g.alignment),
                                .slab = static_cast<int>(g.rows / g.num_groups),
                                .slabs = g.slabs};
  return launch<PlaceAssignments>(blocks, 1, p, stream);
}

Error prepare_assign_slots() {
  return once_per_device([] { return first_error({prepare<CountAssignments>(), prepare<PlaceAssignments>()}); });
}

Error gather_rows(const GatherRows& g, Stream stream) {
  if (g.rows * g.hidden == 0) return {};
  if (g.weights)
    return with_row_type(g.type, [&](auto type) {
      using T = decltype(type);
      return in_units_of(g, 16) ? take<16, T>(g, stream) : take<sizeof(T), T>(g, stream);
    });
  return in_units_of(g, 16)  ? take<16, void>(g, stream)
         : in_units_of(g, 4) ? take<4, void>(g, stream)
         : in_units_of(g, 2) ? take<2, void>(g, stream)
                             : take<1, void>(g, stream);
}

Error prepare_gather_rows() {
  return once_per_device([] {
    return first_error({prepare<TakeRows<16, void>>(), prepare<TakeRows<4, void>>(), prepare<TakeRows<2, void>>(),
                        prepare<TakeRows<1, void>>(), prepare<TakeRows<16, float>>(), prepare<TakeRows<4, float>>(),
                        prepare<TakeRows<16, bfloat16>>(), prepare<TakeRows<2, bfloat16>>()});
  });
}

Error gather_quantize_rows(const GatherQuantizeRows& g, Stream stream) {
  if (g.rows * g.hidden == 0) return {};
  return with_row_type(g.x_type, [&](auto type) {
    using T = decltype(type);
    using Kernel = TakeQuantizedRows<T>;
    int64_t blocks = ceil_div(g.hidden, block_k), parts = ceil_div(blocks, Kernel::blocks);
    typename Kernel::Params p = {
        .quantized = quantize_params<T>(g.values, g.scales, g.scale_format, g.rows * g.hidden, g.rows * blocks),
        .source = {g.source, g.rows},
        .slots = {g.slots, g.tokens * g.top_k},
        .assignments = g.tokens * g.top_k,
        .tokens = static_cast<int>(g.tokens),
        .top_k = static_cast<int>(g.top_k),
        .parts = static_cast<int>(parts),
        .zero_gaps = g.zero_gaps};
    p.quantized.x = {static_cast<const T*>(g.x), g.tokens * g.hidden};
    p.quantized.vectors = g.hidden % per_load<T> == 0;
    p.quantized.m = g.rows;
    p.quantized.k = g.hidden;
    int64_t units = g.tokens * parts + ceil_div(g.rows, Kernel::rows_each);
    return launch<Kernel>(ceil_div(units, Kernel::threads / warp_size), 1, p, stream);
  });
}

Error prepare_gather_quantize_rows() {
  return once_per_device(
      [] { return first_error({prepare<TakeQuantizedRows<float>>(), prepare<TakeQuantizedRows<bfloat16>>()}); });
}

Error sum_rows(const SumRows& g, Stream stream) {
  if (g.tokens * g.hidden == 0) return {};
  return with_row_type(g.type, [&](auto type) {
    return with_row_type(g.out_type, [&](auto out_type) {
      using T = decltype(type);
      using Out = decltype(out_type);
      if (AddRows<T, Out, false>::holds(g.num_keys, g.top_k)) return add<T, Out, false>(g, stream);
      return add<T, Out, true>(g, stream);
    });
  });
}

Error prepare_sum_rows() {
  return once_per_device([] {
    return first_error({prepare_add<float, float>(), prepare_add<float, bfloat16>(), prepare_add<bfloat16, float>(),
                        prepare_add<bfloat16, bfloat16>()});
  });
}

Error dot_rows(const DotRows& g, Stream stream) {
  if (g.tokens * g.top_k == 0) return {};
  return with_row_type(g.type, [&](auto type) {
    return with_row_type(g.x_type, [&](auto x_type) {
      using T = decltype(type);
      using X = decltype(x_type);
      using Kernel = MultiplyRows<T, X>;
      typename Kernel::Params p = {.rows = {static_cast<const T*>(g.rows), g.num_rows * g.hidden},
                                   .slots = {g.slots, g.tokens * g.top_k},
                                   .x = {static_cast<const X*>(g.x), g.tokens * g.hidden},
                                   .out = {g.out, g.tokens * g.top_k},
                                   .num_rows = static_cast<int>(g.num_rows),
                                   .tokens = static_cast<int>(g.tokens),
                                   .top_k = static_cast<int>(g.top_k),
                                   .hidden = static_cast<int>(g.hidden),
                                   .vectors = g.hidden % 4 == 0};
      return launch<Kernel>(blocks_for<Kernel>(g.tokens), 1, p, stream);
    });
  });
}

Error prepare_dot_rows() {
  return once_per_device([] {
    return first_error({prepare<MultiplyRows<float, float>>(), prepare<MultiplyRows<float, bfloat16>>(),
                        prepare<MultiplyRows<bfloat16, float>>(), prepare<MultiplyRows<bfloat16, bfloat16>>()});
  });
}

}  // namespace jaxkern::cuda
