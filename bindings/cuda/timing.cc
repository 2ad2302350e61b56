// Events in a GPU's stream, for benchmarks: inside a program that XLA launches, where the host's clock sees nothing.
//
//   jaxkern.event.v1, attribute index: records event `index` once all that is in the stream before has run. Its
//   operands and results tie it into the order of the program; none is read or written.
#if !JAXKERN_SIM

#include <cuda_runtime.h>
#include <nanobind/nanobind.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

namespace jaxkern {
namespace {

namespace ffi = xla::ffi;

std::mutex lock;
std::map<int64_t, cudaEvent_t> events;  // by index; never destroyed, as the driver may be gone before us

ffi::Error event(cudaStream_t stream, ffi::RemainingArgs, ffi::RemainingRets, int64_t index) {
  std::lock_guard guard(lock);
  cudaError_t error = cudaSuccess;
  if (!events.contains(index)) {
    cudaEvent_t made;
    error = cudaEventCreate(&made);
    if (error == cudaSuccess) events[index] = made;
  }
  if (error == cudaSuccess) error = cudaEventRecord(events[index], stream);
  return error == cudaSuccess ? ffi::Error::Success()
                              : ffi::Error::Internal(std::string("event: ") + cudaGetErrorString(error));
}

// Waits for event `to`. The milliseconds from event `from` to it.
float elapsed_ms(int64_t from, int64_t to) {
  cudaEvent_t begin, end;
  {
    std::lock_guard guard(lock);
    if (!events.contains(from) || !events.contains(to))
      throw std::invalid_argument("elapsed_ms: no such event was recorded");
    begin = events[from], end = events[to];
  }
  float ms = 0;
  cudaError_t error = cudaEventSynchronize(end);
  if (error == cudaSuccess) error = cudaEventElapsedTime(&ms, begin, end);
  if (error != cudaSuccess) throw std::runtime_error(std::string("elapsed_ms: ") + cudaGetErrorString(error));
  return ms;
}

}  // namespace

// Not to be captured into a CUDA graph, whose events cannot be asked for the time between them: so no trait says it
// may.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    event_v1, event,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets().Attr<int64_t>("index"));

// To the module: event_handler(), the capsule to register as jaxkern.event.v1, and elapsed_ms(from, to).
void bind_timing(nb::module_& m) {
  m.def("event_handler", [] { return nb::capsule(reinterpret_cast<void*>(event_v1)); });
  m.def("elapsed_ms", elapsed_ms, nb::arg("from_"), nb::arg("to"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace jaxkern

#endif
