// What the handlers of Hopper kernels share. Each handler is compiled twice: for the GPU, and with JAXKERN_SIM for the
// simulator, where it is a CPU handler and its kernel has run when the launch returns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "bindings/check.h"
#include "cuda/quantize/quantize.h"
#include "cuda/stream.h"

#if JAXKERN_SIM
namespace jaxkern {
struct StreamOfLaunch {};
}  // namespace jaxkern

// A CPU handler has no stream to ask for.
template <>
struct xla::ffi::CtxDecoding<jaxkern::StreamOfLaunch> {
  using Type = jaxkern::cuda::Stream;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return nullptr;
  }
};
#else
namespace jaxkern {
using StreamOfLaunch = ffi::PlatformStream<cuda::Stream>;
}  // namespace jaxkern
#endif

namespace jaxkern {

// What a Hopper handler is bound to: XLA's stream, operands, results.
template <int operands, int results>
auto signature(Operands<operands>, Results<results>) {
  return add_buffers<operands, results>(ffi::Ffi::Bind().Ctx<StreamOfLaunch>());
}

// XLA aligns what it allocates, but may hand over a slice of it.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::ranges::all_of(pointers, [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

inline cuda::Float float_of(ffi::DataType type) {
  return type == ffi::DataType::BF16  ? cuda::Float::bfloat16
         : type == ffi::DataType::F16 ? cuda::Float::float16
                                      : cuda::Float::float32;
}

inline cuda::ScaleFormat scale_format_of(std::string_view name) {
  return name == "ue8m0"          ? cuda::ScaleFormat::ue8m0
         : name == "power_of_two" ? cuda::ScaleFormat::power_of_two
                                  : cuda::ScaleFormat::float32;
}

inline ffi::Error to_error(const char* op, const cuda::Error& error) {
  return error.empty() ? ffi::Error::Success() : ffi::Error::Internal(std::string(op) + ": " + error);
}

}  // namespace jaxkern

// JAXKERN_HOPPER_HANDLERS(gemm, 1, signature(...)) defines gemm_v1, which runs the function gemm, and for a GPU
// gemm_v1_initialize, which runs cuda::prepare_gemm. XLA calls that before any launch, with the device set, because the
// launches themselves may be captured into a CUDA graph, where nothing can be loaded.
#if JAXKERN_SIM
#define JAXKERN_HOPPER_HANDLERS(op, version, ...) XLA_FFI_DEFINE_HANDLER_SYMBOL(op##_v##version, op, __VA_ARGS__)
#else
#define JAXKERN_HOPPER_HANDLERS(op, version, ...)                                                            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(op##_v##version, op, __VA_ARGS__, {xla::ffi::Traits::kCmdBufferCompatible}); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                             \
      op##_v##version##_initialize,                                                                          \
      [](xla::ffi::RemainingArgs, xla::ffi::RemainingRets) { return to_error(#op, cuda::prepare_##op()); },  \
      xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets())
#endif
