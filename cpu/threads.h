// Threads that a kernel may use, lent by its caller; kernels create none of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace jaxkern::cpu {

class Threads {
 public:
  using Task = void (*)(void* context, int64_t index);
  using Run = void (*)(void* pool, int64_t tasks, Task task, void* context);

  // run(pool, tasks, task, context) calls task(context, i) once for each i in [0, tasks) and returns when all are done.
  Threads(void* pool, Run run, int64_t count) : pool_(pool), run_(run), count_(count) {}

  // For sizing work only: results must not depend on it.
  int64_t count() const { return count_; }

  template <typename F>
  void for_each(int64_t tasks, F&& f) const {
    if (tasks == 1) {
      f(int64_t{0});
    } else if (tasks > 1) {
      using Function = std::remove_reference_t<F>;
      run_(pool_, tasks, [](void* context, int64_t index) { (*static_cast<Function*>(context))(index); }, (void*)&f);
    }
  }

  // f(begin, end) for pieces of [0, rows), each large enough to be worth a task and to keep pages to one thread.
  template <typename F>
  void for_each_chunk(int64_t rows, int64_t row_bytes, F&& f) const {
    constexpr int64_t kChunkBytes = 1 << 18;
    int64_t chunk = kChunkBytes / (row_bytes + 1) + 1;
    for_each((rows + chunk - 1) / chunk, [&](int64_t task) {
      int64_t begin = task * chunk;
      f(begin, begin + chunk < rows ? begin + chunk : rows);
    });
  }

 private:
  void* pool_;
  Run run_;
  int64_t count_;
};

// Asks for large pages under a result that is about to be written: a fresh buffer of many megabytes otherwise costs
// more in page faults than in writing. Linux only; elsewhere, and for small buffers, it does nothing.
void prefer_large_pages(void* data, size_t bytes);

// A buffer of this thread, 64-byte aligned, valid until the thread's next call with the same slot; not cleared.
// `slot` (0 to 3) separates buffers that one task needs at the same time.
void* scratch(size_t bytes, int slot = 0);

}  // namespace jaxkern::cpu
