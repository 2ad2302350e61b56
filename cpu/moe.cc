#include "cpu/moe.h"

#include "cpu/fp8.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff(), kNaN = __builtin_nanf("");

// The index of the largest of [0, n) that is no NaN, and one is none; the lowest one on ties.
int64_t argmax(const float* x, int64_t n) {
  int64_t best = 0;
  while (x[best] != x[best]) ++best;
  for (int64_t i = best + 1; i < n; ++i)
    if (x[i] > x[best]) best = i;
  return best;
}

void route_token(const RouteParams& p, int64_t token) {
  int64_t group_size = p.experts / p.num_groups;
  float* biased = static_cast<float*>(scratch((p.experts + p.num_groups) * sizeof(float)));
  float* group_scores = biased + p.experts;
  const float* scores = p.scores + token * p.experts;
  for (int64_t e = 0; e < p.experts; ++e) {
    float x = scores[e] + p.bias[e];
    biased[e] = x == x ? x : -kInfinity;
  }
  for (int64_t g = 0; g < p.num_groups; ++g) {
    float first = -kInfinity, second = -kInfinity;
    for (int64_t i = 0; i < group_size; ++i) {
      float x = biased[g * group_size + i];
      second = x > first ? first : x > second ? x : second;
      first = x > first ? x : first;
    }
    float total = group_size == 1 ? first : first + second;
    group_scores[g] = total == total ? total : -kInfinity;
  }
  // What is chosen becomes NaN, and so do the experts of groups that are not: an expert of the best groups, minus
  // infinity or not, comes before all others.
  for (int64_t i = 0; i < p.topk_groups; ++i) group_scores[argmax(group_scores, p.num_groups)] = kNaN;
  for (int64_t g = 0; g < p.num_groups; ++g)
    if (group_scores[g] == group_scores[g])
      for (int64_t i = 0; i < group_size; ++i) biased[g * group_size + i] = kNaN;
  int32_t* ids = p.expert_ids + token * p.top_k;
  for (int64_t j = 0; j < p.top_k; ++j) {
    ids[j] = static_cast<int32_t>(argmax(biased, p.experts));
    biased[ids[j]] = kNaN;
  }
}

bool is_assignment(int32_t index, int64_t count) { return index >= 0 && index < count; }

template <typename T>
void gather_weighted(const GatherRowsParams& p, int64_t row) {
  T* out = static_cast<T*>(p.out) + row * p.hidden;
  int32_t source = p.source[row];
  const T* x = static_cast<const T*>(p.x) + source / p.top_k * p.hidden;
  float weight = p.weights[source];
  int64_t i = 0;
  for (; i + kLanes <= p.hidden; i += kLanes) store(out + i, load(x + i) * weight);
  if (i < p.hidden) store_first(out + i, load_first(x + i, p.hidden - i) * weight, p.hidden - i);
}

constexpr int64_t kCachedBytes = 1 << 25;  // of a result that the caches may hold for its reader

// Copies each token to all its rows at once, past the caches: x is read once, and no row is read to be overwritten.
void gather_by_token(const GatherRowsParams& p, const Threads& threads) {
  int64_t row_bytes = p.hidden * p.element_size;
  auto token_of = [&](int64_t row) {
    return is_assignment(p.source[row], p.tokens * p.top_k) ? p.source[row] / p.top_k : p.tokens;
  };
  // Rows by token, those of none at the end; of token t, rows_by_token[first[t]] to [first[t + 1]].
  int32_t* rows_by_token = static_cast<int32_t*>(scratch((p.rows + p.tokens + 3) * sizeof(int32_t)));
  int32_t* first = rows_by_token + p.rows;
  std::memset(first, 0, (p.tokens + 3) * sizeof(int32_t));
  for (int64_t row = 0; row < p.rows; ++row) ++first[token_of(row) + 2];
  for (int64_t token = 0; token < p.tokens; ++token) first[token + 2] += first[token + 1];
  for (int64_t row = 0; row < p.rows; ++row) rows_by_token[first[token_of(row) + 1]++] = int32_t(row);
  auto row_at = [&](int64_t i) { return static_cast<char*>(p.out) + rows_by_token[i] * row_bytes; };
  threads.for_each_chunk(p.tokens, p.top_k * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const char* x = static_cast<const char*>(p.x) + token * row_bytes;
      for (int64_t i = first[token]; i < first[token + 1]; ++i) stream(row_at(i), x, row_bytes);
    }
    end_of_stream();
  });
  int64_t gaps = p.zero_gaps ? p.rows - first[p.tokens] : 0;
  threads.for_each_chunk(gaps, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memset(row_at(first[p.tokens] + i), 0, row_bytes);
  });
}

// Whether the row of an assignment is where `slots` says.
bool is_told(const GatherQuantizeRowsParams& p, int64_t assignment) {
  int32_t row = p.slots[assignment];
  return is_assignment(row, p.rows) && p.source[row] == assignment;
}

// A token's row in blocks.
template <typename T>
void quantize_token(const GatherQuantizeRowsParams& p, int64_t token, uint8_t* values, void* scales) {
  const T* x = static_cast<const T*>(p.x) + token * p.hidden;
  for (int64_t begin = 0, block = 0; begin < p.hidden; begin += kBlock, ++block) {
    int64_t end = begin + kBlock < p.hidden ? begin + kBlock : p.hidden;
    float scale = quantize_block(x, reinterpret_cast<e4m3*>(values), 1, p.hidden, begin, end, p.power_of_two);
    store_scale(scales, p.scale_type, block, scale);
  }
}

// The additions of one token's rows: into[i] += from[i], in order; the sum ends in `root`. leaves are choices j.
struct Tree {
  int leaves = 0;
  int additions = 0;
  int root = 0;
  int32_t row[kMaxTopK];
  int32_t key[kMaxTopK];
  float weight[kMaxTopK];
  uint8_t into[kMaxTopK];
  uint8_t from[kMaxTopK];
};

// Joins leaves [begin, end), sorted by key, all in [low, high), and returns the leaf that holds their sum.
int join(Tree& tree, int begin, int end, int64_t low, int64_t high) {
  if (end - begin == 1) return begin;
  int split = begin;
  if (high - low == 1) {
    split = end - 1;  // one expert, chosen more than once: from left to right
    high = low + 2;
  } else {
    int64_t middle = low + (high - low) / 2;
    while (split < end && tree.key[split] < middle) ++split;
    if (split == begin) return join(tree, begin, end, middle, high);
    if (split == end) return join(tree, begin, end, low, middle);
  }
  int64_t middle = low + (high - low) / 2;
  int left = join(tree, begin, split, low, middle), right = join(tree, split, end, middle, high);
  tree.into[tree.additions] = static_cast<uint8_t>(left);
  tree.from[tree.additions++] = static_cast<uint8_t>(right);
  return left;
}

void plant(Tree& tree, const SumRowsParams& p, int64_t token) {
  for (int64_t j = 0; j < p.top_k; ++j) {
    int32_t row = p.slots[token * p.top_k + j], key = p.keys[token * p.top_k + j];
    if (!is_assignment(row, p.num_rows) || !is_assignment(key, p.num_keys)) continue;
    int at = tree.leaves++;
    for (; at > 0 && tree.key[at - 1] > key; --at) {
      tree.row[at] = tree.row[at - 1];
      tree.key[at] = tree.key[at - 1];
      tree.weight[at] = tree.weight[at - 1];
    }
    tree.row[at] = row;
    tree.key[at] = key;
    tree.weight[at] = p.weights[token * p.top_k + j];
  }
  if (tree.leaves > 0) tree.root = join(tree, 0, tree.leaves, 0, p.num_keys);
}

template <typename T, typename Out, typename Bias>
void sum_token(const SumRowsParams& p, int64_t token) {
  constexpr int kWide = 4;          // registers a step, to hide the latency of the additions
  constexpr int64_t kAhead = 2560;  // bytes: rows lie apart, and the hardware starts anew with each
  constexpr int64_t kStepBytes = kWide * kLanes * sizeof(T);
  Tree tree;
  plant(tree, p, token);
  Out* out = static_cast<Out*>(p.out) + token * p.hidden;
  const T* rows = static_cast<const T*>(p.rows);
  const Bias* bias = p.bias ? static_cast<const Bias*>(p.bias) + token * p.hidden : nullptr;
  f32v sums[kMaxTopK][kWide];
  int64_t i = 0;
  for (; i + kWide * kLanes <= p.hidden; i += kWide * kLanes) {
    sums[0][0] = sums[0][1] = sums[0][2] = sums[0][3] = f32v{};
    for (int leaf = 0; leaf < tree.leaves; ++leaf) {
      const T* row = rows + tree.row[leaf] * p.hidden + i;
      for (int64_t at = 0; at < kStepBytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + kAhead + at, 0, 3);
      for (int w = 0; w < kWide; ++w) sums[leaf][w] = load(row + w * kLanes) * tree.weight[leaf];
    }
    for (int a = 0; a < tree.additions; ++a)
      for (int w = 0; w < kWide; ++w) sums[tree.into[a]][w] += sums[tree.from[a]][w];
    for (int w = 0; w < kWide; ++w) {
      f32v sum = sums[tree.root][w];
      store(out + i + w * kLanes, bias ? sum + load(bias + i + w * kLanes) : sum);
    }
  }
  for (; i < p.hidden; i += kLanes) {
    int64_t lanes = p.hidden - i < kLanes ? p.hidden - i : kLanes;
    sums[0][0] = f32v{};
    for (int leaf = 0; leaf < tree.leaves; ++leaf)
      sums[leaf][0] = load_first(rows + tree.row[leaf] * p.hidden + i, lanes) * tree.weight[leaf];
    for (int a = 0; a < tree.additions; ++a) sums[tree.into[a]][0] += sums[tree.from[a]][0];
    f32v sum = sums[tree.root][0];
    store_first(out + i, bias ? sum + load_first(bias + i, lanes) : sum, lanes);
  }
}

template <typename T, typename X>
float dot(const T* a, const X* b, int64_t n) {
  f32v sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] += load(a + i) * load(b + i);
    sums[1] += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i < n; i += kLanes) {
    int64_t lanes = n - i < kLanes ? n - i : kLanes;
    sums[0] += load_first(a + i, lanes) * load_first(b + i, lanes);
  }
  return sum(sums[0] + sums[1]);
}

template <typename F>
void with_type(DType type, F f) {
  type == DType::bf16 ? f(bf16{}) : f(float{});
}

}  // namespace

void route(const RouteParams& p, const Threads& threads) {
  threads.for_each_chunk(p.tokens, p.experts * p.top_k * 4, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) route_token(p, token);
  });
}

// Serial: two passes over the assignments, a few bytes each, cost less than waking a thread.
void assign_slots(const AssignSlotsParams& p, const Threads&) {
  int64_t* next = static_cast<int64_t*>(scratch(2 * p.num_groups * sizeof(int64_t)));
  int64_t* end = next + p.num_groups;
  for (int64_t g = 0; g < p.num_groups; ++g) next[g] = 0;
  for (int64_t i = 0; i < p.assignments; ++i)
    if (is_assignment(p.ids[i], p.num_groups)) ++next[p.ids[i]];
  int64_t start = 0, slab = p.rows / p.num_groups;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    int64_t count = next[g];
    if (p.slabs) start = g * slab;
    int64_t room = p.slabs ? slab : p.rows - start;
    int64_t kept = room < 0 ? 0 : count < room ? count : room;
    next[g] = start;
    end[g] = start + kept;
    p.sizes[g] = static_cast<int32_t>(kept);
    p.dropped[g] = static_cast<int32_t>(count - kept);
    start += (count + p.alignment - 1) / p.alignment * p.alignment;
  }
  for (int64_t row = 0; row < p.rows; ++row) p.source[row] = -1;
  for (int64_t i = 0; i < p.assignments; ++i) {
    int32_t g = p.ids[i];
    bool fits = is_assignment(g, p.num_groups) && next[g] < end[g];
    p.slots[i] = fits ? static_cast<int32_t>(next[g]) : -1;
    if (fits) p.source[next[g]++] = static_cast<int32_t>(i);
  }
}

void gather_rows(const GatherRowsParams& p, const Threads& threads) {
  int64_t row_bytes = p.hidden * p.element_size;
  prefer_large_pages(p.out, p.rows * row_bytes);
  if (!p.weights && p.rows * row_bytes > kCachedBytes) return gather_by_token(p, threads);
  threads.for_each_chunk(p.rows, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* out = static_cast<char*>(p.out) + row * row_bytes;
      int32_t source = p.source[row];
      if (!is_assignment(source, p.tokens * p.top_k)) {
        if (p.zero_gaps) std::memset(out, 0, row_bytes);
      } else if (!p.weights) {
        std::memcpy(out, static_cast<const char*>(p.x) + source / p.top_k * row_bytes, row_bytes);
      } else {
        with_type(p.type, [&](auto type) { gather_weighted<decltype(type)>(p, row); });
      }
    }
  });
}

void gather_quantize_rows(const GatherQuantizeRowsParams& p, const Threads& threads) {
  int64_t blocks = (p.hidden + kBlock - 1) / kBlock, scale_bytes = blocks * size_of(p.scale_type);
  char* scales = static_cast<char*>(p.scales);
  prefer_large_pages(p.values, p.rows * p.hidden);
  with_type(p.x_type, [&](auto type) {
    using T = decltype(type);
    threads.for_each_chunk(p.tokens, p.hidden * p.top_k, [&](int64_t begin, int64_t end) {
      uint8_t* values_of_token = static_cast<uint8_t*>(scratch(p.hidden + scale_bytes + kBlock));
      uint8_t* scales_of_token = values_of_token + (p.hidden + kBlock - 1) / kBlock * kBlock;
      for (int64_t token = begin; token < end; ++token) {
        bool quantized = false;
        for (int64_t i = token * p.top_k; i < (token + 1) * p.top_k; ++i) {
          if (!is_told(p, i)) continue;
          if (!quantized) quantize_token<T>(p, token, values_of_token, scales_of_token);
          quantized = true;
          std::memcpy(p.values + p.slots[i] * p.hidden, values_of_token, p.hidden);
          std::memcpy(scales + p.slots[i] * scale_bytes, scales_of_token, scale_bytes);
        }
      }
    });
    threads.for_each_chunk(p.rows, p.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int32_t source = p.source[row];
        if (!is_assignment(source, p.tokens * p.top_k)) {
          if (!p.zero_gaps) continue;
          std::memset(p.values + row * p.hidden, 0, p.hidden);
          std::memset(scales + row * scale_bytes, 0, scale_bytes);
        } else if (p.slots[source] != row) {
          quantize_token<T>(p, source / p.top_k, p.values + row * p.hidden, scales + row * scale_bytes);
        }
      }
    });
  });
}

void sum_rows(const SumRowsParams& p, const Threads& threads) {
  prefer_large_pages(p.out, p.tokens * p.hidden * size_of(p.out_type));
  with_type(p.type, [&](auto type) {
    with_type(p.out_type, [&](auto out_type) {
      with_type(p.bias_type, [&](auto bias_type) {
        threads.for_each_chunk(p.tokens, p.hidden * p.top_k * 2, [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token)
            sum_token<decltype(type), decltype(out_type), decltype(bias_type)>(p, token);
        });
      });
    });
  });
}

void dot_rows(const DotRowsParams& p, const Threads& threads) {
  with_type(p.type, [&](auto type) {
    with_type(p.x_type, [&](auto x_type) {
      using T = decltype(type);
      using X = decltype(x_type);
      threads.for_each_chunk(p.tokens, p.hidden * p.top_k * 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * p.top_k; i < end * p.top_k; ++i) {
          int32_t row = p.slots[i];
          const X* x = static_cast<const X*>(p.x) + i / p.top_k * p.hidden;
          bool some = is_assignment(row, p.num_rows);
          p.out[i] = some ? dot(static_cast<const T*>(p.rows) + row * p.hidden, x, p.hidden) : 0.0f;
        }
      });
    });
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
