// Zeros into the rows of a grouped product that belong to no group.
#pragma once

#include "cuda/gemm/schedule.h"

namespace jaxkern::cuda::kernels {

struct Gaps {
  static constexpr int threads = 256;
  static std::string name() { return "Gaps"; }

  struct Params {
    GroupList groups;
    Global<uint32_t> out;
    int row_words;  // of a row of out; a multiple of 4
  };
  using Smem = GroupTable;

  DEVICE static void run(const Params& p, Smem& s) {
    if (warp_index() == 0) fill_table(p.groups, s);
    bar_sync(0, threads);
    constexpr int warps = threads / warp_size;
    int step = grid_size() * warps, mine = block_index() * warps + thread_index() / warp_size;
    for (int group = 0; group < p.groups.count; ++group) {
      int begin = load(s.start[group]) + load(s.size[group]);
      int end = group + 1 < p.groups.count ? load(s.start[group + 1]) : p.groups.all;
      for (int row = begin + mine; row < end; row += step)
        for (int i = lane_index() * 4; i < p.row_words; i += warp_size * 4)
          store_global(p.out, int64_t(row) * p.row_words + i, Pack<uint32_t, 4>{0, 0, 0, 0});
    }
  }
};

}  // namespace jaxkern::cuda::kernels
