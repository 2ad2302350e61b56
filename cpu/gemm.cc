#include "cpu/gemm.h"

#include <cstddef>

#include "cpu/fp8.h"
#include "cpu/gemm_pack.h"
#include "cpu/gemm_pairs.h"
#include "cpu/simd.h"

// How a product runs. Every op is a list of products out = a b^T, cut into segments of at most kMaxRows rows of a. A
// chunk of segments runs in two phases: first all of its a is packed, then tasks of some rows of b each make their
// columns of the result.
//
// A segment of few rows (kDotRows) is bound by memory or by the conversion of b: b is read once, a span of k at a time
// of kDotColumns rows, and converted in registers, each of which is multiplied with kDotBlock rows of a (`dot`). FP8
// comes out of the conversion in another order than it went in, in which a is packed. Any other segment runs with the
// operands swapped, as out^T = b a^T: the rows of a lie along the lanes, so that a is what must be transposed, once,
// while b, of which there is more, is only converted, and each element of it is broadcast (`outer`).
//
// On Level::bf16 and Level::amx, products of bfloat16 and FP8 run on pairs of bfloat16: of more than a few rows swapped
// in the same way (`pairs`), of fewer as dot products.
//
// A dot product sums, in each lane of some registers, every so many-th product of 128 of k, adds these registers up,
// scales them, adds that to those of the blocks before, and at last adds the lanes up in pairs. The outer form sums
// each element of the result over 256 of k in order, from what the blocks before came to. The order depends on k and on
// the number of rows alone, so results do not depend on the number of threads; the swapped forms' on k alone, so where
// they must not depend on the number of rows either (is_batch_invariant), every segment has one of them.

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kMaxRows = 512;              // of a in a segment; a multiple of kPanel
constexpr int64_t kMaxPackedFloats = 1 << 21;  // of a in a chunk, unless one panel needs more
constexpr int kMaxSegments = 128;              // in a chunk
constexpr int64_t kInlineWork = 1 << 16;       // multiply-adds that are not worth waking a thread
constexpr int64_t kInlinePacking = 1 << 14;    // the same for elements to pack
constexpr int64_t kPackK = 4 * kBlockK;        // of k in a packing task
constexpr int64_t kDotColumns = 16;            // rows of b at a time: a is read once for all
constexpr int64_t kDotSpanBytes = 16384;       // of a's rows, at least one scale block: they stay in the first cache

#if defined(JAXKERN_LEVEL_avx512)
constexpr int kAccumulators = 28;   // registers of sums in the outer loop, of 32
constexpr int64_t kDotRows = 16;    // the most rows of a that are dot products
constexpr int kDotBlock = 16;       // rows of a that a dot product takes together
constexpr int64_t kTaskRows = 112;  // the most rows of b in a task: a multiple of kLanes and of kWideRows
constexpr int64_t kTailRows = 28;   // of b in the last tasks
#else
constexpr int kAccumulators = 12;  // of 16
constexpr int64_t kDotRows = 12;
constexpr int kDotBlock = 8;
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTailRows = 24;
#endif
constexpr int kWideRows = kAccumulators / kPanelVectors;               // of b against a full panel of a
constexpr int kNarrowRows = kAccumulators >= 24 ? 24 : kAccumulators;  // of b against a panel of one register

#ifdef JAXKERN_LEVEL_avx512
// Whether a dot multiplies pairs of bfloat16.
bool is_paired(const Segment& s) { return simd_level() >= Level::bf16 && is_paired(s.a) && is_paired(s.b); }
#endif

Form form_of(const Segment& s) {
#ifdef JAXKERN_LEVEL_avx512
  int64_t least = is_batch_invariant() ? 1 : simd_level() == Level::amx ? kAmxMinRows : kPairsMinRows;
  if (is_paired(s) && s.m >= least) return Form::pairs;
#endif
  return s.m <= kDotRows && !s.b.transposed && !is_batch_invariant() ? Form::dot : Form::outer;
}

// Panels are full but for the last, which has one register if that is enough.
int64_t padded_rows(const Segment& s) { return ceil_div(s.m, kLanes) * kLanes; }
int64_t panel_width(const Segment& s, int64_t panel) { return min(kPanel, padded_rows(s) - panel * kPanel); }

// Cuts b into tasks: full ones, and smaller ones at the end so that all threads finish together.
void plan_tasks(Segment& s, int64_t threads) {
  bool wide = s.form == Form::outer && s.m > kLanes;
  s.task_rows = wide ? kTaskRows : 96;
  s.tail_rows = wide ? kTailRows : 24;
#ifdef JAXKERN_LEVEL_avx512
  // Longer tasks can fetch ahead.
  if (s.form == Form::pairs) {
    s.task_rows = kPairsBlockRows * max(1, min(4, s.n / (kPairsBlockRows * 8 * threads)));
    s.tail_rows = kPairsBlockRows;
  }
#endif
  s.full_tasks = max(0, s.n - threads * s.task_rows) / s.task_rows;
  if (s.b.transposed) {  // which is packed by whole registers
    s.full_tasks = s.n / s.task_rows;
    s.tail_rows = s.task_rows;
  }
}

int64_t tasks_of(const Segment& s) { return s.full_tasks + ceil_div(s.n - s.full_tasks * s.task_rows, s.tail_rows); }

int64_t panels_of(const Segment& s) {
  return s.form == Form::pairs ? ceil_div(s.m, kLanes) : s.form == Form::outer ? ceil_div(s.m, kPanel) : 1;
}
int64_t packings_of(const Segment& s) { return panels_of(s) * ceil_div(s.k, kPackK); }
// Of a dot's a, whose scales lie behind its values.
int64_t dot_values_floats(const Segment& s) { return s.m * ceil_div(s.k, kScaleBlock) * kScaleBlock; }
int64_t packed_floats(const Segment& s) {
#ifdef JAXKERN_LEVEL_avx512
  if (s.form == Form::pairs) return panels_of(s) * pairs_panel_floats(s);
#endif
  return s.form == Form::dot ? dot_values_floats(s) + s.m * ceil_div(s.k, kScaleBlock) : padded_rows(s) * s.k;
}

// ---- many rows: out^T = b a^T ----

// c [kRows][kVectors registers] += p [kRows][kRowStride], of which kc columns, times q [kc][kVectors registers].
template <int kRows, int kVectors>
void multiply_block(const float* p, const float* q, int64_t kc, bool first, float* c) {
  f32v sums[kRows][kVectors];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = first ? f32v{} : load(c + (r * kVectors + v) * kLanes);
  for (int64_t i = 0; i < kc; ++i) {
    f32v x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(q + (i * kVectors + v) * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      f32v y = splat(p[r * kRowStride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += y * x[v];
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + (r * kVectors + v) * kLanes, sums[r][v]);
}

// The same for any number of rows. Fetches the panel `next` on the way: a does not fit the second cache, and the
// hardware fetches too little of it ahead.
template <int kRows, int kVectors>
void multiply(const float* p, const float* q, int64_t kc, bool first, float* c, int64_t rows, const float* next) {
  constexpr int64_t kLine = 64 / sizeof(float);
  int64_t lines = ceil_div(kc * kVectors * kLanes, max(1, rows / kRows) * kLine);
  for (; rows >= kRows; rows -= kRows) {
    for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(next + line * kLine);
    next += lines * kLine;
    multiply_block<kRows, kVectors>(p, q, kc, first, c);
    p += kRows * kRowStride;
    c += kRows * kVectors * kLanes;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply<kRows / 2, kVectors>(p, q, kc, first, c, rows, next);
  }
}

// Writes x, a register of row `row` of the result from column `column` on.
template <typename Out>
JAXKERN_INLINE void finish(const Segment& s, int64_t row, int64_t column, int64_t lanes, f32v x) {
  int64_t at = row * s.n + column;
  if (s.accumulator) x += load_lanes(static_cast<const Out*>(s.accumulator) + at, lanes);
  store_lanes(static_cast<Out*>(s.out) + at, x, lanes);
}

// The columns [begin, begin + rows) of the result from c, panels [panel_rows][width] of the transposed result. Panels
// are `panel` wide but for the last, which may be narrower.
template <typename Out>
void finish_columns(const Segment& s, int64_t begin, int64_t rows, const float* c, int64_t panel, int64_t panel_rows) {
  for (int64_t row = 0; row < s.m; row += kLanes) {
    int64_t first = row / panel * panel, width = min(panel, padded_rows(s) - first), count = min(kLanes, s.m - row);
    const float* from = c + first * panel_rows + row - first;
    // The rows of the result are far apart, so nothing but this fetches the next ones.
    const Out* next = static_cast<const Out*>(s.out) + (row + kLanes) * s.n + begin;
    for (int64_t r = 0; r < min(kLanes, s.m - row - kLanes); ++r)
      for (int64_t column = 0; column < rows; column += 64 / int64_t(sizeof(Out)))
        __builtin_prefetch(next + r * s.n + column, 1);
    for (int64_t column = 0; column < rows; column += kLanes) {
      int64_t lanes = min(kLanes, rows - column);
      f32v square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) square[j] = j < lanes ? load(from + (column + j) * width) : f32v{};
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        if (j < count) finish<Out>(s, row + j, begin + column, lanes, square[j]);
    }
  }
}

void finish_transposed(const Segment& s, int64_t begin, int64_t rows, const float* c, int64_t panel,
                       int64_t panel_rows) {
  s.out_type == DType::f32 ? finish_columns<float>(s, begin, rows, c, panel, panel_rows)
                           : finish_columns<bf16>(s, begin, rows, c, panel, panel_rows);
}

template <typename B>
void outer(const Segment& s, int64_t begin, int64_t rows, const float* packed) {
  float* p = static_cast<float*>(scratch(kTaskRows * kRowStride * sizeof(float), 0));
  float* c = static_cast<float*>(scratch(padded_rows(s) * kTaskRows * sizeof(float), 1));
  int64_t k0 = 0;
  do {
    int64_t kc = min(kBlockK, s.k - k0);
    pack_rows<B>(s.b, begin, rows, k0, kc, p);
    for (int64_t panel = 0; panel < panels_of(s); ++panel) {
      int64_t width = panel_width(s, panel);
      const float* q = packed + panel * kPanel * s.k + k0 * width;
      const float* next = panel + 1 < panels_of(s) ? q + kPanel * s.k : packed + (k0 + kBlockK) * kPanel;
      float* to = c + panel * kPanel * kTaskRows;
      if (width == kPanel)
        multiply<kWideRows, kPanelVectors>(p, q, kc, k0 == 0, to, rows, next);
      else
        multiply<kNarrowRows, 1>(p, q, kc, k0 == 0, to, rows, next);
    }
    k0 += kBlockK;
  } while (k0 < s.k);
  finish_transposed(s, begin, rows, c, kPanel, kTaskRows);
}

#ifdef JAXKERN_LEVEL_avx512
template <typename B, bool kAmx>
void pairs(const Segment& s, int64_t begin, int64_t rows, float* packed) {
  size_t block = padded_rows(s) * kPairsRows;
  size_t bytes = kPairsBlockRows / kPairsRows * block * sizeof(float);
  float* c = static_cast<float*>(scratch(bytes, 1));
  if (s.k == 0) std::memset(c, 0, bytes);
  for (int64_t row = 0; row < rows; row += kPairsBlockRows) {
    int64_t here = min(kPairsBlockRows, rows - row);
    pairs_outer<B, kAmx>(s, begin + row, here, packed, c);
    for (int64_t r = 0; r < here; r += kPairsRows)
      finish_transposed(s, begin + row + r, min(kPairsRows, here - r), c + r / kPairsRows * block, kTile, kPairsRows);
  }
}

template <typename B>
void pairs(const Segment& s, int64_t begin, int64_t rows, float* packed) {
  if (simd_level() == Level::bf16) return pairs<B, false>(s, begin, rows, packed);
  Tiles tiles;
  pairs<B, true>(s, begin, rows, packed);
}
#endif

// ---- few rows: dot products ----

// total [kRows] += a [blocks of k][m][kScaleBlock], with a_scales [blocks of k][m], times one row of b, k [k0, k1) of
// it. `codes`: see load_quad.
template <typename B, int kRows>
void dot_rows(const float* a, int64_t m, const float* a_scales, const Operand& b, int64_t k0, int64_t k1, f32v* total,
              Codes& codes) {
  constexpr int kChains = kRows <= 2 ? 4 : kRows <= 5 ? 2 : 1;  // of sums that do not wait for each other
  for (int64_t k = k0; k < k1; k += kScaleBlock, a += m * kScaleBlock, a_scales += m) {
    const B* x = static_cast<const B*>(b.data) + k;
    f32v part[kRows][kChains] = {};
    auto step = [&](const B* x, int64_t i) __attribute__((always_inline)) {
      f32v y[kQuad];
      load_quad(x, y, codes);
#pragma GCC unroll 4
      for (int v = 0; v < kQuad; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) part[r][v % kChains] += load(a + r * kScaleBlock + i + v * kLanes) * y[v];
    };
    if (k1 - k >= kScaleBlock) {
      prefetch_block(x);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kScaleBlock; i += kQuadLanes) step(x + i, i);
    } else {
      for (int64_t i = 0; i < k1 - k; i += kQuadLanes) {
        B quad[kQuadLanes] = {};
        std::memcpy(quad, x + i, min(kQuadLanes, k1 - k - i) * sizeof(B));
        step(quad, i);
      }
    }
    f32v scale = splat(b.scales ? scale_at(b, 0, k) : 1.0f);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) part[r][0] += part[r][chain];
      total[r] += part[r][0] * scale * splat(a_scales[r]);
    }
  }
}

// The function for 1 to kDotBlock rows of a, packed as A.
template <typename A, typename B, int kRows = kDotBlock>
auto dot_rows_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return dot_rows_of<A, B, kRows - 1>(rows);
#ifdef JAXKERN_LEVEL_avx512
  if constexpr (std::is_same_v<A, bf16>)
    return &dot_pairs<B, kRows>;
  else
#endif
    return &dot_rows<B, kRows>;
}

// Columns [begin, begin + rows) of the result. a: [k / kScaleBlock][m][kScaleBlock], packed as A.
template <typename A, typename B>
void dot(const Segment& s, int64_t begin, int64_t rows, const float* packed) {
  constexpr bool kMarksNan = std::is_same_v<A, float> && std::is_same_v<B, e4m3>;
  const A* a = reinterpret_cast<const A*>(packed);
  const float* a_scales = packed + dot_values_floats(s);
  // One row of a is read no more often than b, which is then read from end to end.
  int64_t span =
      s.m == 1 ? s.k : max(kScaleBlock, kDotSpanBytes / int64_t(sizeof(A)) / s.m / kScaleBlock * kScaleBlock);
  auto whole = dot_rows_of<A, B>(kDotBlock), rest = dot_rows_of<A, B>(max(1, s.m % kDotBlock));
  [[maybe_unused]] KeepDenormals keep;
  float sums[kDotRows * kTaskRows];
  for (int64_t first = 0; first < rows; first += kDotColumns) {
    int64_t columns = min(kDotColumns, rows - first);
    f32v total[kDotColumns * kDotRows];
    for (int64_t i = 0; i < columns * s.m; ++i) total[i] = f32v{};
    Codes codes = {};
    for (int64_t k = 0; k < s.k; k += span) {
      int64_t end = min(k + span, s.k);
      for (int64_t c = 0; c < columns; ++c) {
        Operand b = from(s.b, begin + first + c, 0);
        for (int64_t r = 0; r < s.m; r += kDotBlock)
          (s.m - r >= kDotBlock ? whole : rest)(a + k * s.m + r * kScaleBlock, s.m,
                                                a_scales + k / kScaleBlock * s.m + r, b, k, end, total + c * s.m + r,
                                                codes);
      }
    }
    bool any = is_any_nan(codes);
    for (int64_t c = 0; c < columns; ++c) {
      bool nan = false;
      if constexpr (kMarksNan)
        nan = any && any_nan(static_cast<const B*>(s.b.data) + (begin + first + c) * s.b.stride, s.k);
      for (int64_t r = 0; r < s.m; ++r)
        sums[r * kTaskRows + first + c] = nan ? __builtin_nanf("") : sum(total[c * s.m + r]);
    }
  }
  for (int64_t r = 0; r < s.m; ++r)
    for (int64_t c = 0; c < rows; c += kLanes) {
      int64_t lanes = min(kLanes, rows - c);
      f32v x = load_lanes(sums + r * kTaskRows + c, lanes);
      s.out_type == DType::f32 ? finish<float>(s, r, begin + c, lanes, x) : finish<bf16>(s, r, begin + c, lanes, x);
    }
}

// ---- chunks of segments ----

constexpr int64_t kTopExponent = 254;  // of finite float32, biased

// The dot's a: [k / kScaleBlock][m][kScaleBlock], each row in the order of b's quads and with their unit; a power of
// two that keeps this in range is left to a_scales [k / kScaleBlock][m].
template <typename A>
void pack_dot_rows(const Segment& s, int64_t k0, int64_t k1, float* to, float* a_scales) {
  bool is_quad = s.b.type == DType::e4m3;
  float unit = is_quad ? quad_unit<e4m3> : 1.0f;
  int64_t top = kTopExponent + 127 - (bit_cast<uint32_t>(unit) >> 23);  // that the unit may multiply
  for (int64_t i = k0; i < k1; i += kScaleBlock)
    for (int64_t r = 0; r < s.m; ++r) {
      float row[kScaleBlock] = {};
      int64_t n = min(kScaleBlock, k1 - i);
      u32v largest = {};
      for (int64_t j = 0; j < n; j += kLanes) {
        if (!s.a.transposed) {
          store(row + j, dequantized<A>(s.a, r, i + j, n - j));
        } else if constexpr (!std::is_same_v<A, e4m3>) {
          for (int64_t l = j; l < min(j + kLanes, n); ++l)
            row[l] = to_f32(static_cast<const A*>(s.a.data)[(i + l) * s.a.stride + r]);
        }
        largest = larger(largest, load(row + j));
      }
      int64_t over = max(0, min(largest_of(largest) >> 23, kTopExponent) - top);
      float scale = bit_cast<float>(uint32_t(127 + over) << 23);
      a_scales[i / kScaleBlock * s.m + r] = scale;
      float* block = to + i * s.m + r * kScaleBlock;
      for (int64_t j = 0; j < kScaleBlock; j += kQuadLanes)
        for (int l = 0; l < kQuadLanes; ++l) block[j + l] = row[j + (is_quad ? quad_element(l) : l)] * (unit / scale);
    }
}

void pack(const Segment& s, int64_t index, float* packed) {
  int64_t panel = index % panels_of(s), begin = index / panels_of(s) * kPackK, end = min(s.k, begin + kPackK);
  with_type(s.a.type, [&](auto type) {
    using A = decltype(type);
#ifdef JAXKERN_LEVEL_avx512
    if constexpr (!std::is_same_v<A, float>) {
      if (s.form == Form::pairs) return pack_pairs_panel<A>(s, panel, begin, end, packed + s.packed);
      if (s.form == Form::dot && is_paired(s))
        return pack_dot_pairs<A>(s, begin, end, reinterpret_cast<bf16*>(packed + s.packed),
                                 packed + s.packed + dot_values_floats(s));
    }
#endif
    if (s.form == Form::dot)
      return pack_dot_rows<A>(s, begin, end, packed + s.packed, packed + s.packed + dot_values_floats(s));
    int64_t row = panel * kPanel, width = panel_width(s, panel);
    float* to = packed + s.packed + row * s.k;
    for (int64_t k0 = begin; k0 < end; k0 += kBlockK)
      pack_panel<A>(s.a, row, s.m - row, width, k0, min(kBlockK, end - k0), to + k0 * width);
  });
}

void multiply(const Segment& s, int64_t index, float* packed) {
  int64_t full = min(index, s.full_tasks), size = index < s.full_tasks ? s.task_rows : s.tail_rows;
  int64_t begin = full * s.task_rows + (index - full) * s.tail_rows, rows = min(size, s.n - begin);
  with_type(s.b.type, [&](auto type) {
    using B = decltype(type);
#ifdef JAXKERN_LEVEL_avx512
    if constexpr (!std::is_same_v<B, float>) {
      if (s.form == Form::pairs) return pairs<B>(s, begin, rows, packed + s.packed);
      if (s.form == Form::dot && is_paired(s)) return dot<bf16, B>(s, begin, rows, packed + s.packed);
    }
#endif
    if (s.form == Form::outer) return outer<B>(s, begin, rows, packed + s.packed);
    return dot<float, B>(s, begin, rows, packed + s.packed);
  });
}

class Chunk {
 public:
  explicit Chunk(const Threads& threads) : threads_(threads) {}
  ~Chunk() { run(); }

  // One product: out [m, n] = a b^T.
  void add(Segment s) {
    int64_t m = s.m;
    int64_t fitting = kMaxPackedFloats / max(s.k, 1) / kPanel * kPanel;
    int64_t step = min(kMaxRows, max(kPanel, fitting));
    if (m <= step) return append(s);
    Operand a = s.a;
    const char* accumulator = static_cast<const char*>(s.accumulator);
    char* out = static_cast<char*>(s.out);
    for (int64_t row = 0; row < m; row += step) {
      int64_t bytes = row * s.n * size_of(s.out_type);
      s.a = a.transposed ? from(a, 0, row) : from(a, row, 0);
      s.accumulator = accumulator ? accumulator + bytes : nullptr;
      s.out = out + bytes;
      s.m = min(step, m - row);
      append(s);
    }
  }

 private:
  void append(Segment s) {
    if (s.m == 0 || s.n == 0) return;
    s.form = form_of(s);
    plan_tasks(s, threads_.count());
    int64_t floats = packed_floats(s);
    if (count_ == kMaxSegments || (count_ > 0 && floats_ + floats > kMaxPackedFloats)) run();
    s.packed = floats_;
    s.first_task = tasks_;
    s.first_packing = packings_;
    segments_[count_++] = s;
    floats_ += floats;
    tasks_ += tasks_of(s);
    packings_ += packings_of(s);
    work_ += s.m * s.n * s.k;
  }

  void run() {
    float* packed = static_cast<float*>(scratch(max(floats_, 1) * sizeof(float), 2));
    each(packings_, floats_ < kInlinePacking, [&](int64_t task) {
      const Segment& s = find(task, &Segment::first_packing);
      pack(s, task - s.first_packing, packed);
    });
    each(tasks_, work_ < kInlineWork, [&](int64_t task) {
      const Segment& s = find(task, &Segment::first_task);
      multiply(s, task - s.first_task, packed);
    });
    count_ = 0;
    floats_ = tasks_ = packings_ = work_ = 0;
  }

  template <typename F>
  void each(int64_t tasks, bool is_inline, F f) {
    if (!is_inline) return threads_.for_each(tasks, f);
    for (int64_t task = 0; task < tasks; ++task) f(task);
  }

  // The last segment that begins at or before `task`; a segment without tasks begins where the next one does.
  const Segment& find(int64_t task, int64_t Segment::* first) const {
    int low = 0, high = count_;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      (segments_[middle].*first <= task ? low : high) = middle;
    }
    return segments_[low];
  }

  const Threads& threads_;
  Segment segments_[kMaxSegments];
  int count_ = 0;
  int64_t floats_ = 0, tasks_ = 0, packings_ = 0, work_ = 0;
};

// Calls f(group, begin, end, next) for each group, where rows [begin, end) are the group's and [end, next) nobody's.
template <typename F>
void for_each_group(const Groups& groups, int64_t rows, F f) {
  int64_t begin = 0;
  for (int64_t group = 0; group < groups.count; ++group) {
    int64_t room = groups.stride ? min(groups.stride, rows - begin) : rows - begin;
    int64_t end = begin + min(max(groups.sizes[group], 0), room);
    int64_t next = groups.stride ? begin + room : min(ceil_div(end, groups.alignment) * groups.alignment, rows);
    f(group, begin, end, next);
    begin = next;
  }
  f(groups.count, begin, begin, rows);
}

}  // namespace

void gemm(const GemmParams& p, const Threads& threads) {
  prefer_large_pages(p.out, p.batch * p.m * p.n * size_of(p.out_type));
  Chunk chunk(threads);
  auto advance = [](Operand o, int64_t elements, int64_t scales) {
    o.data = static_cast<const char*>(o.data) + elements * size_of(o.type);
    if (o.scales) o.scales = static_cast<const char*>(o.scales) + scales * size_of(o.scale_type);
    return o;
  };
  for (int64_t i = 0; i < p.batch; ++i) {
    int64_t bytes = i * p.m * p.n * size_of(p.out_type);
    Segment s = {};
    s.a = advance(p.a, i * p.a_batch_stride, i * p.a_scale_batch_stride);
    s.b = advance(p.b, i * p.b_batch_stride, i * p.b_scale_batch_stride);
    s.accumulator = p.accumulator ? static_cast<const char*>(p.accumulator) + bytes : nullptr;
    s.out = static_cast<char*>(p.out) + bytes;
    s.out_type = p.out_type;
    s.m = p.m, s.n = p.n, s.k = p.k;
    chunk.add(s);
  }
}

void grouped_gemm(const GroupedGemmParams& p, const Threads& threads) {
  prefer_large_pages(p.out, p.m * p.n * size_of(p.out_type));
  Chunk chunk(threads);
  int64_t row_bytes = p.n * size_of(p.out_type);
  char* out = static_cast<char*>(p.out);
  for_each_group(p.groups, p.m, [&](int64_t group, int64_t begin, int64_t end, int64_t next) {
    threads.for_each_chunk(p.zero_gaps ? next - end : 0, row_bytes, [&](int64_t first, int64_t last) {
      std::memset(out + (end + first) * row_bytes, 0, (last - first) * row_bytes);
    });
    if (end == begin) return;
    Segment s = {};
    s.a = from(p.a, begin, 0);
    s.b = p.b;
    s.b.data = static_cast<const char*>(p.b.data) + group * p.b_group_stride * size_of(p.b.type);
    if (p.b.scales)
      s.b.scales = static_cast<const char*>(p.b.scales) + group * p.b_scale_group_stride * size_of(p.b.scale_type);
    s.out = out + begin * row_bytes;
    s.out_type = p.out_type;
    s.m = end - begin, s.n = p.n, s.k = p.k;
    chunk.add(s);
  });
}

void k_grouped_gemm(const KGroupedGemmParams& p, const Threads& threads) {
  prefer_large_pages(p.out, p.groups.count * p.m * p.n * sizeof(float));
  Chunk chunk(threads);
  for_each_group(p.groups, p.t, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
    if (group == p.groups.count) return;
    auto of_group = [&](const Operand& o) { return o.transposed ? from(o, begin, 0) : from(o, 0, begin); };
    Segment s = {};
    s.a = of_group(p.a);
    s.b = of_group(p.b);
    s.accumulator = p.accumulator ? p.accumulator + group * p.m * p.n : nullptr;
    s.out = p.out + group * p.m * p.n;
    s.out_type = DType::f32;
    s.m = p.m, s.n = p.n, s.k = end - begin;
    chunk.add(s);
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
