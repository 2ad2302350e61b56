#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/levels.h"

#ifdef JAXKERN_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxkern::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "bf16", "amx"};

#ifdef JAXKERN_X86
// Whether there are vdpbf16ps and, to convert to it, vpermi2b.
bool has_bf16() {
  unsigned a, b, c, d;
  constexpr unsigned kVbmi = 1u << 1, kAvx512Bf16 = 1u << 5;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & kVbmi) && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         (a & kAvx512Bf16);
}

// Whether there is a matrix unit for bfloat16 and the system lets this process use it, which it must be asked for.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Level detect() {
  int best = 0;
#ifdef JAXKERN_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = !has_bf16() ? 2 : has_amx() ? 4 : 3;
  }
#endif
  if (const char* wanted = std::getenv("JAXKERN_SIMD"))
    for (int i = 0; i < best; ++i)
      if (std::strcmp(wanted, kNames[i]) == 0) best = i;
  return static_cast<Level>(best);
}

struct Buffer {
  size_t bytes = 0;
  void* data = nullptr;
  ~Buffer() { std::free(data); }
};

}  // namespace

Level simd_level() {
  static const Level level = detect();
  return level;
}

const char* simd_level_name() { return kNames[static_cast<int>(simd_level())]; }

bool is_batch_invariant() {
  static const bool is = [] {
    const char* set = std::getenv("JAXKERN_BATCH_INVARIANT");
    return set && std::strcmp(set, "1") == 0;
  }();
  return is;
}

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kLargePage = 1 << 21;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  if (end >= begin + 4 * kLargePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* scratch(size_t bytes, int slot) {
  thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.data) {  // kernels are built without exceptions, and run where none could be caught
      std::fprintf(stderr, "jaxkern: out of memory: %zu bytes of scratch\n", bytes);
      std::abort();
    }
  }
  return buffer.data;
}

}  // namespace jaxkern::cpu
