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

// One arrival for the whole warp, when all its lanes are done; in every block of the cluster, which may copy to where
// this one has read.
template <int cluster = 1>
DEVICE void release(Barrier& barrier) {
  syncwarp();
  if constexpr (cluster == 1) {
    if (lane_index() == 0) mbarrier_arrive(barrier);
  } else {
    if (lane_index() < cluster) mbarrier_arrive_cluster(barrier, lane_index());
  }
}

// Before a block uses the barriers of others of its cluster, and before it leaves while these may use its own.
template <int cluster>
DEVICE void sync_cluster(int threads) {
  if constexpr (cluster > 1) {
    barrier_cluster_arrive();
    barrier_cluster_wait();
  } else {
    bar_sync(0, threads);
  }
}

}  // namespace jaxkern::cuda::kernels
