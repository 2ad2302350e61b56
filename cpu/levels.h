// One kernel, compiled once for each SIMD level, chosen at run time.
#pragma once

#include "cpu/threads.h"

namespace jaxkern::cpu {

// bf16 and amx are the avx512 code, which may then use vdpbf16ps, and the matrix unit (cpu/amx.h), as well.
enum class Level { portable, avx2, avx512, bf16, amx };

// The best level that this machine and this build have, or the one that JAXKERN_SIMD names if that is lower.
Level simd_level();
const char* simd_level_name();

// Whether a row of a matrix product must have the same bits however many rows there are: JAXKERN_BATCH_INVARIANT=1.
bool is_batch_invariant();

}  // namespace jaxkern::cpu

#ifdef JAXKERN_X86
#define JAXKERN_KERNEL(name, Params)                               \
  namespace portable {                                             \
  void name(const Params&, const Threads&);                        \
  }                                                                \
  namespace avx2 {                                                 \
  void name(const Params&, const Threads&);                        \
  }                                                                \
  namespace avx512 {                                               \
  void name(const Params&, const Threads&);                        \
  }                                                                \
  inline void name(const Params& params, const Threads& threads) { \
    switch (simd_level()) {                                        \
      case Level::amx:                                             \
      case Level::bf16:                                            \
      case Level::avx512:                                          \
        return avx512::name(params, threads);                      \
      case Level::avx2:                                            \
        return avx2::name(params, threads);                        \
      case Level::portable:                                        \
        return portable::name(params, threads);                    \
    }                                                              \
  }
#else
#define JAXKERN_KERNEL(name, Params)        \
  namespace portable {                      \
  void name(const Params&, const Threads&); \
  }                                         \
  inline void name(const Params& params, const Threads& threads) { portable::name(params, threads); }
#endif
