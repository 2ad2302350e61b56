// What the matrix products share: the formats of their operands, the product of one stage, and the scales.
//
// Left is the operand that wgmma takes as its A, 64 rows for each warpgroup; right is its B. The kernels put a left
// and b right; the one for small groups the other way round, so that their rows cost no more than they are.
#pragma once

#include <initializer_list>
#include <string>

#include "cuda/arch/arch.h"
#include "cuda/ring.h"

namespace jaxkern::cuda::kernels {

constexpr int block_k = 128;  // bytes of one row in one stage; of e4m3, the elements of one scale
constexpr int swizzle_row = 128;
constexpr int swizzle_group = 8 * swizzle_row;

// What a and b are: e4m3, a with scales of 1 x 128 and b with those of its blocks of 128 x 128 or of 1 x 128, or
// bfloat16. `stage_k` elements of k make a stage.
struct BlockScaled {
  static constexpr const char* name = "BlockScaled";
  static constexpr bool scaled = true, b_rows = false, k_major = true;
  static constexpr int stage_k = block_k;
};
struct RowScaled {
  static constexpr const char* name = "RowScaled";
  static constexpr bool scaled = true, b_rows = true, k_major = true;
  static constexpr int stage_k = block_k;
};
struct Unscaled {
  static constexpr const char* name = "Unscaled";
  static constexpr bool scaled = false, b_rows = false, k_major = true;
  static constexpr int stage_k = block_k / 2;
};
// bfloat16 a [k, m] and b [k, n]. In a stage 64 columns of them lie as the copy engine brings them: stage_k rows of 128
// bytes, then the next 64 columns. As many bytes for a row of the result as in the other formats.
struct Transposed {
  static constexpr const char* name = "Transposed";
  static constexpr bool scaled = false, b_rows = false, k_major = false;
  static constexpr int stage_k = block_k / 2;
};
constexpr int box_columns = swizzle_row / 2;

// What a product of one stage reads from `first` on.
template <typename Format>
DEVICE uint64_t operand(const void* first) {
  constexpr int leading = Format::k_major ? 0 : box_columns * block_k;
  return matrix_descriptor(shared_address(first), leading, swizzle_group, Swizzle::bytes_128);
}

// sums = left right^T over one stage, for 64 rows of left, from what `operand` makes of them; unscaled, it is added to
// sums. In flight when it returns.
template <typename Format, int n>
DEVICE void multiply_stage(float (&sums)[n / 2], uint64_t left, uint64_t right AND_WHERE) {
  constexpr int step = (Format::k_major ? 32 : 16 * swizzle_row) / 16;  // along k, in units of a descriptor
  wgmma_fence(SIM(where));
#pragma unroll
  for (int k = 0; k < block_k / 32; ++k) {
    if constexpr (Format::scaled)
      wgmma_e4m3<n>(sums, left + k * step, right + k * step, k > 0 SIM(, where));
    else
      wgmma_16bit<bfloat16, n, !Format::k_major, !Format::k_major>(sums, left + k * step, right + k * step,
                                                                   true SIM(, where));
  }
  wgmma_commit_group(SIM(where));
}

// The product of one stage and where it is.
template <int n>
struct Product {
  int stage;
  float sums[n / 2];
};

// `count` products, each put in flight by `start` and, when it has ended, used by `finish`: the tensor cores are at the
// next one meanwhile.
template <int n, typename Start, typename Finish>
DEVICE void overlap(int count, Start&& start, Finish&& finish) {
  Product<n> even, odd;
  if (count <= 0) return;
  start(even);
  int i = 1;
  for (; i + 1 < count; i += 2) {
    start(odd);
    wgmma_wait_group<1>(even.sums);
    finish(even);
    start(even);
    wgmma_wait_group<1>(odd.sums);
    finish(odd);
  }
  if (i < count) {
    start(odd);
    wgmma_wait_group<1>(even.sums);
    finish(even);
    wgmma_wait_group<0>(odd.sums);
    finish(odd);
  } else {
    wgmma_wait_group<0>(even.sums);
    finish(even);
  }
}

// The scales of `rows` rows from `first` on for one 128 of k, by a warp; zeros beyond the matrix. For
// matrices whose rows of scales are not aligned to 16 bytes, as a tensor map needs.
template <int rows>
DEVICE void copy_scales(Shared<float> (&to)[rows], Global<const float> scales, int64_t k_block, int first,
                        int all_rows AND_WHERE) {
#pragma unroll
  for (int i = 0; i < rows; i += warp_size) {
    int row = i + lane_index();
    if (rows % warp_size == 0 || row < rows)
      cp_async<4>(shared_address(&to[row]), scales, k_block * all_rows + first + row,
                  first + row < all_rows SIM(, where));
  }
}

// Neighbouring elements of out and accumulator.
DEVICE Pack<float, 2> pack(float low, float high, float) { return {low, high}; }
DEVICE uint32_t pack(float low, float high, bfloat16) { return cvt_bf16x2(low, high); }
DEVICE float low_of(Pack<float, 2> x) { return x.item[0]; }
DEVICE float high_of(Pack<float, 2> x) { return x.item[1]; }
DEVICE float low_of(uint32_t x) { return bits_float(x << 16); }
DEVICE float high_of(uint32_t x) { return bits_float(x & 0xffff0000); }

template <typename Out>
using Pair = decltype(pack(0.0f, 0.0f, Out{}));

template <typename Out>
DEVICE Pair<Out> load_pair(Global<const Out> x, int64_t i AND_WHERE) {
  return load_global<Pair<Out>>(x, i SIM(, where));
}

// As the compiler prints it: "Dense<Batches, 128, 128, 1, BlockScaled, bfloat16>".
inline std::string instance_name(const char* kernel, const char* schedule, std::initializer_list<int> sizes,
                                 const char* format, bool is_float32) {
  std::string name = std::string(kernel) + "<" + schedule + (*schedule ? ", " : "");
  for (int size : sizes) name += std::to_string(size) + ", ";
  return name + format + (is_float32 ? ", float>" : ", bfloat16>");
}

}  // namespace jaxkern::cuda::kernels
