// One kernel source for two compilers: nvcc, and a plain C++ compiler for the simulator (JAXKERN_SIM).
//
// Every function of this layer is one instruction, named as the PTX ISA names it, with its two meanings side by side:
//   PTX(...)  what nvcc compiles
//   SIM(...)  what the simulator does; it is told the line of the caller
// Nothing outside cuda/arch contains PTX, and kernels reach the hardware through nothing else.
#pragma once

#include <cstdint>

#ifdef JAXKERN_SIM
#include "cuda/sim/sim.h"
#define DEVICE inline
#define HOST_DEVICE inline
#define PTX(...)
#define SIM(...) __VA_ARGS__
#define WHERE ::jaxkern::cuda::sim::Where where = ::jaxkern::cuda::sim::Where::current()
#define AND_WHERE , WHERE
#else
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define PTX(...) __VA_ARGS__
#define SIM(...)
#define WHERE
#define AND_WHERE
#endif

namespace jaxkern::cuda {

constexpr int warp_size = 32;
constexpr int warpgroup_size = 128;

// Sizes of the machine that kernels are written for: compute capability 9.0.
constexpr int max_shared_bytes = 232448;  // of one block, CUDA programming guide, technical specifications
constexpr int max_registers = 65536;      // of one multiprocessor

HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

}  // namespace jaxkern::cuda
