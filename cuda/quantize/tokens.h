// x [t, m], transposed and quantised in blocks of 128 tokens: an operand of a weight gradient. The tokens of each group
// start a block of their own in the result. A block of threads takes 128 tokens of 32 columns through shared memory.
#pragma once

#include "cuda/groups.h"
#include "cuda/quantize/kernel.h"

namespace jaxkern::cuda::kernels {

template <typename T>
struct TokensParams {
  Global<const T> x;
  GroupList groups;
  QuantizeParams<float> quantized;  // where it goes: [m, k], k the tokens of the result
};

template <typename T>
struct QuantizeTokens {
  static constexpr int columns = 32, threads = 256, warps = threads / warp_size;
  static constexpr int resident = 4;
  static std::string name() { return quantize_name<T>("QuantizeTokens"); }

  using Params = TokensParams<T>;

  struct Smem {
    GroupTable groups;
    Shared<int> first[most_groups];         // of the result's blocks, of each group
    Shared<float> x[columns][block_k + 4];  // 4 more spread the banks
    Shared<float> scales[columns];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    const QuantizeParams<float>& q = p.quantized;
    int warp = thread_index() / warp_size, lane = lane_index();
    if (warp == 0) {
      fill_table(p.groups, s.groups);
      syncwarp();
      count_blocks(p, s);
    }
    bar_sync(0, threads);
    for (int tile = block_index(); tile < q.m_tiles * q.k_tiles; tile += grid_size()) {
      int first_column = tile % q.m_tiles * columns, block = tile / q.m_tiles;
      int group = group_of(p, s, block);
      int from = 0, count = 0;  // the block's tokens
      if (group >= 0) {
        int done = (block - load(s.first[group])) * block_k;
        from = load(s.groups.start[group]) + done;
        count = load(s.groups.size[group]) - done;
      }
#pragma unroll 8
      for (int token = warp; token < block_k; token += warps) {
        int column = first_column + lane;
        bool there = token < count && column < q.m;
        store(s.x[lane][token], there ? to_float(load_global<T>(p.x, int64_t(from + token) * q.m + column)) : 0.0f);
      }
      bar_sync(0, threads);
#pragma unroll
      for (int i = warp; i < columns; i += warps) {
        Pack<float, 4> four = load_pack<4>(s.x[i][lane * 4]);
        Words words;
#pragma unroll
        for (int j = 0; j < 4; ++j) words.item[j] = float_bits(four.item[j]);
        float scale = scale_of<float>(max_of_lanes<float, warp_size>(max_magnitude<float>(0u, words)), q.power_of_two);
        if (lane == 0) store(s.scales[i], scale);
        int column = first_column + i;
        store_values<float, true>(q, int64_t(column) * q.k + block * block_k + lane * 4, column < q.m ? 4 : 0, words,
                                  scale, rcp(scale));
      }
      bar_sync(0, threads);
      int column = first_column + thread_index();
      if (thread_index() < columns && column < q.m)
        store_scale(q, int64_t(block) * q.m + column, load(s.scales[thread_index()]));
    }
  }

  // Where each group's blocks begin: by a warp, 32 groups at a time.
  DEVICE static void count_blocks(const Params& p, Smem& s) {
    int lane = lane_index(), before = 0;
    for (int first = 0; first < p.groups.count; first += warp_size) {
      int group = first + lane;
      int own = group < p.groups.count ? ceil_div(load(s.groups.size[group]), block_k) : 0;
      int sum = sum_up_to(own);
      if (group < p.groups.count) store(s.first[group], before + sum - own);
      before += shfl(sum, warp_size - 1);
    }
  }

  // The group that a block of the result belongs to, -1 if none: every warp looks for itself.
  DEVICE static int group_of(const Params& p, Smem& s, int block) {
    for (int first = 0; first < p.groups.count; first += warp_size) {
      int group = first + lane_index();
      bool mine = false;
      if (group < p.groups.count) {
        int in_group = block - load(s.first[group]);
        mine = in_group >= 0 && in_group * block_k < load(s.groups.size[group]);
      }
      uint32_t found = ballot(mine);
      if (found) return first + lowest_bit(found);
    }
    return -1;
  }
};

}  // namespace jaxkern::cuda::kernels
