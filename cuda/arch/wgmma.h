// The tensor cores: wgmma, by which the four warps of a warpgroup multiply D [64, n] += A [64, k] B [n, k]^T together.
// PTX 9.7.15.
//
// A is in shared memory or in registers, B in shared memory, D in registers. k is 32 bytes: 32 e4m3, 16 bfloat16 or 16
// float16. Thread t of the warpgroup holds of D, in item i,
//   row 16 (t / 32) + (t % 32) / 4 + 8 ((i / 2) % 2), column 8 (i / 4) + 2 (t % 4) + i % 2;
// and of a 16-bit A, in register i, the pair of row as above with 8 (i % 2) and columns 2 (t % 4) + 8 (i / 2) and one
// more; of an e4m3 A four columns from 4 (t % 4) + 16 (i / 2) on.
//
// Of an A in shared memory a warp reads the rows of its own part of D alone, as FlashAttention-3 relies on, too.
//
// The instructions are asynchronous: from the first one to wgmma_wait_group nobody may touch D, A's registers or the
// shared memory that A and B are read from. A group begins with wgmma_fence.
#pragma once

#include <type_traits>

#include "cuda/arch/number.h"
#include "cuda/arch/thread.h"
#include "cuda/arch/tma.h"

namespace jaxkern::cuda {

// The row, of 64, and the column of item i of this thread's accumulators.
DEVICE int fragment_row(int i) { return thread_index() % warpgroup_size / 32 * 16 + lane_index() / 4 + i / 2 % 2 * 8; }
DEVICE int fragment_column(int i) { return i / 4 * 8 + lane_index() % 4 * 2 + i % 2; }

// Where a matrix lies in shared memory, in the layout that the copy engine leaves with the same swizzle.
// PTX 9.7.15.5.1.2.
//
// K-major (k contiguous), the default: rows of 16 << swizzle bytes in groups of 8, `stride` bytes from group to group.
// `leading` is used without a swizzle only: bytes from one 16-byte column of a group to the next.
// MN-major (16-bit A and B only, with a swizzle): rows of k, 16 << swizzle bytes each, in groups of 8 with `stride`
// bytes from group to group, and `leading` bytes from one such column of rows to the next. To advance along k inside a
// swizzled row, add its bytes to `address`.
DEVICE uint64_t matrix_descriptor(uint32_t address, int leading, int stride, Swizzle swizzle) {
  constexpr int modes[] = {0, 3, 2, 1};  // none, 32, 64, 128 bytes: not the order of the tensor map's
  auto field = [](int value) { return static_cast<uint64_t>((value & 0x3ffff) >> 4); };
  return field(address) | field(leading) << 16 | field(stride) << 32 |
         static_cast<uint64_t>(modes[static_cast<int>(swizzle)]) << 62;
}

// wgmma.fence: orders earlier accesses to the registers of D and A before the next wgmma. PTX 9.7.15.7.1.
DEVICE void wgmma_fence(WHERE) {
  PTX(asm volatile("wgmma.fence.sync.aligned;" :: : "memory");)
  SIM(sim::wgmma_fence(where);)
}

// The same for a D that was written to: named, so that the compiler cannot move a write past the fence.
template <int count>
DEVICE void wgmma_fence(float (&d)[count] AND_WHERE) {
#ifndef JAXKERN_SIM
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
  SIM(static_cast<void>(d);)
  wgmma_fence(SIM(where));
}

// wgmma.commit_group. PTX 9.7.15.7.2.
DEVICE void wgmma_commit_group(WHERE) {
  PTX(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory");)
  SIM(sim::wgmma_commit_group(where);)
}

#ifndef JAXKERN_SIM

// Lists of the asm operands of D, and the numbers of those that follow.
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_12 ", %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_56 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_64 NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_80 NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_88 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_96 NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128                                                                                \
  NAMES_96                                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define OPERANDS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define OPERANDS_8 OPERANDS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define OPERANDS_12 OPERANDS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define OPERANDS_16 OPERANDS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define OPERANDS_24 \
  OPERANDS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define OPERANDS_32 \
  OPERANDS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define OPERANDS_40 \
  OPERANDS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define OPERANDS_48 \
  OPERANDS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define OPERANDS_56 \
  OPERANDS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define OPERANDS_64 \
  OPERANDS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define OPERANDS_72 \
  OPERANDS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define OPERANDS_80 \
  OPERANDS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define OPERANDS_88 \
  OPERANDS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define OPERANDS_96 \
  OPERANDS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define OPERANDS_128                                                                                                  \
  OPERANDS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),          \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])
//    n, registers of D, operands: descriptor of A (or its 4 registers), of B, whether D counts
#define WGMMA_SHAPES(SHAPE)                \
  SHAPE(8, 4, 4, 5, 6, 7, 8, 9)            \
  SHAPE(16, 8, 8, 9, 10, 11, 12, 13)       \
  SHAPE(24, 12, 12, 13, 14, 15, 16, 17)    \
  SHAPE(32, 16, 16, 17, 18, 19, 20, 21)    \
  SHAPE(48, 24, 24, 25, 26, 27, 28, 29)    \
  SHAPE(64, 32, 32, 33, 34, 35, 36, 37)    \
  SHAPE(80, 40, 40, 41, 42, 43, 44, 45)    \
  SHAPE(96, 48, 48, 49, 50, 51, 52, 53)    \
  SHAPE(112, 56, 56, 57, 58, 59, 60, 61)   \
  SHAPE(128, 64, 64, 65, 66, 67, 68, 69)   \
  SHAPE(144, 72, 72, 73, 74, 75, 76, 77)   \
  SHAPE(160, 80, 80, 81, 82, 83, 84, 85)   \
  SHAPE(176, 88, 88, 89, 90, 91, 92, 93)   \
  SHAPE(192, 96, 96, 97, 98, 99, 100, 101) \
  SHAPE(256, 128, 128, 129, 130, 131, 132, 133)

#endif

// wgmma.mma_async.m64nNk32.f32.e4m3.e4m3, A by descriptor. D starts from zero if not `accumulate`. PTX 9.7.15.5.2.
template <int n>
DEVICE void wgmma_e4m3(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate AND_WHERE) {
#ifndef JAXKERN_SIM
#define SHAPE(n_, count, a_, b_, p_, unused0, unused1, unused2)                                                   \
  if constexpr (n == n_)                                                                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_                                                         \
                 ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #n_ "k32.f32.e4m3.e4m3 {" NAMES_##count "}, %" #a_ ", %" #b_ \
                                                                                             ", p, 1, 1;\n}"      \
                 : OPERANDS_##count                                                                               \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  WGMMA_SHAPES(SHAPE)
#undef SHAPE
#endif
  SIM(sim::wgmma(sim::Format::e4m3, n, d, nullptr, a, b, false, false, accumulate, where);)
}

// The same, A in registers.
template <int n>
DEVICE void wgmma_e4m3(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate AND_WHERE) {
#ifndef JAXKERN_SIM
#define SHAPE(n_, count, a0, a1, a2, a3, b_, p_)                                             \
  if constexpr (n == n_)                                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_                                    \
                 ", 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n_ "k32.f32.e4m3.e4m3 {" NAMES_##count \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", p, 1, 1;\n}"        \
                 : OPERANDS_##count                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
  WGMMA_SHAPES(SHAPE)
#undef SHAPE
#endif
  SIM(sim::wgmma(sim::Format::e4m3, n, d, a, 0, b, false, false, accumulate, where);)
}

SIM(template <typename Number> constexpr auto sim_format_of = std::is_same_v<Number, bfloat16> ? sim::Format::bfloat16
                                                                                               : sim::Format::float16;)

// wgmma.mma_async.m64nNk16.f32, of bfloat16 or float16. A is MN-major if `transposed_a`, B if `transposed_b`.
template <typename Number, int n, bool transposed_b = false, bool transposed_a = false>
DEVICE void wgmma_16bit(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate AND_WHERE) {
#ifndef JAXKERN_SIM
#define SHAPE(n_, count, a_, b_, p_, t_, u_, unused2)                                                      \
  if constexpr (n == n_)                                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_                                                  \
                 ", 0;\n"                                                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n_ "k16.f32." NUMBER "." NUMBER " {" NAMES_##count   \
                 "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #t_ ", %" #u_ ";\n}"                                  \
                 : OPERANDS_##count                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(transposed_a)), \
                   "n"(static_cast<int>(transposed_b)));
#define NUMBER "bf16"
  if constexpr (std::is_same_v<Number, bfloat16>) {
    WGMMA_SHAPES(SHAPE)
  }
#undef NUMBER
#define NUMBER "f16"
  if constexpr (std::is_same_v<Number, float16>) {
    WGMMA_SHAPES(SHAPE)
  }
#undef NUMBER
#undef SHAPE
#endif
  SIM(sim::wgmma(sim_format_of<Number>, n, d, nullptr, a, b, transposed_a, transposed_b, accumulate, where);)
}

// The same, A in registers.
template <typename Number, int n, bool transposed_b = false>
DEVICE void wgmma_16bit(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate AND_WHERE) {
#ifndef JAXKERN_SIM
#define SHAPE(n_, count, a0, a1, a2, a3, b_, p_)                                                         \
  if constexpr (n == n_)                                                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_                                                \
                 ", 0;\n"                                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n_ "k16.f32." NUMBER "." NUMBER " {" NAMES_##count \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", p, 1, 1, " TRANSPOSED ";\n}"    \
                 : OPERANDS_##count                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
#define NUMBER "bf16"
#define TRANSPOSED "0"
  if constexpr (std::is_same_v<Number, bfloat16> && !transposed_b) {
    WGMMA_SHAPES(SHAPE)
  }
#undef TRANSPOSED
#define TRANSPOSED "1"
  if constexpr (std::is_same_v<Number, bfloat16> && transposed_b) {
    WGMMA_SHAPES(SHAPE)
  }
#undef TRANSPOSED
#undef NUMBER
#define NUMBER "f16"
#define TRANSPOSED "0"
  if constexpr (std::is_same_v<Number, float16> && !transposed_b) {
    WGMMA_SHAPES(SHAPE)
  }
#undef TRANSPOSED
#define TRANSPOSED "1"
  if constexpr (std::is_same_v<Number, float16> && transposed_b) {
    WGMMA_SHAPES(SHAPE)
  }
#undef TRANSPOSED
#undef NUMBER
#undef SHAPE
#endif
  SIM(sim::wgmma(sim_format_of<Number>, n, d, a, 0, b, false, transposed_b, accumulate, where);)
}

// wgmma.wait_group: until at most `pending` groups are not complete. The accumulators of those that are complete then
// are named, so that the compiler cannot move a use of them before the wait. PTX 9.7.15.7.3.
template <int pending, int count>
DEVICE void wgmma_wait_group(float (&d)[count] AND_WHERE) {
#ifndef JAXKERN_SIM
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
  SIM(sim::wgmma_wait_group(pending, {d}, where);)
}

template <int pending, int count, int other_count>
DEVICE void wgmma_wait_group(float (&d)[count], float (&e)[other_count] AND_WHERE) {
#ifndef JAXKERN_SIM
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#pragma unroll
  for (int i = 0; i < other_count; ++i) asm volatile("" : "+f"(e[i])::"memory");
#endif
  SIM(sim::wgmma_wait_group(pending, {d, e}, where);)
}

}  // namespace jaxkern::cuda
