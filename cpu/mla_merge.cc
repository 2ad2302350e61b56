#include "cpu/mla.h"
#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_inff();

template <typename T>
void merge_row(const MergeAttentionParams& p, int64_t row) {
  const T* outs = static_cast<const T*>(p.outs) + row * p.width;
  T* out = static_cast<T*>(p.out) + row * p.width;
  const float* lses = p.lses + row;
  float* weights = static_cast<float*>(scratch(p.parts * sizeof(float)));
  f32v most = splat(-kInfinity), sum = {};
  for (int64_t i = 0; i < p.parts; ++i) most = max(most, splat(lses[i * p.rows]));
  f32v base = select(most == -kInfinity, f32v{}, most);
  for (int64_t i = 0; i < p.parts; ++i) {
    f32v weight = exp2((splat(lses[i * p.rows]) - base) * kLog2E);
    weights[i] = weight[0];
    sum += weight;
  }
  for (int64_t column = 0; column < p.width; column += kLanes) {
    int64_t lanes = p.width - column;
    f32v x = {};
    for (int64_t i = 0; i < p.parts; ++i)  // what a part without keys holds may be anything
      if (lses[i * p.rows] != -kInfinity) x += load_lanes(outs + i * p.rows * p.width + column, lanes) * weights[i];
    store_lanes(out + column, select(sum == 0.0f, f32v{}, x / sum), lanes);
  }
  p.lse[row] = base[0] + __builtin_logf(sum[0]);
}

template <typename T>
void merge_rows(const MergeAttentionParams& p, const Threads& threads) {
  threads.for_each_chunk(p.rows, p.parts * p.width * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) merge_row<T>(p, row);
  });
}

}  // namespace

void merge_attention(const MergeAttentionParams& p, const Threads& threads) {
  if (p.type == DType::f32) merge_rows<float>(p, threads);
  if (p.type == DType::bf16) merge_rows<bf16>(p, threads);
  if (p.type == DType::f16) merge_rows<f16>(p, threads);
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
