#include "bindings/common.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace jaxkern {
namespace {

// Linux likes to wake a thread on the core of the one that wakes it, and leaves it there for a millisecond though
// another core has nothing to do, which is longer than most kernels run.
#ifdef __linux__
int core() { return sched_getcpu(); }
void let_others_run() { sched_yield(); }

// Moves this thread away from core `taken`, if it is there and may run anywhere else.
void leave(int taken) {
  cpu_set_t allowed;
  if (core() != taken || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(taken, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int core() { return 0; }
void let_others_run() {}
void leave(int) {}
#endif

// Shared by the caller and its helpers; a helper that starts after the work is done finds none and touches nothing
// else.
struct Work {
  cpu::Threads::Task task;
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> waking;  // helpers that have not started
  std::atomic<int> open{0};     // threads that may be in a task

  // Whoever finds no task left has seen every claim of one, and with it that claimant in `open`.
  void run() {
    open.fetch_add(1);
    uint64_t done = 0;
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      task(context, i);
      // After 1, 2, 4, 8 tasks: a helper may be waiting for this very core.
      if (std::has_single_bit(++done) && waking.load() > 0) let_others_run();
    }
    if (open.fetch_sub(1) == 1) open.notify_all();
  }

  void help(int callers_core) {
    waking.fetch_sub(1);
    if (next.load() < tasks) leave(callers_core);
    run();
  }

  // Only tasks that a helper has begun are still open, so this is short and cannot deadlock.
  void wait() {
    for (int spins = 0; spins < 2000; ++spins)
      if (open.load() == 0) return;
    for (int n; (n = open.load()) != 0;) open.wait(n);
  }
};

// More threads than cores only take turns: XLA's pool has one for each device.
int64_t threads_in(const ffi::ThreadPool& pool) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(pool.num_threads(), 1, cores);
}

void run_on_pool(void* pool_pointer, int64_t tasks, cpu::Threads::Task task, void* context) {
  auto& pool = *static_cast<ffi::ThreadPool*>(pool_pointer);
  auto work = std::make_shared<Work>();
  work->task = task;
  work->context = context;
  work->tasks = tasks;
  work->waking = std::min(threads_in(pool), tasks) - 1;
  for (int64_t i = work->waking; i > 0; --i) pool.Schedule([work, from = core()] { work->help(from); });
  work->run();
  work->wait();
}

}  // namespace

cpu::Threads threads_of(ffi::ThreadPool& pool) { return {&pool, run_on_pool, threads_in(pool)}; }

cpu::DType dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return cpu::DType::bf16;
    case ffi::DataType::F16:
      return cpu::DType::f16;
    case ffi::DataType::F8E4M3FN:
      return cpu::DType::e4m3;
    case ffi::DataType::F8E8M0FNU:
      return cpu::DType::e8m0;
    default:
      return cpu::DType::f32;
  }
}

}  // namespace jaxkern
