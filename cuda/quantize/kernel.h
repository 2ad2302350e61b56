// x in blocks of 1 x 128 or 128 x 128, divided by their scales and rounded to e4m3. Nothing but memory bounds it: a
// thread has eight loads of 16 bytes in flight, keeps what they brought between the amax and the conversion, and x is
// read once. Where rows are not aligned for that, it reads element by element, and again for the conversion.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/fours.h"
#include "cuda/quantize/quantize.h"

namespace jaxkern::cuda::kernels {

constexpr int block_k = 128;

template <typename T>
struct QuantizeParams {
  Global<const T> x;  // [batch, m, k]
  Global<uint8_t> values;
  Global<float> scales;       // one of the two is empty
  Global<uint8_t> exponents;  // e8m0
  bool power_of_two;
  bool vectors;  // every row starts at a multiple of 16 bytes, of x, and of the bytes that these become
  int m, k, m_tiles, k_tiles;
};

// Where the values and scales of an op go.
template <typename T>
QuantizeParams<T> quantize_params(uint8_t* values, void* scales, ScaleFormat format, int64_t elements, int64_t blocks) {
  QuantizeParams<T> p = {};
  p.values = {values, elements};
  if (format == ScaleFormat::ue8m0)
    p.exponents = {static_cast<uint8_t*>(scales), blocks};
  else
    p.scales = {static_cast<float*>(scales), blocks};
  p.power_of_two = format != ScaleFormat::float32;
  return p;
}

template <typename T>
std::string quantize_name(const char* kernel) {
  return std::string(kernel) + "<" + format_name<T> + ">";
}

// ---- 16 bytes of x ----

using Words = Pack<uint32_t, 4>;

template <typename T>
constexpr int per_load = 16 / sizeof(T);

template <typename T>
DEVICE float element(const Words& words, int i) {
  if constexpr (sizeof(T) == 4)
    return bits_float(words.item[i]);
  else
    return to_float(T{static_cast<uint16_t>(words.item[i / 2] >> i % 2 * 16)});
}

// From element `at` on; those from `count` on, which may be negative, are zero.
template <typename T, bool vectors>
DEVICE Words load_words(const QuantizeParams<T>& p, int64_t at, int count) {
  Words words = {};
  if constexpr (vectors) {
    if (count > 0) words = load_global<Words>(p.x, at);
  } else {
#pragma unroll
    for (int i = 0; i < per_load<T>; ++i) {
      if (i >= count) continue;
      if constexpr (sizeof(T) == 4)
        words.item[i] = load_global<uint32_t>(p.x, at + i);
      else
        words.item[i / 2] |= uint32_t(load_global<uint16_t>(p.x, at + i)) << i % 2 * 16;
    }
  }
  return words;
}

// ---- amax ----

// Magnitudes compare as integers, and NaN is then the largest. Of 16-bit formats there are two in a word.
template <typename T>
DEVICE uint32_t max_magnitude(uint32_t x, uint32_t y) {
  if constexpr (sizeof(T) == 4)
    return x > y ? x : y;
  else
    return max_u16x2(x, y);
}

template <typename T>
DEVICE uint32_t max_magnitude(uint32_t magnitude, const Words& words) {
  constexpr uint32_t no_sign = sizeof(T) == 4 ? 0x7fffffff : 0x7fff7fff;
#pragma unroll
  for (int i = 0; i < 4; ++i) magnitude = max_magnitude<T>(magnitude, words.item[i] & no_sign);
  return magnitude;
}

// Of `lanes` neighbouring lanes; all of them get it.
template <typename T, int lanes>
DEVICE uint32_t max_of_lanes(uint32_t magnitude) {
#pragma unroll
  for (int mask = lanes / 2; mask > 0; mask /= 2) magnitude = max_magnitude<T>(magnitude, shfl_xor(magnitude, mask));
  return magnitude;
}

// ---- scales ----

// Of a block with this amax; NaN if that is none.
template <typename T>
DEVICE float scale_of(uint32_t magnitude, bool power_of_two) {
  float amax;
  if constexpr (sizeof(T) == 4) {
    amax = bits_float(magnitude);
  } else {
    uint32_t low = magnitude & 0xffff, high = magnitude >> 16;
    amax = to_float(T{static_cast<uint16_t>(low > high ? low : high)});
  }
  if (float_bits(amax) >= 0x7f800000) return bits_float(0x7fc00000);
  float scale = div(amax > 1e-4f ? amax : 1e-4f, 448);
  return power_of_two ? bits_float((float_bits(scale) + 0x7fffff) & 0x7f800000) : scale;
}

template <typename T>
DEVICE void store_scale(const QuantizeParams<T>& p, int64_t at, float scale) {
  if (p.exponents.size)
    store_global(p.exponents, at, static_cast<uint8_t>(scale != scale ? 255 : float_bits(scale) >> 23));
  else
    store_global(p.scales, at, scale);
}

// ---- values ----

// x / y, given 1 / y. One step from the product towards the quotient: of all significands of y, and all x whose
// quotient is near a point where e4m3 rounds, none gets another code than by the correctly rounded division. Zero keeps
// its sign.
DEVICE float quotient(float x, float y, float reciprocal) {
  float estimate = x * reciprocal;
  return fma(fma(estimate, y, -x), -reciprocal, estimate);
}

// e4m3, two in each item.
template <typename T>
using Codes = Pack<uint16_t, per_load<T> / 2>;

template <typename T>
DEVICE Codes<T> codes_of(const Words& words, float scale, float reciprocal) {
  Codes<T> codes;
#pragma unroll
  for (int i = 0; i < per_load<T>; i += 2)
    codes.item[i / 2] = cvt_e4m3x2(quotient(element<T>(words, i), scale, reciprocal),
                                   quotient(element<T>(words, i + 1), scale, reciprocal));
  return codes;
}

template <typename T, bool vectors>
DEVICE void store_codes(const QuantizeParams<T>& p, int64_t at, int count, const Codes<T>& codes) {
  if constexpr (vectors) {
    if (count > 0) store_global(p.values, at, codes);
  } else {
#pragma unroll
    for (int i = 0; i < per_load<T>; ++i)
      if (i < count) store_global(p.values, at + i, static_cast<uint8_t>(codes.item[i / 2] >> i % 2 * 8));
  }
}

template <typename T, bool vectors>
DEVICE void store_values(const QuantizeParams<T>& p, int64_t at, int count, const Words& words, float scale,
                         float reciprocal) {
  store_codes<T, vectors>(p, at, count, codes_of<T>(words, scale, reciprocal));
}

// ---- kernels ----

struct QuantizeTile {
  int batch, row, k_block;
};

// tile_m: rows of a tile, tile_k: of its blocks along k. Neighbouring tiles lie along k.
template <int tile_m, int tile_k, typename Params>
DEVICE QuantizeTile quantize_tile(const Params& p) {
  int i = block_index(), rows = i / p.k_tiles;
  return {rows / p.m_tiles, rows % p.m_tiles * tile_m, i % p.k_tiles * tile_k};
}

// 1 x 128. A few lanes read a block with two loads each, those of a warp neighbouring blocks of a row, and a thread has
// part in four rows. The block of threads then writes the scales, 32 rows at once.
template <typename T>
struct QuantizeRows {
  static constexpr int tile_m = 32, tile_k = 4, rows = 4;
  static constexpr int lanes = block_k / (2 * per_load<T>);
  static constexpr int threads = tile_m * tile_k * lanes / rows;
  static constexpr int resident = 1024 / threads;
  static constexpr int stride = tile_m / rows;  // between the rows of a thread
  static_assert(lanes >= rows && tile_m * tile_k <= threads);
  static std::string name() { return quantize_name<T>("QuantizeRows"); }

  using Params = QuantizeParams<T>;

  struct Smem {
    Shared<float> scales[tile_k][tile_m + 1];  // one more spreads the banks
  };

  DEVICE static void run(const Params& p, Smem& s) {
    if (p.vectors)
      run<true>(p, s);
    else
      run<false>(p, s);
  }

  template <bool vectors>
  DEVICE static void run(const Params& p, Smem& s) {
    [[maybe_unused]] constexpr int unrolled = vectors ? 8 : 1;
    QuantizeTile tile = quantize_tile<tile_m, tile_k>(p);
    int lane = thread_index() % lanes, group = thread_index() / lanes;
    int block = group % tile_k, first_row = group / tile_k;
    int column = (tile.k_block + block) * block_k + lane * per_load<T>;
    int64_t at = (int64_t(tile.batch) * p.m + tile.row + first_row) * p.k + column;
    int64_t step = int64_t(stride) * p.k;
    auto count = [&](int j, int half) {
      return tile.row + first_row + j * stride < p.m ? p.k - column - half * (block_k / 2) : 0;
    };

    auto load_row = [&](int j, int half) {
      return load_words<T, vectors>(p, at + j * step + half * (block_k / 2), count(j, half));
    };

    Words words[rows][2];
    if constexpr (vectors) {
#pragma unroll
      for (int j = 0; j < rows; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) words[j][half] = load_row(j, half);
    }

    // A lane computes the scale of one row.
    uint32_t mine = 0;
#pragma unroll(unrolled)
    for (int j = 0; j < rows; ++j) {
      uint32_t magnitude = 0;
#pragma unroll(unrolled)
      for (int half = 0; half < 2; ++half)
        magnitude = max_magnitude<T>(magnitude, vectors ? words[j][half] : load_row(j, half));
      magnitude = max_of_lanes<T, lanes>(magnitude);
      if (lane % rows == j) mine = magnitude;
    }
    float scale = scale_of<T>(mine, p.power_of_two), reciprocal = rcp(scale);
    if (lane < rows) store(s.scales[block][first_row + lane * stride], scale);

#pragma unroll(unrolled)
    for (int j = 0; j < rows; ++j) {
      int source = lane_index() - lane + j;
      float row_scale = shfl(scale, source), row_reciprocal = shfl(reciprocal, source);
#pragma unroll(unrolled)
      for (int half = 0; half < 2; ++half)
        store_values<T, vectors>(p, at + j * step + half * (block_k / 2), count(j, half),
                                 vectors ? words[j][half] : load_row(j, half), row_scale, row_reciprocal);
    }

    bar_sync(0, threads);
    int i = thread_index() % tile_m, k = thread_index() / tile_m;
    int64_t k_blocks = ceil_div(p.k, block_k);
    if (k < tile_k && tile.k_block + k < k_blocks && tile.row + i < p.m)
      store_scale(p, (tile.batch * k_blocks + tile.k_block + k) * p.m + tile.row + i, load(s.scales[k][i]));
  }
};

// 128 x 128: a block of threads each.
template <typename T>
struct QuantizeBlocks {
  static constexpr int loads = 8;
  static constexpr int lanes = block_k / per_load<T>;  // that read a row
  static constexpr int stride = 128 / loads;           // between the rows of a thread
  static constexpr int threads = lanes * stride;
  static constexpr int resident = 1024 / threads;
  static constexpr int warps = threads / warp_size;
  static std::string name() { return quantize_name<T>("QuantizeBlocks"); }

  using Params = QuantizeParams<T>;

  struct Smem {
    Shared<uint32_t> magnitudes[warps];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    if (p.vectors)
      run<true>(p, s);
    else
      run<false>(p, s);
  }

  template <bool vectors>
  DEVICE static void run(const Params& p, Smem& s) {
    [[maybe_unused]] constexpr int unrolled = vectors ? 8 : 1;
    QuantizeTile tile = quantize_tile<128, 1>(p);
    int first_row = tile.row + thread_index() / lanes;
    int column = tile.k_block * block_k + thread_index() % lanes * per_load<T>;
    int64_t at = (int64_t(tile.batch) * p.m + first_row) * p.k + column;
    int64_t step = int64_t(stride) * p.k;
    auto count = [&](int j) { return first_row + j * stride < p.m ? p.k - column : 0; };

    auto load_row = [&](int j) { return load_words<T, vectors>(p, at + j * step, count(j)); };

    Words words[loads];
    if constexpr (vectors) {
#pragma unroll
      for (int j = 0; j < loads; ++j) words[j] = load_row(j);
    }

    uint32_t magnitude = 0;
#pragma unroll(unrolled)
    for (int j = 0; j < loads; ++j) magnitude = max_magnitude<T>(magnitude, vectors ? words[j] : load_row(j));
    magnitude = max_of_lanes<T, warp_size>(magnitude);
    if (lane_index() == 0) store(s.magnitudes[thread_index() / warp_size], magnitude);
    bar_sync(0, threads);
#pragma unroll
    for (int i = 0; i < warps; i += 4) {
      Pack<uint32_t, 4> four = load_pack<4>(s.magnitudes[i]);
      magnitude = max_magnitude<T>(magnitude, four);
    }

    float scale = scale_of<T>(magnitude, p.power_of_two), reciprocal = rcp(scale);
    if (thread_index() == 0) store_scale(p, block_index(), scale);
#pragma unroll(unrolled)
    for (int j = 0; j < loads; ++j)
      store_values<T, vectors>(p, at + j * step, count(j), vectors ? words[j] : load_row(j), scale, reciprocal);
  }
};

}  // namespace jaxkern::cuda::kernels
