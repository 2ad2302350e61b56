// A block of threads writes a few neighbouring rows, a warp each at a time. First it looks at all rows after them, for
// whatever goes to the same place later: the order of rows decides, not that of blocks.
#pragma once

#include "cuda/fours.h"
#include "cuda/quantize/kernel.h"

namespace jaxkern::cuda::kernels {

template <typename From, typename To>
struct AppendRows {
  static constexpr int threads = 256, warps = threads / warp_size, most_rows = 32;
  static constexpr int resident = 4;
  static constexpr int fours = std::is_same_v<To, Packed> ? 4 : 5;  // of a lane at once: MLA's 512 columns, or 576
  static std::string name() { return std::string("AppendRows<") + format_name<From> + ", " + format_name<To> + ">"; }

  using Element = std::conditional_t<std::is_same_v<To, Packed>, uint8_t, To>;

  struct Params {
    Global<const From> rows;
    Global<Element> cache;
    Global<const int32_t> block_table, positions;
    int count, block_rows;      // all rows, and those of a block of threads
    int width, latent, stride;  // numbers of a row, and elements of one in the cache
    int tokens;                 // of a request
    int pages, page, table_pages;
    bool vectors;  // four numbers of a row are aligned
  };

  struct Smem {
    Shared<uint32_t> late[warps];
  };

  // Where row i goes, as a row of the cache; -1: nowhere.
  DEVICE static int slot_of(const Params& p, int i) {
    int position = i < p.count ? load_global<int32_t>(p.positions, i) : -1;
    if (position < 0 || position / p.page >= p.table_pages) return -1;
    int page = load_global<int32_t>(p.block_table, int64_t(i / p.tokens) * p.table_pages + position / p.page);
    return page < 0 || page >= p.pages ? -1 : page * p.page + position % p.page;
  }

  DEVICE static void run(const Params& p, Smem& s) {
    int first = block_index() * p.block_rows, warp = thread_index() / warp_size, lane = lane_index();
    int own = lane < p.block_rows ? slot_of(p, first + lane) : -1;  // of row `lane`, in every warp
    uint32_t late = overwritten(p, first, own, warp);
    if (lane == 0) store(s.late[warp], late);
    bar_sync(0, threads);
#pragma unroll
    for (int i = 0; i < warps; ++i) late |= load(s.late[i]);
    for (int i = warp; i < p.block_rows; i += warps) {
      int slot = shfl(own, i);
      if (slot < 0 || late >> i & 1) continue;
      int64_t from = int64_t(first + i) * p.width, to = int64_t(slot) * p.stride;
      if (p.vectors)
        write<true>(p, from, to);
      else
        write<false>(p, from, to);
    }
  }

  // The block's rows, a bit each, that a later one overwrites, of those that this warp looks at.
  DEVICE static uint32_t overwritten(const Params& p, int first, int own, int warp) {
    int least = own < 0 ? INT32_MAX : own, most = own;
#pragma unroll
    for (int mask = warp_size / 2; mask > 0; mask /= 2) {
      int low = shfl_xor(least, mask), high = shfl_xor(most, mask);
      least = low < least ? low : least;
      most = high > most ? high : most;
    }
    uint32_t late = 0;
#pragma unroll 4
    for (int i = first + warp * warp_size; i < p.count; i += threads) {
      int row = i + lane_index(), slot = slot_of(p, row);
      bool near = slot >= least && slot <= most;
      if (!ballot(near)) continue;
      for (int j = 0; j < p.block_rows; ++j) {
        bool same = shfl(own, j) == slot;
        if (ballot(same && near && row > first + j)) late |= uint32_t{1} << j;
      }
    }
    return late;
  }

  template <bool vectors>
  DEVICE static void write(const Params& p, int64_t from, int64_t to) {
    if constexpr (std::is_same_v<To, Packed>) {
      pack<vectors>(p, from, to);
    } else {
#pragma unroll 1
      for (int first = lane_index() * 4; first < p.width; first += fours * warp_size * 4) {
        Four<From> x[fours];
#pragma unroll
        for (int j = 0; j < fours; ++j) {
          int i = first + j * warp_size * 4;
          x[j] = load_four<vectors>(p.rows, from + i, p.width - i);
        }
#pragma unroll
        for (int j = 0; j < fours; ++j) {
          int i = first + j * warp_size * 4;
          store_four<vectors>(p.cache, to + i, p.width - i, convert<To>(x[j]));
        }
      }
    }
  }

  // A warp has four numbers a lane of a block that shares a scale.
  template <bool vectors>
  DEVICE static void pack(const Params& p, int64_t from, int64_t to) {
    int blocks = static_cast<int>(ceil_div(p.latent, block_k));
    int64_t scales = to + p.latent, rope = scales + blocks * 4;
#pragma unroll 1
    for (int first = 0; first < blocks; first += fours) {
      Four<From> four[fours];
#pragma unroll
      for (int j = 0; j < fours; ++j) {
        int i = (first + j) * block_k + lane_index() * 4;
        four[j] = load_four<vectors>(p.rows, from + i, p.latent - i);
      }
#pragma unroll
      for (int j = 0; j < fours; ++j) {
        int block = first + j, i = block * block_k + lane_index() * 4;
        if (block < blocks) pack_four(p, convert<float>(four[j]), i, to + i, scales + block * 4);
      }
    }
    for (int i = lane_index() * 4; i < p.width - p.latent; i += warp_size * 4) {
      int count = p.width - p.latent - i;
      Four<bfloat16> four = convert<bfloat16>(load_four<vectors>(p.rows, from + p.latent + i, count));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < count) store_global(p.cache, rope + (i + j) * 2, bits_at(four, j));
    }
  }

  // A lane's part of a block: numbers i to i + 3 of the row.
  DEVICE static void pack_four(const Params& p, const Four<float>& four, int i, int64_t to, int64_t scale_to) {
    Words words = {four.word[0], four.word[1], four.word[2], four.word[3]};
    float scale = scale_of<float>(max_of_lanes<float, warp_size>(max_magnitude<float>(0u, words)), true);
    if (lane_index() == 0) store_global(p.cache, scale_to, scale);
    float reciprocal = rcp(scale), x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = quotient(bits_float(words.item[j]), scale, reciprocal);
    uint32_t codes = cvt_e4m3x2(x[0], x[1]) | uint32_t(cvt_e4m3x2(x[2], x[3])) << 16;
    if (i < p.latent) store_global(p.cache, to, codes);
  }
};

}  // namespace jaxkern::cuda::kernels
