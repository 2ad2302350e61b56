// Attention to all keys from the attention to parts of them: a warp for each row, which sums up to 512 columns at a
// time over the parts, in their order.
#pragma once

#include "cuda/fours.h"
#include "cuda/mla/mla.h"
#include "cuda/softmax.h"

namespace jaxkern::cuda::kernels {

template <typename T>
struct MergeAttentionKernel {
  static constexpr int threads = 128, fours = 4;
  static std::string name() { return std::string("MergeAttentionKernel<") + format_name<T> + ">"; }

  struct Params {
    Global<const T> outs;      // [parts, rows, width]
    Global<const float> lses;  // [parts, rows]
    Global<T> out;
    Global<float> lse;
    int64_t rows;
    int parts, width;
    bool vectors;  // four neighbouring columns are aligned
  };
  struct Smem {};

  DEVICE static void run(const Params& p, Smem&) {
    if (p.vectors)
      run<true>(p);
    else
      run<false>(p);
  }

  template <bool vectors>
  DEVICE static void run(const Params& p) {
    int warps = threads / warp_size;
    for (int64_t row = int64_t(block_index()) * warps + thread_index() / warp_size; row < p.rows;
         row += int64_t(grid_size()) * warps) {
      float most = -__builtin_inff(), total = 0;
      for (int part = 0; part < p.parts; ++part) most = fmaxf(most, lse_of(p, part, row));
      float base = most == -__builtin_inff() ? 0 : most;
      for (int part = 0; part < p.parts; ++part) total += ex2((lse_of(p, part, row) - base) * log2e);
      float inverse = total == 0 ? 0 : rcp(total);
      for (int first = lane_index() * 4; first < p.width; first += warp_size * 4 * fours) {
        float sums[fours][4] = {};
        for (int part = 0; part < p.parts; ++part) {
          float lse = lse_of(p, part, row);
          if (lse == -__builtin_inff()) continue;  // without keys: what it holds may be anything
          float weight = ex2((lse - base) * log2e);
          Four<T> out[fours];
#pragma unroll
          for (int i = 0; i < fours; ++i) {
            int column = first + i * warp_size * 4;
            out[i] = load_four<vectors>(p.outs, (part * p.rows + row) * p.width + column, p.width - column);
          }
#pragma unroll
          for (int i = 0; i < fours; ++i) {
            Pack<float, 4> x = to_floats(out[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = fma(weight, x.item[j], sums[i][j]);
          }
        }
#pragma unroll
        for (int i = 0; i < fours; ++i) {
          int column = first + i * warp_size * 4;
          Pack<float, 4> x;
#pragma unroll
          for (int j = 0; j < 4; ++j) x.item[j] = sums[i][j] * inverse;
          store_four<vectors>(p.out, row * p.width + column, p.width - column, round_to<T>(x));
        }
      }
      if (lane_index() == 0) store_global(p.lse, row, base + lg2(total) * ln2);
    }
  }

  DEVICE static float lse_of(const Params& p, int part, int64_t row) {
    return load_global<float>(p.lses, part * p.rows + row);
  }
};

}  // namespace jaxkern::cuda::kernels
