// mbarriers, named barriers and the barrier of a cluster.
#include <algorithm>

#include "cuda/sim/machine.h"

namespace jaxkern::cuda::sim {
namespace {

constexpr double arrival_cycles = 20;

}  // namespace

Mbarrier& Machine::mbarrier(uint32_t address, const Where& where) {
  Block& block = locate(address, where);
  auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail(where, text("no mbarrier was initialised at shared %#x", address));
  return *found->second;
}

void mbarrier_init(uint32_t address, uint32_t arrivals, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  Block& block = m.locate(address, where);
  m.at(block, address, 8, 8, "mbarrier.init", where);
  if (arrivals == 0 || arrivals >= 1 << 20) fail(where, text("mbarrier.init for %u arrivals", arrivals));
  if (block.mbarriers.count(address)) fail(where, text("the mbarrier at shared %#x is initialised twice", address));
  if (m.components_ == static_cast<int>(thread.clock.size())) fail(where, "more mbarriers than the simulator follows");
  auto barrier = std::make_unique<Mbarrier>();
  barrier->block = &block;
  barrier->address = address;
  barrier->component = m.components_++;
  barrier->arrivals = barrier->pending = arrivals;
  barrier->arriving.assign(thread.clock.size(), 0);
  barrier->released.assign(thread.clock.size(), 0);
  barrier->initialiser = &thread;
  barrier->initialiser_epoch = thread.clock[thread.component];
  barrier->initialiser_fences = thread.fences + thread.init_fences;
  for (uint32_t i = (address - shared_base) / 4; i < (address - shared_base) / 4 + 2; ++i)
    block.words[i].is_barrier = true;
  block.mbarriers[address] = std::move(barrier);
}

// A barrier may be used by those who know of its initialisation; by the copy engine and by other blocks after a fence.
void Machine::check_initialised(Mbarrier& barrier, bool needs_fence, const Where& where) {
  Thread& thread = self();
  Thread& by = *barrier.initialiser;
  if (&by != &thread && thread.clock[by.component] < barrier.initialiser_epoch)
    fail(where, text("race: the mbarrier at shared %#x was initialised with no barrier between", barrier.address));
  if (needs_fence && by.fences + by.init_fences == barrier.initialiser_fences)
    fail(where,
         text("the mbarrier at shared %#x was initialised with no fence.mbarrier_init after it", barrier.address));
}

void Machine::arrive(Mbarrier& barrier, const Clock& clock, double time, const Where& where) {
  if (barrier.pending <= 0)
    fail(where, text("more arrivals at the mbarrier at shared %#x than the %u it was initialised for", barrier.address,
                     barrier.arrivals));
  --barrier.pending;
  join(barrier.arriving, clock);
  barrier.arriving_time = std::max(barrier.arriving_time, time + arrival_cycles);
  end_phase_if_complete(barrier, where);
}

void Machine::complete_bytes(Mbarrier& barrier, int64_t bytes, double time, const Where& where) {
  barrier.bytes -= bytes;
  if (barrier.bytes <= -(1 << 20))
    fail(where, text("transaction count underflow: %ld bytes too many", long(-barrier.bytes)));
  barrier.arriving_time = std::max(barrier.arriving_time, time);
  end_phase_if_complete(barrier, where);
}

void Machine::end_phase_if_complete(Mbarrier& barrier, const Where& where) {
  if (barrier.pending > 0) return;
  if (barrier.bytes < 0)
    fail(where, text("transaction count underflow: %ld bytes more than expected came to the mbarrier at shared %#x",
                     long(-barrier.bytes), barrier.address));
  if (barrier.bytes > 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  join(barrier.released, barrier.arriving);
  barrier.released[barrier.component] = barrier.phase;
  barrier.released_time = barrier.arriving_time;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void mbarrier_arrive(uint32_t address, Where where) {
  Machine& m = machine();
  Mbarrier& barrier = m.mbarrier(address, where);
  Thread& thread = m.self();
  m.check_initialised(barrier, barrier.block != thread.block, where);
  m.arrive(barrier, thread.clock, thread.time, where);
  m.release(thread);
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes, Where where) {
  Machine& m = machine();
  Mbarrier& barrier = m.mbarrier(address, where);
  m.check_initialised(barrier, true, where);
  barrier.bytes += bytes;
  if (barrier.bytes >= 1 << 20)
    fail(where, text("transaction count overflow: %ld bytes are expected", long(barrier.bytes)));
}

void mbarrier_wait(uint32_t address, uint32_t parity, Where where) {
  Machine& m = machine();
  if (address >> rank_shift) fail(where, "mbarrier.try_wait on another block's barrier");
  if (parity > 1) fail(where, text("parity %u is neither 0 nor 1", parity));
  Mbarrier& barrier = m.mbarrier(address, where);
  Thread& thread = m.self();
  m.check_initialised(barrier, false, where);
  while ((barrier.phase & 1) == parity) {
    barrier.waiting.push_back(&thread);
    m.block_on({.kind = Wait::mbarrier, .barrier = &barrier, .detail = parity, .what = "mbarrier.try_wait"}, where);
  }
  int64_t phase = int64_t(barrier.phase) - 1;
  auto [last, is_first] = thread.observed.try_emplace(&barrier, phase);
  if (!is_first && last->second == phase)
    fail(where, text("%s of the mbarrier at shared %#x is waited on twice: the parity was not flipped",
                     phase < 0 ? "the phase before the first" : text("phase %ld", long(phase)).c_str(), address));
  last->second = phase;
  join(thread.clock, barrier.released);
  if (barrier.released_time > thread.time) {
    if (thread.lane == 0 && thread.index % 128 == 0)
      thread.block->warpgroups[thread.index / 128].idle += barrier.released_time - thread.time;
    thread.time = barrier.released_time;
  }
}

void bar(int name, int threads, bool wait, Where where) {
  Machine& m = machine();
  Block& block = m.block();
  const char* what = wait ? "bar.sync" : "bar.arrive";
  if (name < 0 || name > 15) fail(where, text("%s %d: there are 16 named barriers", what, name));
  if (threads <= 0 || threads % lanes) fail(where, text("%s of %d threads, no multiple of 32", what, threads));
  NamedBarrier& barrier = block.named[name];
  m.collective(what, where, uint64_t(name) << 32 | uint32_t(threads), nullptr, [&](Warp& warp, Collective& c) {
    for (int i = 1; i < lanes; ++i)
      if (c.in[i] != c.in[0]) fail(where, text("divergent warp: %s with different barriers or counts", what));
    Clock joined = m.join_lanes(warp);
    if (barrier.arrived == 0) barrier.clock = joined;
    if (barrier.arrived && barrier.expected != threads)
      fail(where, text("%s %d of %d threads, but others came to it for %d", what, name, threads, barrier.expected));
    barrier.expected = threads;
    join(barrier.clock, joined);
    barrier.time = std::max(barrier.time, warp.threads[0]->time + arrival_cycles);
    barrier.arrived += lanes;
    barrier.last = warp.threads[0];
    barrier.where = where;
    c.out.fill(barrier.generation);
    if (wait) barrier.waiting.push_back(&warp);
    if (barrier.arrived == threads) {
      for (Warp* w : barrier.waiting)
        for (Thread* t : w->threads) {
          join(t->clock, barrier.clock);
          t->time = std::max(t->time, barrier.time);
          m.wake(t);
        }
      barrier.waiting.clear();
      barrier.arrived = 0;
      barrier.time = 0;
      ++barrier.generation;
    }
  });
  if (!wait) return;
  uint64_t generation = m.collective_result();
  while (barrier.generation == generation)
    m.block_on({.kind = Wait::bar, .detail = uint32_t(name), .what = what}, where);
}

void barrier_cluster_arrive(Where where) {
  Machine& m = machine();
  m.collective("barrier.cluster.arrive", where, 0, nullptr, [&](Warp& warp, Collective&) {
    join(m.cluster_clock_, m.join_lanes(warp));
    for (Thread* t : warp.threads) {
      if (t->cluster_arrived != t->cluster_waited) fail(where, "barrier.cluster.arrive twice with no wait between");
      ++t->cluster_arrived;
      m.cluster_time_ = std::max(m.cluster_time_, t->time + 10 * arrival_cycles);
    }
    m.cluster_arrived_ += lanes;
    if (m.cluster_arrived_ == m.kernel_.cluster * m.kernel_.threads) {
      m.cluster_arrived_ = 0;
      m.cluster_released_ = m.cluster_clock_;
      ++m.cluster_generation_;
      for (auto& block : m.blocks_)
        for (auto& t : block->threads)
          if (t->wait.kind == Wait::cluster) m.wake(t.get());
    }
  });
}

void barrier_cluster_wait(Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  if (thread.cluster_arrived == thread.cluster_waited) fail(where, "barrier.cluster.wait with no arrive before it");
  m.collective("barrier.cluster.wait", where, 0, nullptr, [](Warp&, Collective&) {});
  while (m.cluster_generation_ < thread.cluster_arrived)
    m.block_on({.kind = Wait::cluster, .what = "barrier.cluster.wait"}, where);
  ++thread.cluster_waited;
  join(thread.clock, m.cluster_released_);
  thread.time = std::max(thread.time, m.cluster_time_);
}

}  // namespace jaxkern::cuda::sim
