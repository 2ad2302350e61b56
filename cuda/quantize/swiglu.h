// silu(gate) * up * weight, quantised in blocks of 1 x 128: what lies between the two products of an expert. A warp
// takes a block of 128 columns, four rows of it, of which it has every load in flight before the first amax.
#pragma once

#include "cuda/quantize/kernel.h"

namespace jaxkern::cuda::kernels {

template <typename T>
struct SwigluParams {
  Global<const T> gate, up;         // rows of k elements, `stride` apart
  Global<const float> weights;      // of the rows; empty: ones
  Global<const int32_t> num_rows;   // that count of each batch; empty: all
  QuantizeParams<float> quantized;  // where it goes: x is empty, batch and m are one, the rows
  int batch_rows;                   // m of the scales, which lie [batch, k blocks, m]
  int64_t stride;
};

// x / (1 + exp(-x)). The exponent is one number and its rest: x log2(e) alone would lose bits for large x.
DEVICE float silu(float x) {
  constexpr float log2e = 1.44269504f, log2e_rest = 1.92596299e-8f, ln2 = 0.693147182f;
  float exponent = -x * log2e, rest = fma(-x, log2e, -exponent) - x * log2e_rest;
  float power = ex2(exponent);
  if (exponent < 126) power = fma(power, rest * ln2, power);  // beyond, the power may be infinite
  return div(x, 1 + power);
}

template <typename T>
struct QuantizeSwiglu {
  static constexpr int threads = 256, rows = 4, tile_m = threads / warp_size * rows;
  static_assert(tile_m == warp_size);  // a lane tells whether a row counts
  static std::string name() { return quantize_name<T>("QuantizeSwiglu"); }

  using Params = SwigluParams<T>;

  struct Smem {
    Shared<float> scales[tile_m];
  };

  DEVICE static bool counts(const Params& p, int row) {
    if (row >= p.quantized.m) return false;
    return !p.num_rows.size || row % p.batch_rows < load_global<int32_t>(p.num_rows, row / p.batch_rows);
  }

  DEVICE static void run(const Params& p, Smem& s) {
    if (p.quantized.vectors)
      run<true>(p, s);
    else
      run<false>(p, s);
  }

  template <bool vectors>
  DEVICE static void run(const Params& p, Smem& s) {
    const QuantizeParams<float>& q = p.quantized;
    int k_block = block_index() % q.k_tiles, first = block_index() / q.k_tiles * tile_m;
    int warp = thread_index() / warp_size, column = k_block * block_k + lane_index() * 4;
    uint32_t counting = ballot(counts(p, first + lane_index()));
    if (!counting) return;
    auto count_of = [&](int row) { return counting >> (row - first) & 1 ? q.k - column : 0; };
    Four<T> gate[rows], up[rows];
    float weight[rows];
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      int row = first + warp * rows + j, count = count_of(row);
      gate[j] = load_four<vectors>(p.gate, row * p.stride + column, count);
      up[j] = load_four<vectors>(p.up, row * p.stride + column, count);
      weight[j] = p.weights.size && count > 0 ? load_global<float>(p.weights, row) : 1;
    }
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      int row = first + warp * rows + j, count = count_of(row);
      Pack<float, 4> x = to_floats(gate[j]), y = to_floats(up[j]);
      Words products;
#pragma unroll
      for (int i = 0; i < 4; ++i) products.item[i] = float_bits(silu(x.item[i]) * y.item[i] * weight[j]);
      uint32_t magnitude = max_of_lanes<float, warp_size>(max_magnitude<float>(0u, products));
      float scale = scale_of<float>(magnitude, q.power_of_two);
      if (lane_index() == 0) store(s.scales[warp * rows + j], scale);
      store_values<float, vectors>(q, int64_t(row) * q.k + column, count, products, scale, rcp(scale));
    }
    bar_sync(0, threads);
    int row = first + thread_index();
    if (thread_index() < tile_m && counting >> thread_index() & 1) {
      int64_t batch = row / p.batch_rows, in_batch = row % p.batch_rows;
      store_scale(q, (batch * q.k_tiles + k_block) * p.batch_rows + in_batch, load(s.scales[thread_index()]));
    }
  }
};

}  // namespace jaxkern::cuda::kernels
