// A kernel is a struct, and one function launches it:
//
//   struct Scale {
//     static std::string name();                    // for reports and tables
//     static constexpr int threads = 128;           // of a block
//     static constexpr int registers = 168;         // of a thread at launch; only for kernels that use setmaxnreg
//     static constexpr int resident = 2;            // blocks that the registers of a multiprocessor must hold; else 1
//     static constexpr bool starts_early = true;    // see below; else false
//     struct Params { ... };                        // passed by value, as a grid constant
//     struct Smem { ... };                          // the block's shared memory
//     DEVICE static void run(const Params& params, Smem& shared) { ... }
//   };
//   Error error = launch<Scale>(blocks, cluster, params, stream);  // blocks of the grid and of a cluster
#pragma once

#include <atomic>

#include "cuda/arch/base.h"
#include "cuda/stream.h"

namespace jaxkern::cuda {

// The registers that a thread of K holds when setmaxnreg first runs: what ptxas reports. 0: K does not use setmaxnreg.
template <typename K>
constexpr int registers_of() {
  if constexpr (requires { K::registers; })
    return K::registers;
  else
    return 0;
}

template <typename K>
constexpr int resident_of() {
  if constexpr (requires { K::resident; })
    return K::resident;
  else
    return 1;
}

// Whether K may start before the kernel ahead of it has ended; it waits for that one by griddepcontrol_wait.
template <typename K>
constexpr bool starts_early() {
  if constexpr (requires { K::starts_early; })
    return K::starts_early;
  else
    return false;
}

#ifdef JAXKERN_SIM

template <typename Load>
Error once_per_device(Load load) {
  return load();
}

template <typename K>
Error prepare() {
  return {};
}

template <typename K>
Error launch(int blocks, int cluster, const typename K::Params& params, Stream) {
  static_assert(sizeof(typename K::Smem) <= max_shared_bytes);
  auto run = [](const void* params, void* shared) {
    K::run(*static_cast<const typename K::Params*>(params), *static_cast<typename K::Smem*>(shared));
  };
  return sim::launch({K::name(), K::threads, cluster, registers_of<K>(), sizeof(typename K::Smem)}, blocks, &params,
                     run);
}

inline Error copy(void* to, const void* from, int64_t bytes, Stream) {
  if (to != from) memcpy(to, from, bytes);
  return {};
}
inline Error zero(void* to, int64_t bytes, Stream) {
  memset(to, 0, bytes);
  return {};
}

inline int multiprocessors() { return sim::multiprocessors(); }

#else

template <typename K>
__global__ void __launch_bounds__(K::threads, resident_of<K>())
    entry(const __grid_constant__ typename K::Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  K::run(params, *reinterpret_cast<typename K::Smem*>(shared));
}

inline Error describe(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

// Runs `load` once for each device, which launches of many threads and executables may ask for at every call.
template <typename Load>
Error once_per_device(Load load) {
  static std::atomic<uint64_t> loaded{0};  // a bit a device
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return describe(error);
  uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (loaded & bit) return {};
  Error error = load();
  if (error.empty()) loaded |= bit;
  return error;
}

// Loads K and lets it have its shared memory. Before the first launch on each device.
template <typename K>
Error prepare() {
  static_assert(sizeof(typename K::Smem) <= max_shared_bytes);
  cudaError_t error =
      cudaFuncSetAttribute(entry<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(typename K::Smem));
  return describe(error);
}

template <typename K>
Error launch(int blocks, int cluster, const typename K::Params& params, Stream stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(K::threads);
  config.dynamicSmemBytes = sizeof(typename K::Smem);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = starts_early<K>() ? 2 : 1;
  return describe(cudaLaunchKernelEx(&config, entry<K>, params));
}

// In global memory, in the stream's order.
inline Error copy(void* to, const void* from, int64_t bytes, Stream stream) {
  if (to == from) return {};
  return describe(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}
inline Error zero(void* to, int64_t bytes, Stream stream) {
  return describe(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

#endif

}  // namespace jaxkern::cuda
