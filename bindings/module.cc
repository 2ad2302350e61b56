// The extension module jaxkern._cpu: the handlers by target name, and what Python must know before registering them.

#include <nanobind/nanobind.h>

#include "cpu/levels.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

// Every handler, as <name>_v<version>; its target is "jaxkern.<name>.v<version>".
#define JAXKERN_HANDLERS(HANDLER)   \
  HANDLER(quantize, 1)              \
  HANDLER(quantize_along_tokens, 1) \
  HANDLER(swiglu_quantize, 2)       \
  HANDLER(dequantize, 1)            \
  HANDLER(route, 1)                 \
  HANDLER(assign_slots, 1)          \
  HANDLER(gather_rows, 2)           \
  HANDLER(gather_quantize_rows, 2)  \
  HANDLER(sum_rows, 2)              \
  HANDLER(dot_rows, 1)              \
  HANDLER(gemm, 1)                  \
  HANDLER(grouped_gemm, 2)          \
  HANDLER(k_grouped_gemm, 1)        \
  HANDLER(mla_decode, 1)            \
  HANDLER(mla_prefill, 1)           \
  HANDLER(mla_prefill_backward, 1)  \
  HANDLER(merge_attention, 1)       \
  HANDLER(kv_cache_append, 1)

#define JAXKERN_DECLARE(name, version) extern "C" XLA_FFI_Error* name##_v##version(XLA_FFI_CallFrame*);
JAXKERN_HANDLERS(JAXKERN_DECLARE)

NB_MODULE(_cpu, m) {
  m.def("handlers", [] {
    nb::dict handlers;
#define JAXKERN_ADD(name, version) \
  handlers["jaxkern." #name ".v" #version] = nb::capsule(reinterpret_cast<void*>(name##_v##version));
    JAXKERN_HANDLERS(JAXKERN_ADD)
    return handlers;
  });
  m.def("api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def("simd_level", jaxkern::cpu::simd_level_name);
}
