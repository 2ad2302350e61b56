// The experts of each token: group-limited top-k, a warp for each token.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/moe/moe.h"

namespace jaxkern::cuda::kernels {

// Numbers as integers of the same order, where both zeros are one and a NaN is minus infinity.
DEVICE uint32_t sort_key(float x) {
  uint32_t bits = x != x ? 0xff800000 : x == 0 ? 0 : float_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}
DEVICE float from_sort_key(uint32_t key) { return bits_float(key >> 31 ? key & 0x7fffffff : ~key); }

struct ChooseExperts {
  static constexpr int threads = 256, warps = threads / warp_size, resident = 4;
  static constexpr uint32_t taken = 0, last = 0x007fffff;  // below every key, and that of minus infinity
  static std::string name() { return "ChooseExperts"; }

  struct Params {
    Global<const float> scores;  // [tokens, experts]
    Global<const float> bias;
    Global<int32_t> expert_ids;  // [tokens, top_k]
    int tokens, experts, groups, topk_groups, top_k;
  };
  // One in 32 lies idle: lanes look at runs of keys, which begin in banks of their own thus.
  template <int size>
  struct SortKeys {
    Shared<uint32_t> padded[size + size / warp_size];
    DEVICE Shared<uint32_t>& operator[](int i) { return padded[i + i / warp_size]; }
  };
  struct Smem {
    SortKeys<most_experts> experts[warps];
    SortKeys<most_expert_groups> groups[warps];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int warp = warp_index(), lane = lane_index();
    auto& experts = s.experts[warp];
    for (int token = block_index() * warps + warp; token < p.tokens; token += grid_size() * warps) {
      syncwarp();
      for (int i = lane; i < p.experts; i += warp_size) {
        float score = load_global<float>(p.scores, int64_t(token) * p.experts + i);
        store(experts[i], sort_key(score + load_global<float>(p.bias, i)));
      }
      syncwarp();
      if (p.topk_groups < p.groups) choose_groups(p, experts, s.groups[warp]);
      choose(experts, p.experts, p.top_k, [&](int choice, int expert) {
        if (lane == 0) store_global(p.expert_ids, int64_t(token) * p.top_k + choice, expert);
      });
    }
  }

  // Leaves the experts of the best groups as they are; the others are not to be chosen.
  DEVICE static void choose_groups(const Params& p, SortKeys<most_experts>& experts,
                                   SortKeys<most_expert_groups>& groups) {
    int size = p.experts / p.groups;
    for (int group = lane_index(); group < p.groups; group += warp_size) {
      uint32_t first = last, second = last;
      for (int i = 0; i < size; ++i) {
        uint32_t key = load(experts[group * size + i]), lower = key < first ? key : first;
        second = lower > second ? lower : second;
        first = key > first ? key : first;
      }
      store(groups[group], size == 1 ? first : sort_key(from_sort_key(first) + from_sort_key(second)));
    }
    syncwarp();
    choose(groups, p.groups, p.topk_groups, [](int, int) {});
    for (int i = lane_index(); i < p.experts; i += warp_size)
      if (load(groups[i / size]) != taken) store(experts[i], taken);
    syncwarp();
  }

  // Calls f(i, index) for the `count` highest of `size` keys, in falling order, ties by index, and marks them as
  // taken. A lane looks after neighbouring keys.
  template <int most, typename F>
  DEVICE static void choose(SortKeys<most>& keys, int size, int count, F f) {
    int share = static_cast<int>(ceil_div(size, warp_size)), begin = lane_index() * share;
    int end = begin + share < size ? begin + share : size, index = begin;
    auto highest = [&] {
      uint32_t best = taken;
      for (int i = begin; i < end; ++i) {
        uint32_t key = load(keys[i]);
        if (key > best) index = i;
        best = key > best ? key : best;
      }
      return best;
    };
    uint32_t own = highest();
    for (int i = 0; i < count; ++i) {
      uint32_t best = own;
#pragma unroll
      for (int mask = warp_size / 2; mask > 0; mask /= 2) {
        uint32_t other = shfl_xor(best, mask);
        best = other > best ? other : best;
      }
      int lane = lowest_bit(ballot(own == best));
      f(i, shfl(index, lane));
      if (lane_index() == lane) {
        store(keys[index], taken);
        own = highest();
      }
    }
    syncwarp();
  }
};

}  // namespace jaxkern::cuda::kernels
