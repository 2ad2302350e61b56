// A ring of stages in shared memory, between roles that fill them and roles that read them.
#pragma once

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::kernels {

// Where a role stands in the ring. A consumer waits for a full stage with `phase`, a producer for an empty one with the
// other: "the phase before the first" has ended.
template <int stages>
struct Position {
  int stage = 0;
  uint32_t phase = 0;

  DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  DEVICE void advance(int by) {
    phase ^= (stage + by) / stages & 1;
    stage = (stage + by) % stages;
  }
};

// One arrival for the whole warp, when all its lanes are done.
DEVICE void release(Barrier& barrier) {
  syncwarp();
  if (lane_index() == 0) mbarrier_arrive(barrier);
}

}  // namespace jaxkern::cuda::kernels
