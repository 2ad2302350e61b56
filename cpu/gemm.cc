#include "cpu/gemm.h"

#include <cstddef>

#include "cpu/gemm_amx.h"
#include "cpu/gemm_pack.h"
#include "cpu/simd.h"

// How a product runs. Every op is a list of products out = a b^T, cut into segments of at most kMaxRows rows of a. A
// chunk of segments runs in two phases: first all of its a is packed as float32, then tasks of some rows of b each
// make their columns of the result.
//
// A segment of few rows (kDotRows) is memory bound: b is read once, in order, and each register of it is multiplied
// with all rows of a (`dot`). Any other segment runs with the operands swapped, as out^T = b a^T: the rows of a lie
// along the lanes, so that a is what must be transposed, once, while b, of which there is more, is only converted, and
// each element of it is broadcast (`outer`).
//
// On Level::amx, products of bfloat16 and FP8 run on the matrix unit (`amx`), swapped in the same way.
//
// The order in which k is summed depends on k and on the number of rows alone, so results do not depend on the number
// of threads.

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kMaxRows = 512;              // of a in a segment; a multiple of kPanel
constexpr int64_t kMaxPackedFloats = 1 << 21;  // of a in a chunk, unless one panel needs more
constexpr int kMaxSegments = 128;              // in a chunk
constexpr int64_t kInlineWork = 1 << 16;       // multiply-adds that are not worth waking a thread
constexpr int64_t kInlinePacking = 1 << 14;    // the same for elements to pack
constexpr int64_t kPackK = 4 * kBlockK;        // of k in a packing task

#if defined(JAXKERN_LEVEL_avx512)
constexpr int kAccumulators = 28;  // registers of sums in the outer loop, of 32
constexpr int64_t kDotRows = 8;
constexpr int kDotAccumulators = 24;
constexpr int64_t kTaskRows = 112;  // the most rows of b in a task: a multiple of kLanes and of kWideRows
constexpr int64_t kTailRows = 28;   // of b in the last tasks
#else
constexpr int kAccumulators = 12;  // of 16
constexpr int64_t kDotRows = 4;
constexpr int kDotAccumulators = 12;
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTailRows = 24;
#endif
constexpr int kWideRows = kAccumulators / kPanelVectors;               // of b against a full panel of a
constexpr int kNarrowRows = kAccumulators >= 24 ? 24 : kAccumulators;  // of b against a panel of one register

Form form_of(const Segment& s) {
#ifdef JAXKERN_LEVEL_avx512
  if (simd_level() == Level::amx && s.m >= kAmxMinRows && can_amx(s.a) && can_amx(s.b)) return Form::amx;
#endif
  return s.m <= kDotRows && !s.b.transposed ? Form::dot : Form::outer;
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
  if (s.form == Form::amx) {
    s.task_rows = kAmxBlockRows * max(1, min(4, s.n / (kAmxBlockRows * 8 * threads)));
    s.tail_rows = kAmxBlockRows;
  }
#endif
  s.full_tasks = max(0, s.n - threads * s.task_rows) / s.task_rows;
  if (s.b.transposed) {  // which is packed by whole registers
    s.full_tasks = s.n / s.task_rows;
    s.tail_rows = s.task_rows;
  }
}

int64_t tasks_of(const Segment& s) { return s.full_tasks + ceil_div(s.n - s.full_tasks * s.task_rows, s.tail_rows); }

// A dot product reads float32 rows of a where they are.
bool is_in_place(const Segment& s) { return s.form == Form::dot && s.a.type == DType::f32 && !s.a.transposed; }
int64_t panels_of(const Segment& s) {
  return s.form == Form::amx ? ceil_div(s.m, kLanes) : s.form == Form::outer ? ceil_div(s.m, kPanel) : 1;
}
int64_t packings_of(const Segment& s) { return is_in_place(s) ? 0 : panels_of(s) * ceil_div(s.k, kPackK); }
int64_t packed_floats(const Segment& s) {
  if (is_in_place(s)) return 0;
#ifdef JAXKERN_LEVEL_avx512
  if (s.form == Form::amx) return panels_of(s) * amx_panel_floats(s);
#endif
  return (s.form == Form::dot ? s.m : padded_rows(s)) * s.packed_stride;
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

// The same for any number of rows.
template <int kRows, int kVectors>
void multiply(const float* p, const float* q, int64_t kc, bool first, float* c, int64_t rows) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_block<kRows, kVectors>(p, q, kc, first, c);
    p += kRows * kRowStride;
    c += kRows * kVectors * kLanes;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply<kRows / 2, kVectors>(p, q, kc, first, c, rows);
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
      float* to = c + panel * kPanel * kTaskRows;
      if (width == kPanel)
        multiply<kWideRows, kPanelVectors>(p, q, kc, k0 == 0, to, rows);
      else
        multiply<kNarrowRows, 1>(p, q, kc, k0 == 0, to, rows);
    }
    k0 += kBlockK;
  } while (k0 < s.k);
  finish_transposed(s, begin, rows, c, kPanel, kTaskRows);
}

#ifdef JAXKERN_LEVEL_avx512
template <typename B>
void amx(const Segment& s, int64_t begin, int64_t rows, float* packed) {
  size_t block = padded_rows(s) * kAmxRows;
  size_t bytes = kAmxBlockRows / kAmxRows * block * sizeof(float);
  float* c = static_cast<float*>(scratch(bytes, 1));
  if (s.k == 0) std::memset(c, 0, bytes);
  Tiles tiles;
  for (int64_t row = 0; row < rows; row += kAmxBlockRows) {
    int64_t here = min(kAmxBlockRows, rows - row);
    amx_outer<B>(s, begin + row, here, packed, c);
    for (int64_t r = 0; r < here; r += kAmxRows)
      finish_transposed(s, begin + row + r, min(kAmxRows, here - r), c + r / kAmxRows * block, kTile, kAmxRows);
  }
}
#endif

// ---- few rows: dot products ----

// The rows of b that one pass takes against kRows rows of a.
template <typename B, int kRows>
constexpr int kDotColumns = min(std::is_same_v<B, e4m3> ? 4 : 8, kDotAccumulators / kRows);

// sums [kRows][kTaskRows] at column 0 to count - 1: the rows of a times the rows of b from `row` on.
template <typename B, int kRows>
void dot_block(const float* a, int64_t a_stride, const Operand& b, int64_t row, int64_t count, int64_t k, float* sums) {
  constexpr bool kScaled = std::is_same_v<B, e4m3>;
  constexpr bool kScaleSums = kScaled && kRows == 1;  // with more rows, scaling b is less work
  constexpr int kColumns = kDotColumns<B, kRows>;
  const B* x[kColumns];
  int64_t rows[kColumns];
  f32v total[kRows][kColumns], scales[kColumns], part[kColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
    rows[c] = row + min(c, count - 1);  // past the end the last row again; its sums are not kept
    x[c] = static_cast<const B*>(b.data) + rows[c] * b.stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) total[r][c] = f32v{};
  }
  auto step = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    f32v y[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      y[c] = load_fast_lanes(x[c] + i, lanes);
      if constexpr (kScaled && !kScaleSums) y[c] *= scales[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      f32v z = load_lanes(a + r * a_stride + i, lanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) (kScaleSums ? part[c] : total[r][c]) += z * y[c];
    }
  };
  for (int64_t block = 0; block < k; block += kScaleBlock) {
    int64_t end = min(k, block + kScaleBlock), i = block;
    if constexpr (kScaled) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        scales[c] = splat(fast_scale(b, rows[c], block, end - block));
        part[c] = f32v{};
      }
    }
    for (; i + kLanes <= end; i += kLanes) step(i, kLanes);
    if (i < end) step(i, end - i);
    if constexpr (kScaleSums) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) total[0][c] += part[c] * scales[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c)
      if (c < count) sums[r * kTaskRows + c] = sum(total[r][c]);
}

template <typename B, int kRows = kDotRows>
void dot(const Segment& s, int64_t begin, int64_t rows, const float* a, int64_t a_stride) {
  if constexpr (kRows > 1)
    if (s.m < kRows) return dot<B, kRows - 1>(s, begin, rows, a, a_stride);
  constexpr int kColumns = kDotColumns<B, kRows>;
  float sums[kRows * kTaskRows];
  for (int64_t c = 0; c < rows; c += kColumns)
    dot_block<B, kRows>(a, a_stride, s.b, begin + c, min(kColumns, rows - c), s.k, sums + c);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < rows; c += kLanes) {
      int64_t lanes = min(kLanes, rows - c);
      f32v x = load_lanes(sums + r * kTaskRows + c, lanes);
      s.out_type == DType::f32 ? finish<float>(s, r, begin + c, lanes, x) : finish<bf16>(s, r, begin + c, lanes, x);
    }
}

// ---- chunks of segments ----

// The dot's a: rows [m][packed_stride].
template <typename A>
void pack_dot_rows(const Segment& s, int64_t k0, int64_t k1, float* to) {
  for (int64_t r = 0; r < s.m; ++r)
    for (int64_t i = k0; i < k1; i += kLanes) {
      f32v x;
      if (!s.a.transposed) {
        x = dequantized<A>(s.a, r, i, k1 - i);
      } else {
        for (int j = 0; j < kLanes; ++j) {
          if constexpr (!std::is_same_v<A, e4m3>)
            x[j] = i + j < k1 ? to_f32(static_cast<const A*>(s.a.data)[(i + j) * s.a.stride + r]) : 0.0f;
        }
      }
      store(to + r * s.packed_stride + i, x);
    }
}

void pack(const Segment& s, int64_t index, float* packed) {
  int64_t panel = index % panels_of(s), begin = index / panels_of(s) * kPackK, end = min(s.k, begin + kPackK);
  with_type(s.a.type, [&](auto type) {
    using A = decltype(type);
    if (s.form == Form::dot) return pack_dot_rows<A>(s, begin, end, packed + s.packed);
#ifdef JAXKERN_LEVEL_avx512
    if constexpr (!std::is_same_v<A, float>)
      if (s.form == Form::amx) return amx_pack_panel<A>(s, panel, begin, end, packed + s.packed);
#endif
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
    if constexpr (!std::is_same_v<B, float>)
      if (s.form == Form::amx) return amx<B>(s, begin, rows, packed + s.packed);
#endif
    if (s.form == Form::outer) return outer<B>(s, begin, rows, packed + s.packed);
    if (is_in_place(s)) return dot<B>(s, begin, rows, static_cast<const float*>(s.a.data), s.a.stride);
    return dot<B>(s, begin, rows, packed + s.packed, s.packed_stride);
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
    s.packed_stride = ceil_div(s.k, kLanes) * kLanes;
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
void for_each_group(const int32_t* sizes, int64_t groups, int64_t alignment, int64_t rows, F f) {
  int64_t begin = 0;
  for (int64_t group = 0; group < groups; ++group) {
    int64_t end = begin + min(max(sizes[group], 0), rows - begin);
    int64_t next = min(ceil_div(end, alignment) * alignment, rows);
    f(group, begin, end, next);
    begin = next;
  }
  f(groups, begin, begin, rows);
}

}  // namespace

void gemm(const GemmParams& p, const Threads& threads) {
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
  Chunk chunk(threads);
  int64_t row_bytes = p.n * size_of(p.out_type);
  for_each_group(
      p.group_sizes, p.groups, p.alignment, p.m, [&](int64_t group, int64_t begin, int64_t end, int64_t next) {
        char* out = static_cast<char*>(p.out);
        if (next > end) std::memset(out + end * row_bytes, 0, (next - end) * row_bytes);
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
  Chunk chunk(threads);
  for_each_group(p.group_sizes, p.groups, p.alignment, p.t, [&](int64_t group, int64_t begin, int64_t end, int64_t) {
    if (group == p.groups) return;
    Segment s = {};
    s.a = from(p.a, begin, 0);
    s.b = from(p.b, begin, 0);
    s.accumulator = p.accumulator ? p.accumulator + group * p.m * p.n : nullptr;
    s.out = p.out + group * p.m * p.n;
    s.out_type = DType::f32;
    s.m = p.m, s.n = p.n, s.k = end - begin;
    chunk.add(s);
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
