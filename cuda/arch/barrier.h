// Barriers and fences: who waits for whom, and which accesses that orders.
#pragma once

#include "cuda/arch/memory.h"

namespace jaxkern::cuda {

// An mbarrier object: a phase ends when its expected arrivals have come and its pending bytes are zero. PTX 9.7.13.15.
struct alignas(8) Barrier {
  uint64_t state;
};

// mbarrier.init. PTX 9.7.13.15.9.
DEVICE void mbarrier_init(Barrier& barrier, uint32_t arrivals AND_WHERE) {
  PTX(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                   "r"(arrivals) : "memory");)
  SIM(sim::mbarrier_init(shared_address(&barrier), arrivals, where);)
}

// mbarrier.arrive. PTX 9.7.13.15.13.
DEVICE void mbarrier_arrive(Barrier& barrier AND_WHERE) {
  PTX(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");)
  SIM(sim::mbarrier_arrive(shared_address(&barrier), where);)
}

// mbarrier.arrive on the barrier of another block of the cluster, or of this one: what it releases is what wgmma has
// read. With .release.cluster ptxas puts a fence of the whole GPU before each arrival. PTX 9.7.13.15.13.
DEVICE void mbarrier_arrive_cluster(Barrier& barrier, int rank AND_WHERE) {
  PTX(asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapa(&barrier, rank)) : "memory");)
  SIM(sim::mbarrier_arrive(mapa(&barrier, rank), where);)
}

// mbarrier.arrive.expect_tx: one arrival, and `bytes` more to come before the phase ends. PTX 9.7.13.15.13.
DEVICE void mbarrier_arrive_expect_tx(Barrier& barrier, uint32_t bytes AND_WHERE) {
  PTX(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                   "r"(bytes) : "memory");)
  SIM(sim::mbarrier_expect_tx(shared_address(&barrier), bytes, where);
      sim::mbarrier_arrive(shared_address(&barrier), where);)
}

// mbarrier.expect_tx. PTX 9.7.13.15.11.
DEVICE void mbarrier_expect_tx(Barrier& barrier, uint32_t bytes AND_WHERE) {
  PTX(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                   "r"(bytes) : "memory");)
  SIM(sim::mbarrier_expect_tx(shared_address(&barrier), bytes, where);)
}

// Blocks until the phase with this parity has ended (mbarrier.try_wait.parity in a loop). A barrier starts in phase 0,
// and "the phase before it", parity 1, has ended: a producer's first wait passes. PTX 9.7.13.15.16.
DEVICE void mbarrier_wait(Barrier& barrier, uint32_t parity AND_WHERE) {
  PTX(asm volatile("{\n"
                   ".reg .pred ended;\n"
                   "again:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                   "@!ended bra again;\n"
                   "}" ::"r"(shared_address(&barrier)),
                   "r"(parity) : "memory");)
  SIM(sim::mbarrier_wait(shared_address(&barrier), parity, where);)
}

// Makes initialised barriers visible to the cluster and to the copy engine; before a block or cluster barrier.
// fence.mbarrier_init. PTX 9.7.13.4.
DEVICE void fence_mbarrier_init(WHERE) {
  PTX(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory");)
  SIM(sim::fence_mbarrier_init(where);)
}

// Orders this thread's accesses to shared memory before later ones of the async proxy (the copy engine and wgmma): in
// every thread that wrote, before the barrier. fence.proxy.async. PTX 9.7.13.4.
DEVICE void fence_proxy_async(WHERE) {
  PTX(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
  SIM(sim::fence_proxy_async(where);)
}

// Named barriers 0 to 15 of a block; `threads`, a multiple of 32, counts those that arrive and those that wait.
// bar.sync, bar.arrive. PTX 9.7.13.1. Give the name as a constant: ptxas reserves all 16 for one it does not know.
DEVICE void bar_sync(int name, int threads AND_WHERE) {
  PTX(asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");)
  SIM(sim::bar(name, threads, true, where);)
}

DEVICE void bar_arrive(int name, int threads AND_WHERE) {
  PTX(asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");)
  SIM(sim::bar(name, threads, false, where);)
}

// barrier.cluster: all threads of the cluster's blocks. Not .aligned, which wants the lanes of a warp together: after a
// loop, such as a wait, they may not be. PTX 9.7.13.3.
DEVICE void barrier_cluster_arrive(WHERE) {
  PTX(asm volatile("barrier.cluster.arrive.release;" :: : "memory");)
  SIM(sim::barrier_cluster_arrive(where);)
}

DEVICE void barrier_cluster_wait(WHERE) {
  PTX(asm volatile("barrier.cluster.wait.acquire;" :: : "memory");)
  SIM(sim::barrier_cluster_wait(where);)
}

// st.async: stores to a block of the cluster and counts the bytes on a barrier there. PTX 9.7.9.12.
template <typename T>
DEVICE void st_async(Shared<T>& x, int rank, T value, Barrier& barrier AND_WHERE) {
  static_assert(sizeof(T) == 4);
  PTX(uint32_t bits; memcpy(&bits, &value, 4);
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(mapa(&x, rank)),
                   "r"(bits), "r"(mapa(&barrier, rank)) : "memory");)
  SIM(sim::st_async(mapa(&x, rank), sim::bits(value), mapa(&barrier, rank), where);)
}

}  // namespace jaxkern::cuda
