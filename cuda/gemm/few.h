// What the two kernels for few rows of a share: their parameters, and the warp that copies scales.
#pragma once

#include "cuda/fours.h"
#include "cuda/gemm/schedule.h"

namespace jaxkern::cuda::kernels {

template <typename Schedule, typename Out>
struct FewParams {
  TensorMap a, b;  // matrices of a batch each: [batch, m, k], [b_batch, n, k]
  Global<const float> a_scales, b_scales;
  Global<const Out> accumulator;  // empty: none
  Global<Out> out;
  int m, n, k_blocks;
  typename Schedule::Params schedule;
};

// By a warp, for all its lanes' arrivals at a stage's barrier: the scales of a tile, of each row of a, and of b either
// of each row or of the block of 128 rows that has all of the tile's.
template <typename Format, typename Params, typename Smem, typename At>
DEVICE void produce_scales(const Params& p, Smem& s, const Work& w, At& at) {
  constexpr bool rows = Format::b_rows;
  int64_t block =
      rows ? int64_t(w.b_batch) * p.k_blocks : (int64_t(w.b_batch) * ceil_div(p.n, 128) + w.column / 128) * p.k_blocks;
  for (int k = 0; k < w.k_blocks; ++k, at.advance()) {
    mbarrier_wait(s.empty[at.stage], at.phase ^ 1);
    copy_scales(s.a_scales[at.stage], p.a_scales, int64_t(w.a_batch) * p.k_blocks + k, w.row, p.m);
    copy_scales(s.b_scales[at.stage], p.b_scales, block + k, rows ? w.column : 0, rows ? p.n : 1);
    cp_async_mbarrier_arrive(s.full[at.stage]);
  }
}

}  // namespace jaxkern::cuda::kernels
