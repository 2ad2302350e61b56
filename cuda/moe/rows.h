// Rows taken to their experts, summed on their way back, and multiplied with those of a gradient. Memory bounds all of
// it: a warp has several loads in flight, and waits for indices while others of its multiprocessor move rows.
#pragma once

#include "cuda/fours.h"
#include "cuda/moe/moe.h"
#include "cuda/quantize/kernel.h"

namespace jaxkern::cuda::kernels {

template <>
inline constexpr const char* format_name<void> = "void";

// ---- a copy of each row ----

template <int bytes>
struct UnitOf {
  using Type = Words;
};
template <>
struct UnitOf<4> {
  using Type = uint32_t;
};
template <>
struct UnitOf<2> {
  using Type = uint16_t;
};
template <>
struct UnitOf<1> {
  using Type = uint8_t;
};

// Rows in units of so many bytes; of a Number those are, if weighted, else void. A team of lanes takes four units each
// of a row, then of another one: first the beginnings of all rows, then what follows, so that a row that is taken for
// several experts is still in the L2 cache.
template <int bytes, typename Number>
struct TakeRows {
  static constexpr int threads = 256, resident = 4, each = 4;
  static std::string name() { return "TakeRows<" + std::to_string(bytes) + ", " + format_name<Number> + ">"; }

  using Unit = typename UnitOf<bytes>::Type;

  struct Params {
    Global<const Unit> x;
    Global<const int32_t> source;
    Global<const float> weights;
    Global<Unit> out;
    int64_t assignments;
    int top_k, rows, units;  // units of a row
    int lanes, parts;        // of a team, and of a row
    bool zero_gaps;
  };
  struct Smem {};

  DEVICE static void run(const Params& p, Smem&) {
    int teams = grid_size() * (threads / p.lanes);
    int row = block_index() * (threads / p.lanes) + thread_index() / p.lanes, part = 0;
    advance(p, row, part, 0);
    int source = part < p.parts ? load_global<int32_t>(p.source, row) : -1;
    while (part < p.parts) {
      bool some = source >= 0 && source < p.assignments;
      int first = part * p.lanes * each + thread_index() % p.lanes;
      int64_t from = some ? int64_t(source / p.top_k) * p.units : 0, to = int64_t(row) * p.units;
      Unit units[each] = {};
#pragma unroll
      for (int i = 0; i < each; ++i)
        if (some && first + i * p.lanes < p.units) units[i] = load_global<Unit>(p.x, from + first + i * p.lanes);
      [[maybe_unused]] float weight = 0;
      if constexpr (!std::is_void_v<Number>) weight = some ? load_global<float>(p.weights, source) : 0;
      advance(p, row, part, teams);
      source = part < p.parts ? load_global<int32_t>(p.source, row) : -1;
#pragma unroll
      for (int i = 0; i < each; ++i) {
        if constexpr (!std::is_void_v<Number>)
          if (some) units[i] = times(units[i], weight);
        if ((some || p.zero_gaps) && first + i * p.lanes < p.units)
          store_global(p.out, to + first + i * p.lanes, units[i]);
      }
    }
  }

  DEVICE static void advance(const Params& p, int& row, int& part, int by) {
    for (row += by; row >= p.rows && part < p.parts; row -= p.rows) ++part;
  }

  DEVICE static Unit times(Unit unit, float weight) {
    if constexpr (bytes == sizeof(Number)) {
      if constexpr (bytes == 4)
        return float_bits(mul(bits_float(unit), weight));
      else
        return static_cast<Unit>(cvt_bf16x2(mul(to_float(bfloat16{unit}), weight), 0));
    } else {
      Unit result;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Number) == 4)
          result.item[i] = float_bits(mul(bits_float(unit.item[i]), weight));
        else
          result.item[i] =
              cvt_bf16x2(mul(element<bfloat16>(unit, 2 * i), weight), mul(element<bfloat16>(unit, 2 * i + 1), weight));
      }
      return result;
    }
  }
};

// ---- each token quantised, for all of its rows ----

// A warp quantises a part of a token's row, four loads of a lane, and writes it wherever that goes. Then warps look at
// the rows, some at a time, for those to which nothing went.
template <typename T>
struct TakeQuantizedRows {
  static constexpr int threads = 256, resident = 4, loads = 4, rows_each = 8;
  static constexpr int lanes = block_k / per_load<T>;       // that share a scale
  static constexpr int blocks = loads * warp_size / lanes;  // of 128 columns, in a part
  static constexpr int stride = warp_size * per_load<T>;    // columns between two loads of a lane
  static std::string name() { return quantize_name<T>("TakeQuantizedRows"); }

  struct Params {
    QuantizeParams<T> quantized;  // m: rows of the result
    Global<const int32_t> source, slots;
    int64_t assignments;
    int tokens, top_k, parts;
    bool zero_gaps;
  };
  struct Smem {};

  struct Part {
    Codes<T> codes[loads];
    float scale;  // of block `lane`
  };

  DEVICE static void run(const Params& p, Smem&) {
    if (p.quantized.vectors)
      run<true>(p);
    else
      run<false>(p);
  }

  template <bool vectors>
  DEVICE static void run(const Params& p) {
    int unit = block_index() * (threads / warp_size) + warp_index(), token_parts = p.tokens * p.parts;
    if (unit < token_parts)
      send<vectors>(p, unit / p.parts, unit % p.parts);
    else
      fill<vectors>(p, (unit - token_parts) * rows_each);
  }

  // A token to the rows that say they are its.
  template <bool vectors>
  DEVICE static void send(const Params& p, int token, int part) {
    Part quantized;
    bool is_quantized = false;
    for (int first = 0; first < p.top_k; first += warp_size) {
      int choice = first + lane_index(), row = -1;
      if (choice < p.top_k) {
        int64_t assignment = int64_t(token) * p.top_k + choice;
        row = load_global<int32_t>(p.slots, assignment);
        if (row < 0 || row >= p.quantized.m || load_global<int32_t>(p.source, row) != assignment) row = -1;
      }
      for (uint32_t told = ballot(row >= 0); told; told &= told - 1) {
        if (!is_quantized) quantized = quantize<vectors>(p, token, part);
        is_quantized = true;
        write<vectors>(p, shfl(row, lowest_bit(told)), part, quantized);
      }
    }
  }

  // Rows that no token says are its: their source's by themselves, or zero if they are to be.
  template <bool vectors>
  DEVICE static void fill(const Params& p, int first) {
    int row = first + lane_index(), source = -1;
    bool there = lane_index() < rows_each && row < p.quantized.m, told = false;
    if (there) {
      source = load_global<int32_t>(p.source, row);
      if (source >= p.assignments) source = -1;
      told = source >= 0 && load_global<int32_t>(p.slots, source) == row;
    }
    for (uint32_t rest = ballot(there && !told && (source >= 0 || p.zero_gaps)); rest; rest &= rest - 1) {
      int lane = lowest_bit(rest), from = shfl(source, lane);
      for (int part = 0; part < p.parts; ++part) {
        Part quantized = {};
        if (from >= 0) quantized = quantize<vectors>(p, from / p.top_k, part);
        write<vectors>(p, first + lane, part, quantized);
      }
    }
  }

  template <bool vectors>
  DEVICE static Part quantize(const Params& p, int token, int part) {
    int column = part * blocks * block_k + lane_index() * per_load<T>;
    int64_t at = int64_t(token) * p.quantized.k + column;
    Words words[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i)
      words[i] = load_words<T, vectors>(p.quantized, at + i * stride, p.quantized.k - column - i * stride);
    Part result = {};
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      uint32_t magnitude = max_of_lanes<T, lanes>(max_magnitude<T>(0u, words[i]));
      float scale = scale_of<T>(magnitude, p.quantized.power_of_two);
      result.codes[i] = codes_of<T>(words[i], scale, rcp(scale));
      float own = shfl(scale, lane_index() * lanes % warp_size);
      if (lane_index() / (warp_size / lanes) == i) result.scale = own;
    }
    return result;
  }

  template <bool vectors>
  DEVICE static void write(const Params& p, int row, int part, const Part& quantized) {
    int column = part * blocks * block_k + lane_index() * per_load<T>;
    int64_t at = int64_t(row) * p.quantized.k + column;
#pragma unroll
    for (int i = 0; i < loads; ++i)
      store_codes<T, vectors>(p.quantized, at + i * stride, p.quantized.k - column - i * stride, quantized.codes[i]);
    int block = part * blocks + lane_index();
    if (lane_index() < blocks && block * block_k < p.quantized.k)
      store_scale(p.quantized, int64_t(block) * p.quantized.m + row, quantized.scale);
  }
};

// The first element of a row; of a negative one, anything. Without signs one instruction multiplies.
DEVICE int64_t row_start(int row, int hidden) { return int64_t(uint32_t(row)) * uint32_t(hidden); }

// ---- sums of a token's rows ----

// The leaves of a token's tree, sorted by key, of each warp: a leaf's row and weight, and how many sums end with it.
// A sum that waits for its right side is one of the pending ones: a stack.
template <int warps>
struct LeafTable {
  Shared<int> key[warps][most_choices], depth[warps][most_choices];
  Shared<int> row[warps][most_choices], sums[warps][most_choices];
  Shared<float> weight[warps][most_choices];
};

// `deep`: for trees that may have more than 7 sums pending; with it a lane adds up four columns at a time, else eight.
template <typename T, typename Out, bool deep>
struct AddRows {
  static constexpr int threads = 128, warps = threads / warp_size, resident = deep ? 3 : 6;
  static constexpr int most_pending = deep ? 31 : 7, fours = deep ? 1 : 2;
  static constexpr int columns = fours * warp_size * 4;
  static constexpr int lane_bytes = 128;  // of rows, that a lane has in flight
  static std::string name() {
    return std::string("AddRows<") + format_name<T> + ", " + format_name<Out> + (deep ? ", true>" : ", false>");
  }

  // Sums pending at once: at most one for each leaf but two, or for each level of the tree.
  static constexpr bool holds(int64_t num_keys, int64_t top_k) {
    return top_k - 2 <= most_pending || num_keys <= int64_t{1} << most_pending;
  }

  struct Params {
    Global<const T> rows;
    Global<const int32_t> slots, keys;
    Global<const float> weights;
    Global<const float> bias;  // at most one of the two is there
    Global<const bfloat16> narrow_bias;
    Global<Out> out;
    int num_rows, num_keys, tokens, top_k, hidden;
    int parts, part;  // parts of a row, and columns of each
    bool vectors;     // four neighbouring columns are aligned
  };
  struct Smem {
    LeafTable<warps> leaves;
    Shared<Pack<float, 4>> pending[most_pending][fours][threads];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    int unit = block_index() * warps + warp_index(), token = unit / p.parts, first = unit % p.parts * p.part;
    if (token >= p.tokens) return;
    int leaves = find_leaves(p, s.leaves, token);
    int end = first + p.part < p.hidden ? first + p.part : p.hidden;
    for (; first < end; first += columns) {
      if (p.vectors)
        add<true>(p, s, token, leaves, first + lane_index() * 4);
      else
        add<false>(p, s, token, leaves, first + lane_index() * 4);
    }
  }

  // By all lanes, and the same for all parts of a token. Their number.
  DEVICE static int find_leaves(const Params& p, LeafTable<warps>& table, int token) {
    int warp = warp_index(), leaves = 0;
    int row[2], key[2];  // of choices `lane` and `lane` + 32
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int choice = half * warp_size + lane_index();
      row[half] = key[half] = -1;
      if (choice < p.top_k) {
        int64_t at = int64_t(token) * p.top_k + choice;
        row[half] = load_global<int32_t>(p.slots, at);
        key[half] = load_global<int32_t>(p.keys, at);
        weight[half] = load_global<float>(p.weights, at);
        if (row[half] < 0 || row[half] >= p.num_rows || key[half] < 0 || key[half] >= p.num_keys) key[half] = -1;
        store(table.depth[warp][choice], key[half]);  // unsorted, for a while
      }
      leaves += popc(ballot(key[half] >= 0));
    }
    syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (key[half] < 0) continue;
      int choice = half * warp_size + lane_index(), rank = 0;
      for (int i = 0; i < p.top_k; ++i) {
        int other = load(table.depth[warp][i]);
        rank += other >= 0 && (other < key[half] || (other == key[half] && i < choice));
      }
      store(table.key[warp][rank], key[half]);
      store(table.row[warp][rank], row[half]);
      store(table.weight[warp][rank], weight[half]);
    }
    syncwarp();
    for (int i = lane_index(); i < leaves - 1; i += warp_size)
      store(table.depth[warp][i], depth_between(p, load(table.key[warp][i]), load(table.key[warp][i + 1])));
    syncwarp();
    // Every sum above a leaf that is deeper than where the next leaf joins ends with this leaf. Those that wait are of
    // rising depths: a bit each.
    uint32_t waiting = 0;
    for (int i = 0; i < leaves; ++i) {
      int depth = i + 1 < leaves ? load(table.depth[warp][i]) : 0;
      if (lane_index() == 0) store(table.sums[warp][i], popc(waiting >> depth));
      waiting = (waiting & ((uint32_t{1} << depth) - 1)) | uint32_t{1} << depth;
    }
    syncwarp();
    return leaves;
  }

  // How many halvings of the keys both go the same way; below them all, at 31, the sums of one key, from left to right.
  DEVICE static int depth_between(const Params& p, int left, int right) {
    if (left == right) return 31;
    int low = 0, high = p.num_keys, depth = 0;
    for (;; ++depth) {
      int middle = low + (high - low) / 2;
      if (right < middle)
        high = middle;
      else if (left >= middle)
        low = middle;
      else
        return depth;
    }
  }

  template <bool vectors>
  DEVICE static void add(const Params& p, Smem& s, int token, int leaves, int column) {
    constexpr int loads = vectors ? lane_bytes / (fours * sizeof(Four<T>)) : 1;  // leaves at once
    int warp = warp_index(), thread = thread_index(), pending = 0;
    Pack<float, 4> sum[fours] = {};
    for (int first = 0; first < leaves; first += loads) {
      int rows[loads];
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        int leaf = first + i < leaves ? first + i : first;
        rows[i] = load(s.leaves.row[warp][leaf]);
      }
      Four<T> x[loads][fours];
#pragma unroll
      for (int i = 0; i < loads; ++i) {
#pragma unroll
        for (int j = 0; j < fours; ++j) {
          int here = column + j * warp_size * 4, count = first + i < leaves ? p.hidden - here : 0;
          x[i][j] = load_four<vectors>(p.rows, row_start(rows[i], p.hidden) + here, count);
        }
      }
#pragma unroll
      for (int i = 0; i < loads; ++i) {
        if (first + i >= leaves) continue;
        float weight = load(s.leaves.weight[warp][first + i]);
        int sums = load(s.leaves.sums[warp][first + i]);
        if (sums == 0 && first + i > 0) {
#pragma unroll
          for (int j = 0; j < fours; ++j) store(s.pending[pending][j][thread], sum[j]);
          ++pending;
        }
#pragma unroll
        for (int j = 0; j < fours; ++j) {
          Pack<float, 4> term = to_floats(x[i][j]);
#pragma unroll
          for (int l = 0; l < 4; ++l) {
            float product = mul(term.item[l], weight);
            sum[j].item[l] = sums == 0 ? product : sum[j].item[l] + product;
          }
        }
#pragma unroll 1  // most are one or none
        for (; sums > 1; --sums) {
          --pending;
#pragma unroll
          for (int j = 0; j < fours; ++j) sum[j] = plus(load(s.pending[pending][j][thread]), sum[j]);
        }
      }
    }
    if (p.bias.size) add_bias<vectors>(p, p.bias, sum, token, column);
    if (p.narrow_bias.size) add_bias<vectors>(p, p.narrow_bias, sum, token, column);
#pragma unroll
    for (int j = 0; j < fours; ++j) {
      int here = column + j * warp_size * 4;
      store_four<vectors>(p.out, int64_t(token) * p.hidden + here, p.hidden - here, round_to<Out>(sum[j]));
    }
  }

  template <bool vectors, typename Bias>
  DEVICE static void add_bias(const Params& p, Global<const Bias> bias, Pack<float, 4> (&sum)[fours], int token,
                              int column) {
    Four<Bias> x[fours];
#pragma unroll
    for (int j = 0; j < fours; ++j) {
      int here = column + j * warp_size * 4;
      x[j] = load_four<vectors>(bias, int64_t(token) * p.hidden + here, p.hidden - here);
    }
#pragma unroll
    for (int j = 0; j < fours; ++j) sum[j] = plus(sum[j], to_floats(x[j]));
  }

  DEVICE static Pack<float, 4> plus(const Pack<float, 4>& x, const Pack<float, 4>& y) {
    Pack<float, 4> sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.item[i] = x.item[i] + y.item[i];
    return sum;
  }
};

// ---- products ----

// A block of threads takes a token, eight of its rows at a time.
template <typename T, typename X>
struct MultiplyRows {
  static constexpr int threads = 256, warps = threads / warp_size, rows = 8;
  static constexpr int resident = sizeof(T) == 4 ? 3 : 4;  // with registers for the loads of eight rows
  static std::string name() { return std::string("MultiplyRows<") + format_name<T> + ", " + format_name<X> + ">"; }

  struct Params {
    Global<const T> rows;
    Global<const int32_t> slots;
    Global<const X> x;
    Global<float> out;
    int num_rows, tokens, top_k, hidden;
    bool vectors;
  };
  struct Smem {
    Shared<float> sums[warps][rows];
  };

  DEVICE static void run(const Params& p, Smem& s) {
    for (int token = block_index(); token < p.tokens; token += grid_size())
      for (int first = 0; first < p.top_k; first += rows) {
        if (p.vectors)
          multiply<true>(p, s, token, first);
        else
          multiply<false>(p, s, token, first);
      }
  }

  template <bool vectors>
  DEVICE static void multiply(const Params& p, Smem& s, int token, int first) {
    int64_t choices = int64_t(token) * p.top_k;
    int warp = warp_index(), lane = lane_index(), slots[rows];
    float sums[rows] = {};
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      slots[i] = first + i < p.top_k ? load_global<int32_t>(p.slots, choices + first + i) : -1;
      if (slots[i] >= p.num_rows) slots[i] = -1;
    }
    for (int column = thread_index() * 4; column < p.hidden; column += threads * 4) {
      int count = p.hidden - column;
      Four<X> four = load_four<vectors>(p.x, int64_t(token) * p.hidden + column, count);
      Four<T> row[rows];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        int64_t at = row_start(slots[i], p.hidden) + column;
        row[i] = load_four<vectors>(p.rows, at, slots[i] < 0 ? 0 : count);
      }
      Pack<float, 4> x = to_floats(four);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        if (slots[i] < 0) continue;
        Pack<float, 4> y = to_floats(row[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i] = fma(x.item[j], y.item[j], sums[i]);
      }
    }
    float mine = 0;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int mask = warp_size / 2; mask > 0; mask /= 2) sums[i] += shfl_xor(sums[i], mask);
      if (lane == i) mine = sums[i];
    }
    if (lane < rows) store(s.sums[warp][lane], mine);
    bar_sync(0, threads);
    int choice = first + thread_index();
    if (thread_index() < rows && choice < p.top_k) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < warps; ++i) sum += load(s.sums[i][thread_index()]);
      store_global(p.out, choices + choice, sum);
    }
    bar_sync(0, threads);
  }
};

}  // namespace jaxkern::cuda::kernels
