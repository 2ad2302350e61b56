// A row for each assignment, stable within its group, by two kernels. Both cut the assignments into stretches of equal
// length, in order, a warp each. The first counts the groups in those of a block of threads. In the second each block
// adds up the counts of the blocks before its own, and so knows where its rows begin without waiting for anyone.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/limits.h"

namespace jaxkern::cuda::kernels {

constexpr int slot_threads = 512, slot_warps = slot_threads / warp_size;

// How many of each group the warps of a block have come by.
using GroupCounts = Shared<int>[slot_warps][most_groups];

struct Assignments {
  Global<const int32_t> ids;
  Global<int32_t> source;
  int64_t count;
  int groups, bits;  // and the bits of the largest
  int blocks;        // that share the assignments
  int steps;         // of 32 assignments, that a warp takes
  int rows;
};

// Calls f(assignment, group, lanes of the same group) for each step of this warp's stretch; the group of none is -1.
template <typename F>
DEVICE void walk(const Assignments& a, F f) {
  int64_t warp = int64_t(block_index()) * slot_warps + thread_index() / warp_size;
  int64_t i = warp * a.steps * warp_size + lane_index();
  int next = i < a.count ? load_global<int32_t>(a.ids, i) : -1;
  for (int step = 0; step < a.steps; ++step, i += warp_size) {
    int group = next >= 0 && next < a.groups ? next : -1;
    bool more = step + 1 < a.steps && i + warp_size < a.count;
    next = more ? load_global<int32_t>(a.ids, i + warp_size) : -1;
    uint32_t same = ballot(group >= 0);
    for (int bit = 0; bit < a.bits; ++bit) {
      uint32_t ones = ballot(group >> bit & 1);
      same &= group >> bit & 1 ? ones : ~ones;
    }
    f(i, group, group >= 0 ? same : 0);
  }
}

// One lane for each group adds what the warp found of it.
DEVICE void count_same(GroupCounts& counts, int group, uint32_t same) {
  auto& count = counts[thread_index() / warp_size][group < 0 ? 0 : group];
  if (same && lowest_bit(same) == lane_index()) store(count, load(count) + popc(same));
  syncwarp();
}

DEVICE void count_stretch(const Assignments& a, GroupCounts& counts) {
  for (int group = lane_index(); group < a.groups; group += warp_size)
    store(counts[thread_index() / warp_size][group], 0);
  syncwarp();
  walk(a, [&](int64_t, int group, uint32_t same) { count_same(counts, group, same); });
}

// Of every row, before there are any assignments in them.
DEVICE void clear_source(const Assignments& a) {
  for (int64_t row = int64_t(block_index()) * slot_threads + thread_index(); row < a.rows;
       row += int64_t(grid_size()) * slot_threads)
    store_global(a.source, row, -1);
}

struct CountAssignments {
  static constexpr int threads = slot_threads;
  static std::string name() { return "CountAssignments"; }

  struct Params {
    Assignments assignments;
    Global<int32_t> counts;  // [blocks, groups]
  };
  struct Smem {
    GroupCounts counts;
  };

  DEVICE static void run(const Params& p, Smem& s) {
    const Assignments& a = p.assignments;
    clear_source(a);
    if (block_index() >= a.blocks) return;
    count_stretch(a, s.counts);
    bar_sync(0, threads);
    for (int group = thread_index(); group < a.groups; group += threads) {
      int sum = 0;
#pragma unroll
      for (int warp = 0; warp < slot_warps; ++warp) sum += load(s.counts[warp][group]);
      store_global(p.counts, int64_t(block_index()) * a.groups + group, sum);
    }
  }
};

struct PlaceAssignments {
  static constexpr int threads = slot_threads;
  static std::string name() { return "PlaceAssignments"; }

  struct Params {
    Assignments assignments;
    Global<const int32_t> counts;  // [blocks, groups]; of one block, which does without, nothing
    Global<int32_t> slots, sizes, dropped;
    int alignment, slab;  // slab: rows of each group, if they do not follow one another
    bool slabs;
  };
  struct Smem {
    GroupCounts before;  // of a group's assignments, those before the next one of a warp
    Shared<int> count[most_groups], start[most_groups], kept[most_groups];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    const Assignments& a = p.assignments;
    if (a.blocks == 1) clear_source(a);
    count_stretch(a, s.before);
    bar_sync(0, threads);
    for (int group = thread_index(); group < a.groups; group += threads) sum_counts(p, s, group);
    bar_sync(0, threads);
    if (thread_index() < warp_size) place_groups(p, s);
    bar_sync(0, threads);
    int warp = thread_index() / warp_size;
    walk(a, [&](int64_t i, int group, uint32_t same) {
      int slot = -1;
      if (group >= 0) {
        int rank = load(s.before[warp][group]) + popc(same & ((uint32_t{1} << lane_index()) - 1));
        if (rank < load(s.kept[group])) slot = load(s.start[group]) + rank;
      }
      if (i < a.count) store_global(p.slots, i, slot);
      if (slot >= 0) store_global(a.source, slot, static_cast<int32_t>(i));
      syncwarp();
      count_same(s.before, group, same);
    });
  }

  // From the counts of warps to those before each warp, and of all.
  DEVICE static void sum_counts(const Params& p, Smem& s, int group) {
    const Assignments& a = p.assignments;
    int before = 0, all = 0;
    if (a.blocks > 1) {
#pragma unroll 16
      for (int block = 0; block < a.blocks; ++block) {
        int count = load_global<int32_t>(p.counts, int64_t(block) * a.groups + group);
        all += count;
        before += block < block_index() ? count : 0;
      }
    }
#pragma unroll
    for (int warp = 0; warp < slot_warps; ++warp) {
      int count = load(s.before[warp][group]);
      store(s.before[warp][group], before);
      before += count;
    }
    store(s.count[group], a.blocks > 1 ? all : before);
  }

  // Where each group's rows begin, and how many they are: by a warp, 32 groups at a time. A start is cut to the rows,
  // so that no sum of two passes 2^32.
  DEVICE static void place_groups(const Params& p, Smem& s) {
    auto least = [](uint32_t x, uint32_t y) { return x < y ? x : y; };
    uint32_t lane = lane_index(), begin = 0, groups = p.assignments.groups, rows = p.assignments.rows;
    uint32_t alignment = p.alignment, slab = p.slab;
    for (uint32_t first = 0; first < groups; first += warp_size) {
      uint32_t group = first + lane, count = group < groups ? load(s.count[group]) : 0;
      uint32_t sum = least((count + alignment - 1) / alignment * alignment, rows);
      for (uint32_t distance = 1; distance < warp_size; distance *= 2) {
        uint32_t other = shfl(sum, lane < distance ? lane : lane - distance);
        if (lane >= distance) sum = least(sum + other, rows);
      }
      uint32_t before = shfl(sum, lane == 0 ? 0 : lane - 1);
      uint32_t start = p.slabs ? group * slab : least(begin + (lane == 0 ? 0 : before), rows);
      uint32_t kept = least(count, p.slabs ? slab : rows - start);
      if (group < groups) {
        store(s.start[group], static_cast<int>(start));
        store(s.kept[group], static_cast<int>(kept));
        if (block_index() == 0) {
          store_global(p.sizes, group, static_cast<int32_t>(kept));
          store_global(p.dropped, group, static_cast<int32_t>(count - kept));
        }
      }
      begin = least(begin + shfl(sum, warp_size - 1), rows);
    }
  }
};

}  // namespace jaxkern::cuda::kernels
