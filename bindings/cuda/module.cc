// The extension modules of the Hopper kernels: jaxkern._cuda, and with JAXKERN_SIM jaxkern._sim.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "xla/ffi/api/ffi.h"
#if JAXKERN_SIM
#include "cuda/sim/sim.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

// Every handler, as <name>_v<version>; its target is "jaxkern.<name>.v<version>", or "jaxkern.sim.<name>.v<version>".
#define JAXKERN_HANDLERS(HANDLER)   \
  HANDLER(quantize, 1)              \
  HANDLER(quantize_along_tokens, 1) \
  HANDLER(swiglu_quantize, 2)       \
  HANDLER(route, 1)                 \
  HANDLER(assign_slots, 1)          \
  HANDLER(gather_rows, 2)           \
  HANDLER(gather_quantize_rows, 2)  \
  HANDLER(sum_rows, 1)              \
  HANDLER(dot_rows, 1)              \
  HANDLER(gemm, 1)                  \
  HANDLER(grouped_gemm, 2)          \
  HANDLER(k_grouped_gemm, 1)        \
  HANDLER(kv_cache_append, 1)       \
  HANDLER(mla_decode, 1)            \
  HANDLER(merge_attention, 1)       \
  HANDLER(mla_prefill, 1)           \
  HANDLER(mla_prefill_backward, 1)

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);
#define JAXKERN_DECLARE(name, version)  \
  extern "C" Handler name##_v##version; \
  extern "C" Handler name##_v##version##_initialize;
JAXKERN_HANDLERS(JAXKERN_DECLARE)

static nb::capsule capsule(Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

#if JAXKERN_SIM

NB_MODULE(_sim, m) {
  m.def("handlers", [] {
    nb::dict handlers;
#define JAXKERN_ADD(name, version) handlers["jaxkern.sim." #name ".v" #version] = capsule(name##_v##version);
    JAXKERN_HANDLERS(JAXKERN_ADD)
    return handlers;
  });
  using jaxkern::cuda::sim::Settings;
  m.def(
      "configure",
      [](uint64_t seed, bool hardware_sums, int multiprocessors) {
        jaxkern::cuda::sim::configure({seed, hardware_sums, multiprocessors});
      },
      "seed"_a = Settings{}.seed, "hardware_sums"_a = Settings{}.hardware_sums,
      "multiprocessors"_a = Settings{}.multiprocessors);
  m.def("statistics", jaxkern::cuda::sim::statistics);
  m.def("clear_statistics", jaxkern::cuda::sim::clear_statistics);
}

#else

namespace jaxkern {
void bind_timing(nb::module_& m);
}

NB_MODULE(_cuda, m) {
  jaxkern::bind_timing(m);
  m.def("handlers", [] {
    nb::dict handlers, stages;
#define JAXKERN_ADD(name, version)                                \
  stages = nb::dict();                                            \
  stages["initialize"] = capsule(name##_v##version##_initialize); \
  stages["execute"] = capsule(name##_v##version);                 \
  handlers["jaxkern." #name ".v" #version] = stages;
    JAXKERN_HANDLERS(JAXKERN_ADD)
    return handlers;
  });
}

#endif
