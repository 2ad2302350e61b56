// Who a thread is, and what the threads of a warp do together.
// "PTX" sections are those of the PTX ISA 9.0.
#pragma once

#include "cuda/arch/base.h"

namespace jaxkern::cuda {

// %tid, %ctaid, %nctaid, %cluster_ctarank: kernels are launched in one dimension. PTX 10.
DEVICE int thread_index() { PTX(return threadIdx.x;) SIM(return sim::thread_index();) }
DEVICE int block_index() { PTX(return blockIdx.x;) SIM(return sim::block_index();) }
DEVICE int grid_size() { PTX(return gridDim.x;) SIM(return sim::grid_size();) }
DEVICE int lane_index() { return thread_index() % warp_size; }

DEVICE int cluster_rank() {
  PTX(uint32_t rank; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)); return rank;)
  SIM(return sim::cluster_rank();)
}

// shfl.sync: the value of another lane. PTX 9.7.9.6. T has 4 bytes.
template <typename T>
DEVICE T shfl(T value, int lane AND_WHERE) {
  static_assert(sizeof(T) == 4);
  PTX(return __shfl_sync(0xffffffff, value, lane);)
  SIM(return sim::unbits<T>(sim::shfl(sim::bits(value), lane, where));)
}

template <typename T>
DEVICE T shfl_xor(T value, int mask AND_WHERE) {
  static_assert(sizeof(T) == 4);
  PTX(return __shfl_xor_sync(0xffffffff, value, mask);)
  SIM(return sim::unbits<T>(sim::shfl(sim::bits(value), (thread_index() % warp_size) ^ mask, where));)
}

// The sum over the lanes up to this one.
template <typename T>
DEVICE T sum_up_to(T x AND_WHERE) {
  int lane = lane_index();
#pragma unroll
  for (int distance = 1; distance < warp_size; distance *= 2) {
    T other = shfl(x, lane < distance ? lane : lane - distance SIM(, where));
    if (lane >= distance) x += other;
  }
  return x;
}

// shfl.sync.idx in segments: the value of the lane that has of its number the bits `own` of this one's, and the others
// of `lane`'s. Both are constants of the instruction.
template <uint32_t own, typename T>
DEVICE T shfl_within(T value, int lane AND_WHERE) {
  static_assert(sizeof(T) == 4 && own < warp_size);
  PTX(T other; uint32_t bits; memcpy(&bits, &value, 4); asm volatile(
          "shfl.sync.idx.b32 %0, %1, %2, %3, 0xffffffff;" : "=r"(bits) : "r"(bits), "r"(lane), "n"(own << 8 | 0x1f));
      memcpy(&other, &bits, 4); return other;)
  SIM(return sim::unbits<T>(
                 sim::shfl(sim::bits(value), (thread_index() % warp_size & own) | (lane & ~own & 31), where));)
}

// vote.sync.ballot: bit i is lane i's predicate. PTX 9.7.13.9.
DEVICE uint32_t ballot(bool predicate AND_WHERE) {
  PTX(return __ballot_sync(0xffffffff, predicate);)
  SIM(return sim::ballot(predicate, where);)
}

// bar.warp.sync: orders the shared memory accesses of a warp's lanes. PTX 9.7.13.2.
DEVICE void syncwarp(WHERE) {
  PTX(__syncwarp();)
  SIM(sim::syncwarp(where);)
}

// The warp's index in its block, in a form that the compiler knows to be the same in all its lanes.
DEVICE int warp_index(WHERE) { return shfl(thread_index() / warp_size, 0 SIM(, where)); }

// elect.sync: true in one lane of the warp. PTX 9.7.13.14.
DEVICE bool elect(WHERE) {
  PTX(uint32_t elected;
      asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
      return elected;)
  SIM(return sim::elect(where);)
}

// setmaxnreg: gives registers of a warpgroup back, or takes them. PTX 9.7.19.5.
template <int registers>
DEVICE void setmaxnreg_dec(WHERE) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  PTX(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));)
  SIM(sim::setmaxnreg(registers, false, where);)
}

template <int registers>
DEVICE void setmaxnreg_inc(WHERE) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  PTX(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));)
  SIM(sim::setmaxnreg(registers, true, where);)
}

// griddepcontrol: programmatic dependent launch. Wait before the first access to what an earlier kernel wrote; launch
// once later kernels may start. PTX 9.7.13.13.
DEVICE void griddepcontrol_wait() { PTX(asm volatile("griddepcontrol.wait;" :: : "memory");) }
DEVICE void griddepcontrol_launch_dependents() { PTX(asm volatile("griddepcontrol.launch_dependents;" :: : "memory");) }

}  // namespace jaxkern::cuda
