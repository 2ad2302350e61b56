// Groups whose sizes are known on the device alone: where each begins, by one warp of every block that asks.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/limits.h"

namespace jaxkern::cuda::kernels {

// Groups of `all` rows or columns: group i begins where the one before it ends, rounded up to `alignment`, or, if
// `stride` is not 0, at i * stride. Sizes are cut to what there is.
struct GroupList {
  Global<const int32_t> sizes;
  int count, alignment, stride, all;
};

struct GroupTable {
  Shared<int> start[most_groups], size[most_groups];
};

// By one warp: a sum over all groups before, 32 groups at a time. Every size is cut to what there is, so that sums of
// 32 stay below 2^31: `all` is at most most_grouped.
DEVICE void fill_table(const GroupList& list, GroupTable& table) {
  int lane = lane_index(), begin = 0;
  for (int first = 0; first < list.count; first += warp_size) {
    int group = first + lane, limit = list.stride ? list.stride : list.all;
    int size = group < list.count ? load_global<int32_t>(list.sizes, group) : 0;
    size = size < 0 ? 0 : size < limit ? size : limit;
    int64_t aligned = (int64_t(size) + list.alignment - 1) / list.alignment * list.alignment;
    int end = sum_up_to(static_cast<int>(aligned < limit ? aligned : limit));
    int before = shfl(end, lane == 0 ? 0 : lane - 1);
    int64_t start = list.stride ? int64_t(group) * list.stride : int64_t(begin) + (lane == 0 ? 0 : before);
    if (start > list.all) start = list.all;
    if (group < list.count) {
      store(table.start[group], static_cast<int>(start));
      store(table.size[group], size < list.all - start ? size : static_cast<int>(list.all - start));
    }
    int64_t sum = int64_t(begin) + shfl(end, warp_size - 1);
    begin = sum < list.all ? sum : list.all;
  }
}

}  // namespace jaxkern::cuda::kernels
