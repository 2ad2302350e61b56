// Which kernel computes a product, and its launch.
#include "cuda/gemm/gemm.h"

#include <algorithm>
#include <climits>

#include "cuda/gemm/dense.h"
#include "cuda/gemm/gaps.h"
#include "cuda/gemm/narrow.h"
#include "cuda/gemm/small.h"

namespace jaxkern::cuda {
namespace {

using namespace jaxkern::cuda::kernels;

// ---- the choice ----

// The kernels that exist. A plan is one of them.
enum class Plan { narrow_16, narrow_32, narrow_64, dense_128_64, dense_128_128, dense_128_192, dense_256_128 };

// The cycles of so many tiles of `stages` stages of k. A wave of tiles, one on each multiprocessor, takes what its
// products take at the tensor cores' rate (8192 e4m3 operations a cycle, half as many of bfloat16), or what its
// operands take from L2 (about 46 bytes a cycle and multiprocessor), whichever is more, and then what storing takes:
// little for bfloat16; float32 is as much as memory takes, and 256 rows wait for the first 128.
double cycles_of(int64_t tiles, int tile_m, int tile_n, int64_t stages, bool out_is_float32, int multiprocessors) {
  double products = tile_m * tile_n * 128.0 / 4096, loads = (tile_m + tile_n) * 128 / 46.0;
  double store = tile_m * tile_n / (!out_is_float32 ? 32.0 : tile_m > 128 ? 4.0 : 5.0);
  return ceil_div(tiles, multiprocessors) * (stages * std::max(products, loads) + store);
}

// The tile with the least time by this model, the first of equals. For few rows also those that spread b over all
// multiprocessors; no others up to 64.
Plan choose(const Gemm& g, int multiprocessors) {
  constexpr struct {
    Plan plan;
    int m, n;
    int first, last;  // rows of a that it is for
  } tiles[] = {{Plan::narrow_64, 64, 64, 1, 128},
               {Plan::narrow_32, 64, 32, 1, 128},
               {Plan::narrow_16, 64, 16, 1, 128},
               {Plan::dense_256_128, 256, 128, 129, INT_MAX},
               {Plan::dense_128_192, 128, 192, 129, INT_MAX},
               {Plan::dense_128_128, 128, 128, 65, INT_MAX},
               {Plan::dense_128_64, 128, 64, 65, INT_MAX}};
  Plan best = Plan::dense_128_128;
  double least = 0;
  for (const auto& t : tiles) {
    if (g.m < t.first || g.m > t.last) continue;
    double time = cycles_of(g.batch * ceil_div(g.m, t.m) * ceil_div(g.n, t.n), t.m, t.n, ceil_div(g.k, block_k),
                            g.out_is_float32, multiprocessors);
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

// An operand, [batch, rows, k] or, not k_major, [batch, k, rows], in boxes of the k of one stage.
template <typename Format>
Error operand_map(TensorMap& map, const void* data, int64_t batch, int64_t rows, int64_t k, int box_rows) {
  constexpr int element_bytes = block_k / Format::stage_k;
  if (!Format::k_major)
    return matrix_map(map, data, Element::uint8, 1, batch, k, rows * element_bytes, Format::stage_k);
  return matrix_map(map, data, Element::uint8, 1, batch, rows, k * element_bytes, box_rows);
}

// Scales of rows, [k blocks of all matrices, rows], in boxes of one k block.
Error scales_map(TensorMap& map, Global<const float> scales, int64_t rows, int box_rows) {
  return tensor_map<2>(map, scales.data, Element::float32, {rows, scales.size / rows}, {rows * 4}, {box_rows, 1},
                       Swizzle::none);
}

// As many rows of tiles as make what runs at one time about square.
int band_of(int64_t m_tiles, int tile_m, int tile_n, int blocks, int above) {
  int band = 1;
  while (band * 2 <= m_tiles && band * 2 * tile_m <= blocks / band * tile_n) band *= 2;
  return round_up(band, above);
}

template <typename Format, typename Params, typename Out>
void fill_common(Params& p, const Gemm& g, int64_t out_batch, Out*) {
  p.m = g.m;
  p.n = g.n;
  p.k_blocks = ceil_div(g.k, Format::stage_k);
  if (Format::scaled) {
    p.a_scales = {g.a_scales, g.batch * p.k_blocks * g.m};
    p.b_scales = {g.b_scales, g.b_batch * p.k_blocks * (g.b_block == 1 ? g.n : ceil_div(g.n, 128))};
  }
  p.accumulator = {static_cast<const Out*>(g.accumulator), g.accumulator ? out_batch * g.m * g.n : 0};
}

// With the schedule given, of `tiles` tiles if the host knows how many.
template <typename Schedule, int tile_m, int tile_n, int cluster, typename Format, typename Out>
Error launch_dense(const Gemm& g, int64_t out_batch, const typename Schedule::Params& schedule, bool aligned_rows,
                   int64_t tiles, Stream stream) {
  using Kernel = Dense<Schedule, tile_m, tile_n, cluster, Format, Out>;
  DenseParams<Schedule, Out> p = {};
  fill_common<Format>(p, g, out_batch, static_cast<Out*>(nullptr));
  p.schedule = schedule;
  p.out_rows = {static_cast<Out*>(g.out), out_batch * g.m * g.n};
  // The rows of both scales start at multiples of 16 bytes, and the tiles in them; n is a multiple of 16.
  p.scales_by_copy_engine = Format::scaled && g.m % 4 == 0 && aligned_rows;
  int blocks = multiprocessors() / cluster * cluster;
  constexpr Element element = sizeof(Out) == 4 ? Element::float32 : Element::bfloat16;
  Error error = first_error({operand_map<Format>(p.a, g.a, g.batch, g.m, g.k, Kernel::a_part),
                             operand_map<Format>(p.b, g.b, g.b_batch, g.n, g.k, Kernel::b_part),
                             matrix_map(p.out, g.out, element, sizeof(Out), out_batch, g.m, g.n, 64)});
  if (error.empty() && p.scales_by_copy_engine) error = scales_map(p.a_scales_map, p.a_scales, g.m, tile_m);
  if (error.empty() && p.scales_by_copy_engine && Format::b_rows)
    error = scales_map(p.b_scales_map, p.b_scales, g.n, tile_n);
  if (!error.empty()) return error;
  return launch<Kernel>(std::min<int64_t>(blocks, tiles), cluster, p, stream);
}

// What the kernels for few rows have in common.
template <typename Format, typename Schedule, typename Out>
Error fill_few(FewParams<Schedule, Out>& p, const Gemm& g, int box_rows, int tile_n) {
  fill_common<Format>(p, g, g.batch, p.out.data);
  p.out = {static_cast<Out*>(g.out), g.batch * g.m * g.n};
  return first_error({operand_map<Format>(p.a, g.a, g.batch, g.m, g.k, box_rows),
                      operand_map<Format>(p.b, g.b, g.b_batch, g.n, g.k, tile_n)});
}

// ---- batches ----

template <typename Format>
Batches::Params batches(const Gemm& g, int m_tiles, int n_tiles, int band) {
  return {.batch = static_cast<int>(g.batch),
          .b_batch = static_cast<int>(g.b_batch),
          .m = static_cast<int>(g.m),
          .k_blocks = static_cast<int>(ceil_div(g.k, Format::stage_k)),
          .m_tiles = m_tiles,
          .n_tiles = n_tiles,
          .band = band};
}

template <int tile_m, int tile_n, int cluster, typename Format, typename Out>
Error launch_dense(const Gemm& g, Stream stream) {
  using Kernel = Dense<Batches, tile_m, tile_n, cluster, Format, Out>;
  int m_tiles = round_up(ceil_div(g.m, tile_m), Kernel::above),
      n_tiles = round_up(ceil_div(g.n, tile_n), Kernel::across);
  int band = band_of(m_tiles, tile_m, tile_n, multiprocessors() / cluster * cluster, Kernel::above);
  return launch_dense<Batches, tile_m, tile_n, cluster, Format, Out>(
      g, g.batch, batches<Format>(g, m_tiles, n_tiles, band), true, g.batch * m_tiles * n_tiles, stream);
}

template <int tile_n, typename Format, typename Out>
Error launch_narrow(const Gemm& g, Stream stream) {
  using Kernel = Narrow<tile_n, Format, Out>;
  int m_tiles = ceil_div(g.m, Kernel::tile_m), n_tiles = ceil_div(g.n, tile_n);
  FewParams<Batches, Out> p = {.schedule = batches<Format>(g, m_tiles, n_tiles, m_tiles)};
  Error error = fill_few<Format>(p, g, Kernel::box_rows(g.m), tile_n);
  if (!error.empty()) return error;
  return launch<Kernel>(std::min<int64_t>(multiprocessors(), g.batch * m_tiles * n_tiles), 1, p, stream);
}

// ---- every kernel ----

template <typename Format, typename Out>
Error launch_plan(Plan plan, const Gemm& g, Stream stream) {
  switch (plan) {
    case Plan::narrow_16:
      return launch_narrow<16, Format, Out>(g, stream);
    case Plan::narrow_32:
      return launch_narrow<32, Format, Out>(g, stream);
    case Plan::narrow_64:
      return launch_narrow<64, Format, Out>(g, stream);
    case Plan::dense_128_64:
      return launch_dense<128, 64, 1, Format, Out>(g, stream);
    case Plan::dense_128_192:
      return launch_dense<128, 192, 2, Format, Out>(g, stream);
    case Plan::dense_256_128:
      return launch_dense<256, 128, 2, Format, Out>(g, stream);
    default:
      return launch_dense<128, 128, 1, Format, Out>(g, stream);
  }
}

template <typename Format, typename Out>
Error prepare_plans() {
  return first_error(
      {prepare<Narrow<16, Format, Out>>(), prepare<Narrow<32, Format, Out>>(), prepare<Narrow<64, Format, Out>>(),
       prepare<Dense<Batches, 128, 64, 1, Format, Out>>(), prepare<Dense<Batches, 128, 128, 1, Format, Out>>(),
       prepare<Dense<Batches, 128, 192, 2, Format, Out>>(), prepare<Dense<Batches, 256, 128, 2, Format, Out>>()});
}

// ---- groups ----

GroupList group_list(const int32_t* sizes, int64_t groups, int64_t alignment, int64_t stride, int64_t all) {
  return {.sizes = {sizes, groups},
          .count = static_cast<int>(groups),
          .alignment = static_cast<int>(alignment),
          .stride = static_cast<int>(stride),
          .all = static_cast<int>(all)};
}

// The rows of a group up to which it is Small's, and from which it is worth the large tile, which needs less of L2 for
// its products and wastes more at the group's end. Only the device knows them, so every kernel looks at every group.
constexpr int small_rows = 64, large_rows = 384;

template <int tile_m, int tile_n, int cluster, typename Format, typename Out>
Error launch_dense_groups(const GroupedGemm& g, const Gemm& product, RowGroups::Params schedule, Stream stream) {
  using Kernel = Dense<RowGroups, tile_m, tile_n, cluster, Format, Out>;
  static_assert(Kernel::above == 1);  // a group's last tile has none below it
  schedule.n_tiles = round_up(ceil_div(g.n, tile_n), Kernel::across);
  schedule.band = band_of(ceil_div(schedule.most, tile_m), tile_m, tile_n, multiprocessors(), 1);
  // At most this many: every tile but a group's last is full, and that one has more than small_rows rows.
  int64_t tiles = ceil_div(g.m, small_rows + 1) * schedule.n_tiles;
  bool aligned_rows = (g.stride ? g.stride : g.alignment) % 4 == 0;
  return launch_dense<RowGroups, tile_m, tile_n, cluster, Format, Out>(product, 1, schedule, aligned_rows, tiles,
                                                                       stream);
}

template <typename Format, typename Out>
Error launch_small(const Gemm& g, RowGroups::Params schedule, Stream stream) {
  using Kernel = Small<Format, Out>;
  schedule.n_tiles = ceil_div(g.n, Kernel::tile_n);
  FewParams<RowGroups, Out> p = {.schedule = schedule};
  Error error = fill_few<Format>(p, g, Kernel::box_rows, Kernel::tile_n);
  if (!error.empty()) return error;
  int64_t tiles = std::min(g.b_batch, g.m) * schedule.n_tiles;
  return launch<Kernel>(std::min<int64_t>(tiles, multiprocessors() * Kernel::resident), 1, p, stream);
}

template <typename Format, typename Out>
Error launch_row_groups(const GroupedGemm& g, Stream stream) {
  GroupList groups = group_list(g.group_sizes, g.groups, g.alignment, g.stride, g.m);
  Gemm product = {.a = g.a,
                  .a_scales = g.a_scales,
                  .b = g.b,
                  .b_scales = g.b_scales,
                  .accumulator = nullptr,
                  .out = g.out,
                  .out_is_float32 = g.out_is_float32,
                  .b_block = g.b_block,
                  .batch = 1,
                  .b_batch = g.groups,
                  .m = g.m,
                  .n = g.n,
                  .k = g.k};
  RowGroups::Params schedule = {.groups = groups,
                                .least = 1,
                                .most = small_rows,
                                .k_blocks = static_cast<int>(ceil_div(g.k, Format::stage_k)),
                                .n_tiles = 0,  // each kernel's own
                                .band = 1};
  if (g.zero_gaps) {
    int64_t row_words = g.n * sizeof(Out) / 4;
    Gaps::Params gaps = {groups, {static_cast<uint32_t*>(g.out), g.m * row_words}, static_cast<int>(row_words)};
    int64_t blocks = std::min<int64_t>(multiprocessors(), ceil_div(g.m, Gaps::threads / warp_size));
    if (Error error = launch<Gaps>(blocks, 1, gaps, stream); !error.empty()) return error;
  }
  if (Error error = launch_small<Format, Out>(product, schedule, stream); !error.empty()) return error;
  // A launch that finds no group takes 2 us: none for large groups where the rows that all share make them unlikely,
  // and one for both where they are large on average.
  int64_t most = g.stride ? g.stride : g.m, large = large_rows;
  if (!g.stride && g.m < 256 * g.groups) large = most + 1;
  if (!g.stride && g.m >= 512 * g.groups) large = small_rows + 1;
  schedule.least = small_rows + 1;
  schedule.most = std::min(most, large - 1);
  if (schedule.least <= schedule.most) {
    Error error = launch_dense_groups<128, 128, 1, Format, Out>(g, product, schedule, stream);
    if (!error.empty()) return error;
  }
  if (most < large) return {};
  schedule.least = large;
  schedule.most = most;
  return launch_dense_groups<256, 128, 2, Format, Out>(g, product, schedule, stream);
}

constexpr int k_tile_n = 128;

template <int tile_m, int cluster, typename Format>
Error launch_k_groups(const KGroupedGemm& g, Stream stream) {
  Gemm product = {.a = g.a,
                  .a_scales = g.a_scales,
                  .b = g.b,
                  .b_scales = g.b_scales,
                  .accumulator = g.accumulator,
                  .out = g.out,
                  .out_is_float32 = true,
                  .b_block = Format::scaled ? 1 : 0,
                  .batch = 1,
                  .b_batch = 1,
                  .m = g.m,
                  .n = g.n,
                  .k = g.t};
  using Kernel = Dense<KGroups, tile_m, k_tile_n, cluster, Format, float>;
  static_assert(Kernel::above == 1);
  int m_tiles = ceil_div(g.m, tile_m), n_tiles = round_up(ceil_div(g.n, k_tile_n), Kernel::across);
  KGroups::Params schedule = {.groups = group_list(g.group_sizes, g.groups, g.alignment, g.stride, g.t),
                              .m = static_cast<int>(g.m),
                              .m_tiles = m_tiles,
                              .n_tiles = n_tiles,
                              .band = band_of(m_tiles, tile_m, k_tile_n, multiprocessors() / cluster * cluster, 1),
                              .stage_k = Format::stage_k};
  return launch_dense<KGroups, tile_m, k_tile_n, cluster, Format, float>(product, g.groups, schedule, true,
                                                                         g.groups * m_tiles * n_tiles, stream);
}

// Calls f with a value of the result's type.
template <typename F>
Error with_out(bool is_float32, F f) {
  return is_float32 ? f(float{}) : f(bfloat16{});
}

}  // namespace

Error gemm(const Gemm& g, Stream stream) {
  int64_t out_bytes = g.batch * g.m * g.n * (g.out_is_float32 ? 4 : 2);
  if (out_bytes == 0) return {};
  if (g.k == 0) return g.accumulator ? copy(g.out, g.accumulator, out_bytes, stream) : zero(g.out, out_bytes, stream);
  Plan plan = choose(g, multiprocessors());
  return with_out(g.out_is_float32, [&]<typename Out>(Out) {
    return g.b_block == 1 ? launch_plan<RowScaled, Out>(plan, g, stream)
                          : launch_plan<BlockScaled, Out>(plan, g, stream);
  });
}

Error grouped_gemm(const GroupedGemm& g, Stream stream) {
  int64_t out_bytes = g.m * g.n * (g.out_is_float32 ? 4 : 2);
  if (out_bytes == 0) return {};
  if (g.k == 0 || g.groups == 0) return zero(g.out, out_bytes, stream);
  return with_out(g.out_is_float32, [&]<typename Out>(Out) {
    if (g.b_block == 0) return launch_row_groups<Unscaled, Out>(g, stream);
    return g.b_block == 1 ? launch_row_groups<RowScaled, Out>(g, stream)
                          : launch_row_groups<BlockScaled, Out>(g, stream);
  });
}

Error k_grouped_gemm(const KGroupedGemm& g, Stream stream) {
  int64_t out_bytes = g.groups * g.m * g.n * 4;
  if (out_bytes == 0) return {};
  if (g.t == 0) return g.accumulator ? copy(g.out, g.accumulator, out_bytes, stream) : zero(g.out, out_bytes, stream);
  auto cycles = [&](int tile_m, int across) {
    int64_t tiles = g.groups * ceil_div(g.m, tile_m) * round_up(ceil_div(g.n, k_tile_n), across);
    int64_t stages = ceil_div(g.t, g.groups * (g.scaled ? RowScaled::stage_k : Transposed::stage_k));
    return cycles_of(tiles, tile_m, k_tile_n, stages, true, multiprocessors());
  };
  // The large tile, which needs less of L2 for its products, unless more of it would be wasted.
  if (cycles(256, 2) <= cycles(128, 1))
    return g.scaled ? launch_k_groups<256, 2, RowScaled>(g, stream) : launch_k_groups<256, 2, Transposed>(g, stream);
  return g.scaled ? launch_k_groups<128, 1, RowScaled>(g, stream) : launch_k_groups<128, 1, Transposed>(g, stream);
}

Error prepare_gemm() {
  return once_per_device([] {
    return first_error({prepare_plans<BlockScaled, bfloat16>(), prepare_plans<RowScaled, bfloat16>(),
                        prepare_plans<BlockScaled, float>(), prepare_plans<RowScaled, float>()});
  });
}

template <typename Format, typename Out>
Error prepare_row_groups() {
  return first_error({prepare<Small<Format, Out>>(), prepare<Dense<RowGroups, 128, 128, 1, Format, Out>>(),
                      prepare<Dense<RowGroups, 256, 128, 2, Format, Out>>()});
}

Error prepare_grouped_gemm() {
  return once_per_device([] {
    return first_error({prepare<Gaps>(), prepare_row_groups<BlockScaled, bfloat16>(),
                        prepare_row_groups<RowScaled, bfloat16>(), prepare_row_groups<Unscaled, bfloat16>(),
                        prepare_row_groups<BlockScaled, float>(), prepare_row_groups<RowScaled, float>(),
                        prepare_row_groups<Unscaled, float>()});
  });
}

Error prepare_k_grouped_gemm() {
  return once_per_device([] {
    return first_error({prepare<Dense<KGroups, 128, k_tile_n, 1, RowScaled, float>>(),
                        prepare<Dense<KGroups, 256, k_tile_n, 2, RowScaled, float>>(),
                        prepare<Dense<KGroups, 128, k_tile_n, 1, Transposed, float>>(),
                        prepare<Dense<KGroups, 256, k_tile_n, 2, Transposed, float>>()});
  });
}

}  // namespace jaxkern::cuda
