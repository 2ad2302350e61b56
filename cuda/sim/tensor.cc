// The tensor cores: wgmma, done warp by warp, each warp its 16 rows.
#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/sim/machine.h"

namespace jaxkern::cuda::sim {
namespace {

constexpr int most_n = 256, most_k = 32;
constexpr double latency_cycles = 30;

// The fields of a matrix descriptor, PTX 9.7.15.5.1.2.2, and the 16-byte pieces that they lead to.
struct Matrix {
  uint32_t start;
  int leading, stride, width;  // width: of a swizzled row; 16 without a swizzle
  uint32_t mask;

  explicit Matrix(uint64_t descriptor, const Where& where) {
    auto field = [&](int shift) { return static_cast<int>(descriptor >> shift & 0x3fff) << 4; };
    constexpr int widths[] = {16, 128, 64, 32};
    start = field(0);
    leading = field(16);
    stride = field(32);
    width = widths[descriptor >> 62];
    mask = (width / 16 - 1) << 4;
    if (descriptor >> 49 & 7) fail(where, "a matrix descriptor with a base offset: its tile is not aligned");
    if (width > 16 && start / width * width % (8 * width))
      fail(where, text("a matrix at shared %#x is not aligned to the %d bytes of its swizzle", start, 8 * width));
  }
  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 3 & mask); }
  // K-major: piece c of row r.
  uint32_t piece(int r, int c) const {
    return swizzled(start + r / 8 * stride + r % 8 * width + (width > 16 ? c * 16 : c * leading));
  }
  // MN-major: eight columns of B, or rows of A, from 8 j on, of row r of k.
  uint32_t transposed_piece(int r, int j) const {
    int pieces = width / 16;
    return swizzled(start + j / pieces * leading + r / 8 * stride + r % 8 * width + j % pieces * 16);
  }
};

// The row and column of the tile of a warp that item i of a lane stands for.
int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

struct Decoder {
  float e4m3[256];
  Decoder() {
    for (int i = 0; i < 256; ++i) e4m3[i] = from_e4m3(i);
  }
};
const Decoder decoder;

void decode(Format format, const uint8_t* piece, float* values, int step) {
  if (format == Format::e4m3) {
    for (int i = 0; i < 16; ++i) values[i * step] = decoder.e4m3[piece[i]];
  } else {
    for (int i = 0; i < 8; ++i) {
      uint16_t b;
      memcpy(&b, piece + 2 * i, 2);
      values[i * step] = format == Format::float16 ? from_float16(b) : unbits<float>(uint32_t(b) << 16);
    }
  }
}

__attribute__((target_clones("avx2,fma", "default"))) void multiply(const float* a, const float* b, float* d, int n,
                                                                    int k) {
  for (int row = 0; row < 16; ++row) {
    float* out = d + row * n;
    for (int i = 0; i < k; ++i) {
      float x = a[row * k + i];
      const float* y = b + i * n;
      for (int column = 0; column < n; ++column) out[column] += x * y[column];
    }
  }
}

// x without the bits below 2^unit.
double cut(double x, int unit) { return std::ldexp(std::trunc(std::ldexp(x, -unit)), unit); }

// The sum as the tensor cores form it, as measured on an H200 (tests/sim/conformance.cu): all products and the
// accumulator are cut to 13 bits after the largest exponent among them, a product's being the sum of its factors'; so
// is their sum.
void multiply_as_hardware(const float* a, const float* b, float* d, int n, int k) {
  constexpr int fraction_bits = 13, least_exponent = -6;  // of e4m3, its subnormals included
  auto exponent = [=](float x) { return std::max(std::ilogb(x), least_exponent); };
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < n; ++column) {
      float& out = d[row * n + column];
      int largest = out != 0 && std::isfinite(out) ? std::ilogb(out) : INT_MIN / 2;
      bool finite = std::isfinite(out);
      for (int i = 0; i < k; ++i) {
        float x = a[row * k + i], y = b[i * n + column];
        finite &= std::isfinite(x) && std::isfinite(y);
        if (x != 0 && y != 0 && finite) largest = std::max(largest, exponent(x) + exponent(y));
      }
      double sum = finite ? cut(out, largest - fraction_bits) : out;
      for (int i = 0; i < k; ++i) {
        double product = double(a[row * k + i]) * b[i * n + column];
        sum += finite ? cut(product, largest - fraction_bits) : product;
      }
      out = static_cast<float>(finite && sum != 0 ? cut(sum, std::ilogb(sum) - fraction_bits) : sum);
    }
}

}  // namespace

void Machine::check_accumulators(const void* value, int bytes, const char* what, const Where& where) {
  for (int i = 0; i + 4 <= bytes; i += 4)
    if (!memcmp(static_cast<const uint8_t*>(value) + i, &poison, 4))
      fail(where, text("%s of an accumulator whose wgmma is in flight", what));
}

void wgmma_fence(Where where) {
  machine().collective("wgmma.fence", where, 0, nullptr, [](Warp& w, Collective&) { w.fenced = true; });
}

void wgmma(Format format, int n, float* d, const uint32_t* a_fragment, uint64_t a, uint64_t b, bool transposed_a,
           bool transposed_b, bool accumulate, Where where) {
  Machine& m = machine();
  struct Call {
    float* d;
    const uint32_t* a_fragment;
    uint64_t a, b;
    bool accumulate;
  } call{d, a_fragment, a, b, accumulate};
  m.collective("wgmma", where, 0, &call, [&](Warp& warp, Collective& c) {
    auto of = [&](int lane) -> Call& { return *static_cast<Call*>(c.pointers[lane]); };
    const Call& first = of(0);
    for (int i = 1; i < lanes; ++i)
      if (of(i).a != first.a || of(i).b != first.b || of(i).accumulate != first.accumulate)
        fail(where, "divergent warp: the lanes give wgmma different descriptors");
    if (!warp.fenced) fail(where, "wgmma with no wgmma.fence since its registers were last used");
    Block& block = *warp.block;
    int in_group = warp.threads[0]->index % 128 / lanes;
    Warpgroup& group = block.warpgroups[warp.threads[0]->index / 128];
    std::array<uint64_t, 3> shape{uint64_t(n) << 1 | accumulate, first.a, first.b};
    if (warp.issued < group.log.size() ? group.log[warp.issued] != shape : (group.log.push_back(shape), false))
      fail(where, "divergent warpgroup: its warps issue different wgmma");
    ++warp.issued;
    ++m.counts_.wgmmas;

    // Shared memory is read from now on, at any moment.
    int k = format == Format::e4m3 ? 32 : 16;
    auto o = std::make_shared<Operation>();
    auto& pieces = o->pieces;  // of A, if it lies there, then of B
    pieces.reserve(2 * (16 + std::max(k, n)));
    auto matrix_of = [&](uint64_t descriptor, bool transposed) {
      Matrix matrix(descriptor, where);
      if (transposed && matrix.width == 16) fail(where, "an MN-major matrix without a swizzle is not modelled");
      return matrix;
    };
    if (!first.a_fragment) {
      Matrix matrix = matrix_of(first.a, transposed_a);
      for (int r = 0; r < 16; ++r)
        for (int piece = 0; piece < 2; ++piece)
          pieces.push_back(transposed_a ? matrix.transposed_piece(r, 2 * in_group + piece)
                                        : matrix.piece(16 * in_group + r, piece));
    }
    Matrix matrix = matrix_of(first.b, transposed_b);
    if (transposed_b) {
      for (int r = 0; r < k; ++r)
        for (int j = 0; j < n / 8; ++j) pieces.push_back(matrix.transposed_piece(r, j));
    } else {
      for (int r = 0; r < n; ++r)
        for (int piece = 0; piece < 2; ++piece) pieces.push_back(matrix.piece(r, piece));
    }
    uint16_t line = m.site(where);
    for (uint32_t piece : pieces) {
      m.at(block, piece, 16, 16, "wgmma", where);
      m.check_read(block, piece, 16, *warp.threads[0], true, "wgmma", where);
      m.add_readers(block, piece, 16, 1, line);
    }

    // The accumulators go into a shadow; whoever uses the registers now finds NaNs.
    auto& accumulator = warp.accumulators[first.d];
    if (!accumulator) {
      accumulator = std::make_shared<Accumulator>();
      accumulator->n = n;
      accumulator->values.resize(16 * n);
      for (int lane = 0; lane < lanes; ++lane) {
        accumulator->registers[lane] = of(lane).d;
        for (int i = 0; i < n / 2; ++i) {
          accumulator->values[row_of(lane, i) * n + column_of(lane, i)] = of(lane).d[i];
          of(lane).d[i] = poison;
        }
      }
    } else if (accumulator->n != n) {
      fail(where, "wgmma of another shape on an accumulator in flight");
    }
    m.check_registers(*accumulator, where);
    ++accumulator->pending;

    o->mode = m.mode(true);
    o->thread = warp.threads[0];
    o->warp = &warp;
    o->where = where;
    o->what = "wgmma";
    o->accumulator = accumulator.get();
    std::vector<float> fragment;
    if (first.a_fragment) {
      Fragment kept{{}, {}, o};
      fragment.resize(16 * k);
      for (int lane = 0; lane < lanes; ++lane) {
        kept.registers[lane] = of(lane).a_fragment;
        memcpy(kept.values[lane].data(), of(lane).a_fragment, 16);
        m.check_accumulators(of(lane).a_fragment, 16, "wgmma", where);
        for (int i = 0; i < 4; ++i) {
          uint8_t piece[16] = {};
          memcpy(piece, &of(lane).a_fragment[i], 4);
          float values[16];
          decode(format, piece, values, 1);
          int per_register = k / 8;
          for (int j = 0; j < per_register; ++j)
            fragment[(lane / 4 + 8 * (i % 2)) * k + per_register * (lane % 4) + k / 2 * (i / 2) + j] = values[j];
        }
      }
      warp.fragments.push_back(std::move(kept));
    }
    bool adds = first.accumulate;
    o->steps.push_back([=, &m, &block, &pieces, fragment = std::move(fragment)] {
      float left[16 * most_k], right[most_k * most_n];
      auto piece = pieces.begin();
      auto next = [&] { return block.shared + (*piece++ - shared_base); };
      if (fragment.empty()) {
        for (int i = 0; i < 32; ++i) {
          if (transposed_a)
            decode(format, next(), left + i % 2 * 8 * k + i / 2, k);
          else
            decode(format, next(), left + i / 2 * k + i % 2 * (k / 2), 1);
        }
      } else {
        std::copy(fragment.begin(), fragment.end(), left);
      }
      for (int i = 0; piece != pieces.end(); ++i) {
        if (transposed_b) {
          int per_row = n / 8;
          decode(format, next(), right + i / per_row * n + i % per_row * 8, 1);
        } else {
          decode(format, next(), right + i % 2 * (k / 2) * n + i / 2, n);
        }
      }
      float* values = accumulator->values.data();
      if (!adds) std::fill_n(values, 16 * n, 0.0f);
      if (format == Format::e4m3 && m.settings_.hardware_sums)
        multiply_as_hardware(left, right, values, n, k);
      else
        multiply(left, right, values, n, k);
      for (uint32_t address : pieces) m.add_readers(block, address, 16, -1, line);
      --accumulator->pending;
    });
    // The model of speed: 64 rows of n columns take n / 2 cycles, a quarter of them on each of the four tensor cores.
    double& free = block.tensor_core_free[in_group];
    free = std::max(free, warp.threads[0]->time) + n / 2.0;
    warp.operations_end = free + latency_cycles;
    if (in_group == 0) group.tensor += n / 2.0;

    warp.open_group.push_back(o);
    warp.in_order.push_back(o);
    m.start(o);
  });
}

void Machine::check_registers(const Accumulator& accumulator, const Where& where) {
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < accumulator.n / 2; ++i)
      if (memcmp(&accumulator.registers[lane][i], &poison, 4))
        fail(where, text("accumulator %d of lane %d was touched while its wgmma was in flight", i, lane));
}

void wgmma_commit_group(Where where) {
  machine().collective("wgmma.commit_group", where, 0, nullptr, [](Warp& w, Collective&) {
    w.groups.push_back(std::move(w.open_group));
    w.open_group.clear();
  });
}

void wgmma_wait_group(int pending, std::initializer_list<float*> accumulators, Where where) {
  Machine& m = machine();
  Warp& warp = *m.self().warp;
  m.collective("wgmma.wait_group", where, 0, nullptr, [](Warp&, Collective&) {});
  size_t keep = pending;
  if (warp.groups.size() > keep)
    for (size_t g = 0; g < warp.groups.size() - keep; ++g)
      for (size_t i = 0; i < warp.groups[g].size(); ++i)
        while (!warp.groups[g][i]->done()) m.block_on({.kind = Wait::wgmma, .what = "wgmma.wait_group"}, where);
  m.collective("wgmma.wait_group", where, 0, const_cast<float**>(accumulators.begin()), [&](Warp& warp, Collective& c) {
    while (warp.groups.size() > keep) {
      // The reads are over as of now; whoever overwrites the operands must hear of it from here.
      for (auto& o : warp.groups.front())
        for (uint32_t piece : o->pieces) m.note_read(*warp.block, piece, 16, *warp.threads[0]);
      warp.groups.pop_front();
    }
    auto named = static_cast<float**>(c.pointers[0]);
    for (auto it = warp.accumulators.begin(); it != warp.accumulators.end();) {
      auto& [registers, accumulator] = *it;
      bool is_named = std::find(named, named + accumulators.size(), registers) != named + accumulators.size();
      if (accumulator->pending) {
        if (is_named) fail(where, "wgmma.wait_group names an accumulator that is still in flight");
        ++it;
        continue;
      }
      m.check_registers(*accumulator, where);
      bool in_a_group = false;  // complete by chance, but not waited for
      for (auto& group : warp.groups)
        for (auto& o : group) in_a_group |= o->accumulator == accumulator.get();
      for (auto& o : warp.open_group) in_a_group |= o->accumulator == accumulator.get();
      if (in_a_group) {
        if (is_named) fail(where, "wgmma.wait_group names an accumulator that is still in flight");
        ++it;
        continue;
      }
      if (!is_named) fail(where, "wgmma.wait_group does not name an accumulator that it completes");
      for (int lane = 0; lane < lanes; ++lane)
        for (int i = 0; i < accumulator->n / 2; ++i)
          accumulator->registers[lane][i] = accumulator->values[row_of(lane, i) * accumulator->n + column_of(lane, i)];
      it = warp.accumulators.erase(it);
    }
    for (Fragment& fragment : warp.fragments)
      if (fragment.operation->done())
        for (int lane = 0; lane < lanes; ++lane)
          if (memcmp(fragment.registers[lane], fragment.values[lane].data(), 16))
            fail(where, text("the operand A in registers of lane %d was touched while its wgmma was in flight", lane));
    std::erase_if(warp.fragments, [](Fragment& f) { return f.operation->done(); });
    for (Thread* t : warp.threads) t->time = std::max(t->time, warp.operations_end);
    m.join_lanes(warp);
    warp.fenced = false;
  });
}

}  // namespace jaxkern::cuda::sim
