// Which kernel computes a product, and its launch.
#include "cuda/gemm/gemm.h"

#include <algorithm>

#include "cuda/gemm/dense.h"
#include "cuda/gemm/small.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

// ---- the choice ----

// The kernels that exist. A plan is one of them.
enum class Plan { small_16, small_32, small_64, dense_128_64, dense_128_128, dense_128_192, dense_256_128 };

// Up to 64 rows: the kernel that reads b once and does little else; up to 128, if b has so few rows that tiles of it
// alone would leave multiprocessors idle. More: the tile with the least time by this model, the larger one of equals.
//
// A wave of tiles, one on each multiprocessor, takes what its products take at the tensor cores' rate (8192 e4m3
// operations a cycle), or what its operands take from L2 (about 46 bytes a cycle and multiprocessor), whichever is
// more.
Plan choose(const Gemm& g, int multiprocessors) {
  if (g.m <= 16) return Plan::small_16;
  if (g.m <= 32) return Plan::small_32;
  if (g.m <= 64) return Plan::small_64;
  if (g.m <= 128 && g.batch * ceil_div(g.n, 64) * 2 <= multiprocessors)
    return Plan::small_64;  // along k, to use them all
  constexpr struct {
    Plan plan;
    int m, n;
  } tiles[] = {{Plan::dense_256_128, 256, 128},
               {Plan::dense_128_192, 128, 192},
               {Plan::dense_128_128, 128, 128},
               {Plan::dense_128_64, 128, 64}};
  Plan best = Plan::dense_128_128;
  double least = 0;
  for (const auto& t : tiles) {
    if (t.m * t.n > 128 * 128 && (g.b_block == 1 || g.out_is_float32)) continue;  // these need too many registers
    int64_t count = g.batch * ceil_div(g.m, t.m) * ceil_div(g.n, t.n), waves = ceil_div(count, multiprocessors);
    double products = t.m * t.n * 128.0 / 4096, loads = (t.m + t.n) * 128 / 46.0;
    double time = waves * std::max(products, loads);
    if (least == 0 || time < least) {
      least = time;
      best = t.plan;
    }
  }
  return best;
}

// ---- launches ----

// [batch, rows, columns] in boxes of [1, box_rows, swizzle_row bytes].
Error matrix_map(TensorMap& map, const void* data, Element element, int element_bytes, int64_t batch, int64_t rows,
                 int64_t columns, int box_rows) {
  return tensor_map<3>(map, data, element, {columns, rows, batch},
                       {columns * element_bytes, rows * columns * element_bytes},
                       {swizzle_row / element_bytes, box_rows, 1}, Swizzle::bytes_128);
}

// Scales of rows, [k blocks of all matrices, rows], in boxes of one k block.
Error scales_map(TensorMap& map, Global<const float> scales, int64_t rows, int box_rows) {
  return tensor_map<2>(map, scales.data, Element::float32, {rows, scales.size / rows}, {rows * 4}, {box_rows, 1},
                       Swizzle::none);
}

template <typename Params>
void fill_common(Params& p, const Gemm& g) {
  p.m = g.m;
  p.n = g.n;
  p.k_blocks = ceil_div(g.k, 128);
  p.batch = g.batch;
  p.b_batch = g.b_batch;
  p.a_scales = {g.a_scales, g.batch * p.k_blocks * g.m};
  p.b_scales = {g.b_scales, g.b_batch * p.k_blocks * (g.b_block == 1 ? g.n : ceil_div(g.n, 128))};
}

template <int tile_m, int tile_n, int cluster, bool b_rows, typename Out>
Error launch_dense(const Gemm& g, Stream stream) {
  using Kernel = Dense<tile_m, tile_n, cluster, b_rows, Out>;
  DenseParams<Out> p = {};
  fill_common(p, g);
  p.accumulator = {static_cast<const Out*>(g.accumulator), g.accumulator ? g.batch * g.m * g.n : 0};
  p.m_tiles = round_up(ceil_div(g.m, tile_m), cluster);
  p.n_tiles = ceil_div(g.n, tile_n);
  p.scales_by_copy_engine = g.m % 4 == 0;  // their rows start at multiples of 16 bytes; those of b always do
  int blocks = multiprocessors() / cluster * cluster;
  // As many rows of tiles as make what runs at one time about square.
  p.band = 1;
  while (p.band * 2 <= p.m_tiles && p.band * 2 * tile_m <= blocks / p.band * tile_n) p.band *= 2;
  p.band = round_up(p.band, cluster);
  constexpr Element element = sizeof(Out) == 4 ? Element::float32 : Element::bfloat16;
  Error error = first_error({matrix_map(p.a, g.a, Element::uint8, 1, g.batch, g.m, g.k, tile_m),
                             matrix_map(p.b, g.b, Element::uint8, 1, g.b_batch, g.n, g.k, tile_n / cluster),
                             matrix_map(p.out, g.out, element, sizeof(Out), g.batch, g.m, g.n, 64)});
  if (error.empty() && p.scales_by_copy_engine) error = scales_map(p.a_scales_map, p.a_scales, g.m, tile_m);
  if (error.empty() && p.scales_by_copy_engine && b_rows) error = scales_map(p.b_scales_map, p.b_scales, g.n, tile_n);
  if (!error.empty()) return error;
  return launch<Kernel>(std::min<int64_t>(blocks, g.batch * p.m_tiles * p.n_tiles), cluster, p, stream);
}

template <int tile_m, bool b_rows, typename Out>
Error launch_small(const Gemm& g, Stream stream) {
  using Kernel = Small<tile_m, b_rows, Out>;
  SmallParams<Out> p = {};
  fill_common(p, g);
  p.accumulator = {static_cast<const Out*>(g.accumulator), g.accumulator ? g.batch * g.m * g.n : 0};
  p.out = {static_cast<Out*>(g.out), g.batch * g.m * g.n};
  p.n_tiles = ceil_div(g.n, Kernel::tile_n);
  int64_t tiles = g.batch * ceil_div(g.m, tile_m) * p.n_tiles;
  // Along k while multiprocessors would have no tile, or for long k not a second one; but four stages for each part.
  p.parts = 1;
  while (p.parts < 8 && p.k_blocks >= p.parts * 8 && tiles * p.parts * 2 <= multiprocessors() * (p.parts == 1 ? 2 : 1))
    p.parts *= 2;
  int64_t blocks = p.parts > 1 ? tiles * p.parts : std::min<int64_t>(tiles, multiprocessors() * 2);
  Error error = first_error({matrix_map(p.a, g.a, Element::uint8, 1, g.batch, g.m, g.k, tile_m),
                             matrix_map(p.b, g.b, Element::uint8, 1, g.b_batch, g.n, g.k, Kernel::tile_n)});
  if (!error.empty()) return error;
  return launch<Kernel>(blocks, p.parts, p, stream);
}

// ---- every kernel ----

template <bool b_rows, typename Out>
Error launch_plan(Plan plan, const Gemm& g, Stream stream) {
  switch (plan) {
    case Plan::small_16:
      return launch_small<16, b_rows, Out>(g, stream);
    case Plan::small_32:
      return launch_small<32, b_rows, Out>(g, stream);
    case Plan::small_64:
      return launch_small<64, b_rows, Out>(g, stream);
    case Plan::dense_128_64:
      return launch_dense<128, 64, 1, b_rows, Out>(g, stream);
    case Plan::dense_128_192:
      if constexpr (!b_rows && sizeof(Out) == 2) return launch_dense<128, 192, 2, b_rows, Out>(g, stream);
      [[fallthrough]];
    case Plan::dense_256_128:
      if constexpr (!b_rows && sizeof(Out) == 2) return launch_dense<256, 128, 2, b_rows, Out>(g, stream);
      [[fallthrough]];
    default:
      return launch_dense<128, 128, 1, b_rows, Out>(g, stream);
  }
}

template <bool b_rows, typename Out>
Error prepare_plans() {
  Error error = first_error({prepare<Small<16, b_rows, Out>>(), prepare<Small<32, b_rows, Out>>(),
                             prepare<Small<64, b_rows, Out>>(), prepare<Dense<128, 64, 1, b_rows, Out>>(),
                             prepare<Dense<128, 128, 1, b_rows, Out>>()});
  if constexpr (!b_rows && sizeof(Out) == 2)
    error =
        first_error({error, prepare<Dense<128, 192, 2, b_rows, Out>>(), prepare<Dense<256, 128, 2, b_rows, Out>>()});
  return error;
}

}  // namespace

Error gemm(const Gemm& g, Stream stream) {
  int64_t out_bytes = g.batch * g.m * g.n * (g.out_is_float32 ? 4 : 2);
  if (out_bytes == 0) return {};
  if (g.k == 0) return g.accumulator ? copy(g.out, g.accumulator, out_bytes, stream) : zero(g.out, out_bytes, stream);
  Plan plan = choose(g, multiprocessors());
  bool b_rows = g.b_block == 1;
  if (g.out_is_float32)
    return b_rows ? launch_plan<true, float>(plan, g, stream) : launch_plan<false, float>(plan, g, stream);
  return b_rows ? launch_plan<true, bfloat16>(plan, g, stream) : launch_plan<false, bfloat16>(plan, g, stream);
}

Error prepare_gemm() {
  return once_per_device([] {
    return first_error({prepare_plans<false, bfloat16>(), prepare_plans<true, bfloat16>(),
                        prepare_plans<false, float>(), prepare_plans<true, float>()});
  });
}

}  // namespace jaxkern::cuda
