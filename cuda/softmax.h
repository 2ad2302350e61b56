// A softmax, block by block of keys, over the rows of a wgmma's result: a thread has parts of two rows, eight apart,
// and the four lanes of a quad have a row together.
#pragma once

#include <type_traits>

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::kernels {

constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;

DEVICE float max_of_quad(float x) {
  x = fmaxf(x, shfl_xor(x, 1));
  return fmaxf(x, shfl_xor(x, 2));
}
DEVICE float sum_of_quad(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

// Of weights that are rounded to Number.
template <typename Number>
struct Softmax {
  // What the exponents of a row's weights are counted from stays the same until a logit is more than this above it;
  // then all that was summed so far is multiplied. It may be any number that keeps weights finite.
  static constexpr float headroom = std::is_same_v<Number, float16> ? 5 : 8;
  // Weights are kept times 2^this: far below the largest one float16 has few bits, and then none.
  static constexpr float exponent = std::is_same_v<Number, float16> ? 10 : 0;

  // What the exponents of the weights are counted from: the largest logit, but for the headroom.
  float largest[2] = {-__builtin_inff(), -__builtin_inff()};
  float total[2] = {0, 0};  // of this thread's weights
  float factor[2];          // what was summed so far is to be multiplied by

  // Exponents are counted from `next` on; true if they were not.
  DEVICE bool count_from(int j, float next) {
    bool grows = next != largest[j];
    factor[j] = grows ? ex2(largest[j] - next) : 1;
    largest[j] = next;
    total[j] *= factor[j];
    return grows;
  }

  // Weights from logits, which are multiplied with `scale` first, log2(e) included; true if the result so far is to
  // shrink. Items for which counts(i) is false are no keys of their row; `all`: there are none of these.
  template <int count, typename Counts>
  DEVICE bool weigh(float (&logits)[count], float scale, bool all, Counts counts) {
    constexpr float minus_infinity = -__builtin_inff();
#pragma unroll
    for (int i = 0; i < count; ++i) logits[i] *= scale;
    if (!all) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (!counts(i)) logits[i] = minus_infinity;
    }
    float most[2] = {minus_infinity, minus_infinity}, base[2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < count; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], logits[i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      most[j] = max_of_quad(most[j]);
      grown |= count_from(j, most[j] > largest[j] + headroom ? most[j] : largest[j]);
      base[j] = (largest[j] == minus_infinity ? 0 : largest[j]) - exponent;
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      logits[i] = ex2(logits[i] - base[i / 2 % 2]);
      total[i / 2 % 2] += logits[i];
    }
    return grown;
  }

  template <int count>
  DEVICE void shrink(float (&result)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) result[i] *= factor[i / 2 % 2];
  }

  // The logarithm to base 2 of the sum of a row's exponentials, from that of its weights.
  DEVICE float log2_sum(int j, float sum) const {
    return sum == 0 ? -__builtin_inff() : largest[j] + lg2(sum) - exponent;
  }
};

}  // namespace jaxkern::cuda::kernels
