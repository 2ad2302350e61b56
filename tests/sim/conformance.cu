// Every function of cuda/arch against its meaning, written out here once more. The same source runs on the simulator
// and on a GPU, so what passes on both means the same on both:
//
//   c++ -std=c++20 -DJAXKERN_SIM -O2 -I. -x c++ tests/sim/conformance.cu cuda/sim/*.cc -o conformance
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -I. tests/sim/conformance.cu -o conformance
//
// It prints "ok name" or "FAILED name: why" for each case, and lines "measure ..." of what the ISA leaves open: how the
// tensor cores sum. `conformance no` measures nothing.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::conformance {

// ---- the host's side: memory that a kernel reaches, and launches ----

#ifdef JAXKERN_SIM
void* allocate(size_t bytes) { return aligned_alloc(256, round_up(bytes, 256)); }
void release(void* p) { free(p); }
Error move(void* to, const void* from, size_t bytes) { return copy(to, from, bytes, nullptr); }
Error finish() { return {}; }
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
}
void release(void* p) { cudaFree(p); }
Error move(void* to, const void* from, size_t bytes) {
  return describe(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
Error finish() { return describe(cudaDeviceSynchronize()); }
#endif

void require(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error(message);
}
void check(const Error& error) { require(error.empty(), error); }

template <typename... T>
std::string text(const char* format, T... values) {
  char buffer[512];
  snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

struct Memory {
  void* data;
  size_t bytes;
  explicit Memory(size_t bytes) : data(allocate(bytes)), bytes(bytes) { require(data, "out of memory"); }
  Memory(const Memory&) = delete;
  ~Memory() { release(data); }
  template <typename T>
  void put(const std::vector<T>& from) {
    if (!from.empty()) check(move(data, from.data(), from.size() * sizeof(T)));
  }
  template <typename T>
  std::vector<T> get() {
    std::vector<T> to(bytes / sizeof(T));
    check(move(to.data(), data, bytes));
    return to;
  }
};

// What all kernels here take. `in` and `out` are words; what they mean is each kernel's affair.
struct Params {
  TensorMap map;
  Global<const uint32_t> in;
  Global<uint32_t> out;
  int at[3];
  int n[8];
};

template <int count>
struct Kernel {
  using Params = conformance::Params;
  static constexpr int threads = count;
  static std::string name() { return "conformance"; }
};
struct Nothing {
  Shared<uint32_t> unused;
};

template <typename K>
void run(Params& p, int blocks = 1, int cluster = 1) {
  check(prepare<K>());
  check(launch<K>(blocks, cluster, p, nullptr));
  check(finish());
}

// Runs K on these words; the `words` of out, which start as 0xdeadbeef.
template <typename K>
std::vector<uint32_t> outputs(const std::vector<uint32_t>& in, size_t words, Params p = {}, int blocks = 1,
                              int cluster = 1) {
  Memory from(std::max<size_t>(in.size(), 4) * 4), to(words * 4);
  from.put(in);
  to.put(std::vector<uint32_t>(words, 0xdeadbeef));
  p.in = {static_cast<const uint32_t*>(from.data), int64_t(in.size())};
  p.out = {static_cast<uint32_t*>(to.data), int64_t(words)};
  run<K>(p, blocks, cluster);
  return to.get<uint32_t>();
}

void same(const std::vector<uint32_t>& got, const std::vector<uint32_t>& want) {
  require(got.size() == want.size(), "sizes differ");
  for (size_t i = 0; i < got.size(); ++i)
    require(got[i] == want[i], text("word %zu is %#x, not %#x", i, got[i], want[i]));
}

uint32_t as_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}
float as_float(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

std::vector<uint32_t> random_words(size_t count, uint64_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<uint32_t> words(count);
  for (auto& w : words) w = random();
  return words;
}

// ---- threads ----

struct Indices : Kernel<64> {
  using Smem = Nothing;
  DEVICE static void run(const Params& p, Smem&) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    int t = block_index() * threads + thread_index();
    uint32_t values[] = {uint32_t(thread_index()), uint32_t(block_index()), uint32_t(grid_size()),
                         uint32_t(cluster_rank()), uint32_t(lane_index()),  uint32_t(warp_index())};
    for (int i = 0; i < 6; ++i) store_global(p.out, t * 6 + i, values[i]);
  }
};

void indices() {
  auto got = outputs<Indices>({}, 6 * 64 * 6, {}, 6, 2);
  std::vector<uint32_t> want;
  for (uint32_t block = 0; block < 6; ++block)
    for (uint32_t t = 0; t < 64; ++t)
      for (uint32_t x : {t, block, 6u, block % 2, t % 32, t / 32}) want.push_back(x);
  same(got, want);
}

struct Shuffles : Kernel<64> {
  using Smem = Nothing;
  DEVICE static void run(const Params& p, Smem&) {
    int t = thread_index();
    uint32_t value = load_global<uint32_t>(p.in, t);
    store_global(p.out, t, shfl(value, 7));
    store_global(p.out, 64 + t, shfl(value, (t * 5 + 3) % 32));
    store_global(p.out, 128 + t, float_bits(shfl(bits_float(value), t % 4)));
    for (int i = 0; i < 5; ++i) store_global(p.out, 192 + i * 64 + t, shfl_xor(value, 1 << i));
    store_global(p.out, 640 + t, shfl_within<0b10100>(value, 0b01010));
    store_global(p.out, 704 + t, float_bits(shfl_within<0b00011>(bits_float(value), t % 32 / 8 * 4)));
    store_global(p.out, 512 + t, ballot(value % 3 == 0));
    uint32_t elected = ballot(elect());
    store_global(p.out, 576 + t, elected != 0 && (elected & (elected - 1)) == 0 ? 1u : 0u);
    syncwarp();
  }
};

void shuffles() {
  std::vector<uint32_t> in(64), want(768);
  for (int i = 0; i < 64; ++i) in[i] = as_bits(1.0f + i * 0.25f);  // floats too, none of them NaN
  for (int t = 0; t < 64; ++t) {
    int warp = t / 32 * 32;
    want[t] = in[warp + 7];
    want[64 + t] = in[warp + (t * 5 + 3) % 32];
    want[128 + t] = in[warp + t % 4];
    for (int i = 0; i < 5; ++i) want[192 + i * 64 + t] = in[t ^ 1 << i];
    for (int i = 0; i < 32; ++i) want[512 + t] |= uint32_t(in[warp + i] % 3 == 0) << i;
    want[576 + t] = 1;
    want[640 + t] = in[warp + (t & 0b10100) + 0b01010];
    want[704 + t] = in[warp + t % 4 + t % 32 / 8 * 4];
  }
  same(outputs<Shuffles>(in, 768), want);
}

struct Registers : Kernel<384> {
  static constexpr int registers = 168;
  using Smem = Nothing;
  DEVICE static void run(const Params& p, Smem&) {
    int t = thread_index();
    if (warp_index() >= 8) {
      setmaxnreg_dec<40>();
      store_global(p.out, t, 40u);
    } else {
      setmaxnreg_inc<232>();
      store_global(p.out, t, 232u);
    }
  }
};

void registers() {
  std::vector<uint32_t> want(384, 232);
  std::fill(want.begin() + 256, want.end(), 40);
  same(outputs<Registers>({}, 384), want);
}

// ---- memory ----

struct Packs : Kernel<32> {
  struct Smem {
    Shared<uint8_t> bytes[32];
    Shared<uint16_t> halves[32];
    Shared<float> floats[128];
    Shared<uint64_t> doubles[32];
    Tile<2048> tile;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index();
    using Four = Pack<uint32_t, 4>;
    Four four = load_global<Four>(p.in, 4 * t);
    uint32_t tile = shared_address(&s.tile);
    store_shared(tile + 16 * (31 - t), four);
    for (int i = 0; i < 4; ++i) store(s.floats[4 * t + i], bits_float(four.item[i]));
    store(s.bytes[t], static_cast<uint8_t>(four.item[0]));
    store(s.halves[t], static_cast<uint16_t>(four.item[1]));
    store(s.doubles[t], uint64_t(four.item[2]) << 32 | four.item[3]);
    syncwarp();
    int other = (t + 9) % 32;
    Four turned = load_shared<Four>(tile + 16 * other);
    store_global(p.out, 4 * t, turned);
    Pack<float, 2> pair = load_pack<2>(s.floats[4 * other + 2]);
    Pack<float, 4> all = load_pack<4>(s.floats[4 * other]);
    Pack<uint32_t, 2> sums = {float_bits(pair.item[0]) + float_bits(pair.item[1]),
                              float_bits(all.item[0]) ^ float_bits(all.item[3])};
    store_global(p.out, 128 + 2 * t, sums);
    store_global(p.out, 192 + t, uint32_t(load(s.bytes[other])) << 16 | load(s.halves[other]));
    uint64_t wide = load(s.doubles[other]);
    store_global(p.out, 224 + 2 * t, wide);
    store_shared(tile + 1024 + 2 * t, static_cast<uint16_t>(t * 257));
    syncwarp();
    store_global(p.out, 288 + t, load_shared<uint32_t>(tile + 1024 + 4 * (t % 16)));
    store_global(p.out, 320 + t, uint32_t(load_global<uint16_t>(p.in, t)));
    store_global(p.out, 352 + t, shared_address(&s.halves[3]) - shared_address(&s.halves[1]));
  }
};

void packs() {
  std::vector<uint32_t> in(128), want(384);
  for (int i = 0; i < 128; ++i) in[i] = as_bits(3.0f + i) + i * 77;
  for (int t = 0; t < 32; ++t) {
    const uint32_t* other = &in[(t + 9) % 32 * 4];
    for (int i = 0; i < 4; ++i) want[4 * t + i] = in[4 * (31 - (t + 9) % 32) + i];
    want[128 + 2 * t] = other[2] + other[3];
    want[129 + 2 * t] = other[0] ^ other[3];
    want[192 + t] = (other[0] & 0xff) << 16 | (other[1] & 0xffff);
    want[224 + 2 * t] = other[3];
    want[225 + 2 * t] = other[2];
    want[288 + t] = t % 16 * 2 * 257 | (t % 16 * 2 + 1) * 257 << 16;
    want[320 + t] = in[t] & 0xffff;
    want[352 + t] = 4;
  }
  same(outputs<Packs>(in, 384), want);
}

// The rows of the matrices lie in some other order, 64 bytes apart.
template <int matrices, bool transposed>
struct Matrices : Kernel<32> {
  struct Smem {
    Tile<2048> loaded, stored;
  };
  DEVICE static uint32_t place(int row) { return row * 11 % 32 * 64 + row % 4 * 16; }
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index();
    uint32_t from = shared_address(&s.loaded), to = shared_address(&s.stored);
    for (int i = 0; i < 4; ++i) store_shared(from + place(t) + 4 * i, load_global<uint32_t>(p.in, 4 * t + i));
    for (int i = 0; i < 16; ++i) store_shared(to + 64 * t + 4 * i, uint32_t(0));
    syncwarp();
    uint32_t fragment[matrices];
    ldmatrix<matrices, transposed>(fragment, from + place(t));
    for (int i = 0; i < matrices; ++i) {
      store_global(p.out, i * 32 + t, fragment[i]);
      fragment[i] = load_global<uint32_t>(p.in, i * 32 + t);
    }
    stmatrix<matrices, transposed>(to + place(t), fragment);
    syncwarp();
    for (int i = 0; i < 4; ++i) store_global(p.out, 128 + 4 * t + i, load_shared<uint32_t>(to + place(t) + 4 * i));
  }
};

template <int matrices, bool transposed>
void matrix_fragments() {
  auto in = random_words(128);
  auto half = [&](const std::vector<uint32_t>& words, int i) { return words[i / 2] >> i % 2 * 16 & 0xffff; };
  std::vector<uint32_t> want(256, 0xdeadbeef);
  std::fill(want.begin() + 128, want.end(), 0);
  for (int m = 0; m < matrices; ++m)
    for (int lane = 0; lane < 32; ++lane) {
      want[m * 32 + lane] = 0;
      for (int i = 0; i < 2; ++i) {
        int row = lane / 4, column = lane % 4 * 2 + i;
        if (transposed) std::swap(row, column);
        int element = (m * 8 + row) * 8 + column;  // of 32 rows of 8
        want[m * 32 + lane] |= half(in, element) << i * 16;
        want[128 + element / 2] |= half(in, (m * 32 + lane) * 2 + i) << element % 2 * 16;
      }
    }
  same(outputs<Matrices<matrices, transposed>>(in, 256), want);
}

// ---- numbers ----

enum class Function { bf16, f16, e4m3, from_e4m3, float16, bfloat16, ex2, lg2, div, rcp, mul, fma, popc, max };

// Pairs of words in, one word out for each.
template <Function function>
struct Numbers : Kernel<128> {
  using Smem = Nothing;
  DEVICE static void run(const Params& p, Smem&) {
    for (int i = block_index() * threads + thread_index(); i < p.n[0]; i += grid_size() * threads) {
      uint32_t first = load_global<uint32_t>(p.in, 2 * i), second = load_global<uint32_t>(p.in, 2 * i + 1), y;
      float x = bits_float(first);
      if constexpr (function == Function::bf16) y = cvt_bf16x2(x, bits_float(second));
      if constexpr (function == Function::f16) y = cvt_f16x2(x, bits_float(second));
      if constexpr (function == Function::e4m3) y = cvt_e4m3x2(x, bits_float(second));
      if constexpr (function == Function::from_e4m3) y = cvt_f16x2_e4m3x2(static_cast<uint16_t>(first));
      if constexpr (function == Function::float16) y = float_bits(to_float(float16{static_cast<uint16_t>(first)}));
      if constexpr (function == Function::bfloat16) y = float_bits(to_float(bfloat16{static_cast<uint16_t>(first)}));
      if constexpr (function == Function::ex2) y = float_bits(ex2(x));
      if constexpr (function == Function::lg2) y = float_bits(lg2(x));
      if constexpr (function == Function::div) y = float_bits(div(x, to_float(bits_float(second))));
      if constexpr (function == Function::rcp) y = float_bits(rcp(x));
      if constexpr (function == Function::mul)
        y = float_bits(mul(x, bits_float(second)) + bits_float((first ^ second) | 0x38000000));
      if constexpr (function == Function::popc) y = popc(first) << 8 | popc(second);
      if constexpr (function == Function::fma)
        y = float_bits(fma(x, bits_float(second), bits_float((first ^ second) | 0x38000000)));
      if constexpr (function == Function::max) y = max_u16x2(first, second);
      store_global(p.out, i, y);
    }
  }
};

template <Function function>
std::vector<uint32_t> apply(std::vector<uint32_t> in) {
  if (in.size() % 2) in.push_back(0);
  Params p = {};
  p.n[0] = in.size() / 2;
  return outputs<Numbers<function>>(in, in.size() / 2, p, 2);
}

double e4m3_value(int code) {  // the finite ones
  int exponent = code >> 3 & 15, fraction = code & 7;
  double x = exponent ? std::ldexp(1 + fraction / 8.0, exponent - 7) : std::ldexp(fraction / 8.0, -6);
  return code & 128 ? -x : x;
}

double bfloat16_value(uint32_t code) {
  int exponent = code >> 7 & 255, fraction = code & 127;
  double x = exponent ? std::ldexp(1 + fraction / 128.0, exponent - 127) : std::ldexp(fraction / 128.0, -126);
  return code & 0x8000 ? -x : x;
}

double float16_value(uint32_t code) {
  int exponent = code >> 10 & 31, fraction = code & 1023;
  double x = exponent ? std::ldexp(1 + fraction / 1024.0, exponent - 15) : std::ldexp(fraction / 1024.0, -14);
  return code & 0x8000 ? -x : x;
}

// The code of the nearest value of magnitude up to that of `last`, of those whose values increase with the code; ties
// to the even code. `beyond`: the code for what would round past it.
template <typename Value>
uint32_t nearest(float x, uint32_t sign, uint32_t last, Value value, uint32_t beyond) {
  double magnitude = std::fabs(double(x));
  uint32_t low = 0, high = last + 1;  // value(low) <= magnitude < value(high)
  while (high - low > 1) {
    uint32_t middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  double up = value(high), down = magnitude - value(low);
  bool goes_up = up - magnitude < down || (up - magnitude == down && low % 2);
  uint32_t code = goes_up ? high : low;
  return (code > last ? beyond : code) | (std::signbit(x) ? sign : 0);
}

uint32_t want_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  return nearest(x, 0x80, 0x7e, [](uint32_t c) { return c == 0x7f ? 480.0 : e4m3_value(c); }, 0x7e);
}
uint32_t want_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  return nearest(x, 0x8000, 0x7f7f, [](uint32_t c) { return bfloat16_value(c); }, 0x7f80);
}

uint32_t want_float16(float x) {
  if (std::isnan(x)) return 0x7fff;
  return nearest(x, 0x8000, 0x7bff, [](uint32_t c) { return float16_value(c); }, 0x7c00);
}

// Every value of the format, what lies halfway between two of them and next to that, of both signs; and random bits.
template <typename Value>
std::vector<uint32_t> probes(uint32_t last, uint32_t step, Value value) {
  std::vector<uint32_t> words = random_words(8192);
  auto add = [&](float x) {
    for (float y : {x, std::nextafter(x, INFINITY), std::nextafter(x, -INFINITY)})
      for (float z : {y, -y}) words.push_back(as_bits(z));
  };
  for (uint32_t code = 0; code < last; code += step) {
    add(value(code));
    add((value(code) + value(code + 1)) / 2);
  }
  for (float x :
       {448.0f, 463.9f, 464.0f, 465.0f, 480.0f, 1e30f, 3.4028235e38f, INFINITY, NAN, -NAN, 0x1p-10f, 0x1p-149f})
    add(x);
  return words;
}

void e4m3_conversion() {
  auto in = probes(0x7e, 1, e4m3_value);
  auto got = apply<Function::e4m3>(in);
  for (size_t i = 0; i + 1 < in.size(); ++i) {
    uint32_t code = got[i / 2] >> i % 2 * 8 & 0xff, want = want_e4m3(as_float(in[i]));
    require(code == want, text("%a becomes %#x, not %#x", as_float(in[i]), code, want));
  }
}

void bf16_conversion() {
  auto in = probes(0x7f7f, 13, bfloat16_value);
  auto got = apply<Function::bf16>(in);
  for (size_t i = 0; i + 1 < in.size(); ++i) {
    uint32_t code = got[i / 2] >> i % 2 * 16, want = want_bfloat16(as_float(in[i]));
    require((code & 0xffff) == want, text("%a becomes %#x, not %#x", as_float(in[i]), code & 0xffff, want));
  }
}

void f16_conversion() {
  auto in = probes(0x7bff, 1, float16_value);
  for (uint32_t& word : in)  // random ones are mostly outside the format
    if (word % 2) word = (word & 0x8fffffff) | 0x30000000;
  auto got = apply<Function::f16>(in);
  for (size_t i = 0; i + 1 < in.size(); ++i) {
    uint32_t code = got[i / 2] >> i % 2 * 16 & 0xffff, want = want_float16(as_float(in[i]));
    require(code == want, text("%a becomes %#x, not %#x", as_float(in[i]), code, want));
  }
}

void from_e4m3() {
  std::vector<uint32_t> in;
  for (uint32_t i = 0; i < 65536; ++i) in.insert(in.end(), {i, 0});
  auto got = apply<Function::from_e4m3>(in);
  for (uint32_t i = 0; i < 65536; ++i)
    for (int half = 0; half < 2; ++half) {
      uint32_t code = i >> half * 8 & 0xff, half_got = got[i] >> half * 16 & 0xffff;
      bool right = (code & 0x7f) == 0x7f ? (half_got & 0x7fff) > 0x7c00 : half_got == want_float16(e4m3_value(code));
      require(right, text("e4m3 %#x of %#x becomes %#x", code, i, half_got));
    }
}

void from_16_bits() {
  std::vector<uint32_t> in;
  for (uint32_t i = 0; i < 65536; ++i) in.insert(in.end(), {i, 0});
  auto halves = apply<Function::float16>(in), others = apply<Function::bfloat16>(in);
  for (uint32_t i = 0; i < 65536; ++i) {
    float want = float16_value(i), got = as_float(halves[i]);
    if ((i & 0x7c00) == 0x7c00) want = i & 1023 ? NAN : i & 0x8000 ? -INFINITY : INFINITY;
    require(std::isnan(want) ? std::isnan(got) : halves[i] == as_bits(want), text("float16 %#x becomes %a", i, got));
    require(others[i] == i << 16, text("bfloat16 %#x becomes %#x", i, others[i]));
  }
}

void exponential() {
  std::vector<uint32_t> in;
  for (int i = 0; i < 8000; ++i) in.insert(in.end(), {as_bits(-125.0f + i * 0.0313f), 0});
  in.insert(in.end(), {as_bits(-INFINITY), 0, as_bits(INFINITY), 0, as_bits(NAN), 0, as_bits(128.0f), 0});
  auto got = apply<Function::ex2>(in);
  for (int i = 0; i < 8000; ++i) {
    double x = as_float(in[2 * i]), want = std::exp2(x), y = as_float(got[i]);
    require(std::fabs(y - want) <= want * 0x1p-20, text("ex2(%a) is %a", x, y));
  }
  require(got[8000] == 0 && std::isinf(as_float(got[8001])) && std::isnan(as_float(got[8002])) &&
              std::isinf(as_float(got[8003])),
          "ex2 of what is not finite, or too large");
}

void logarithm() {
  std::vector<uint32_t> in;
  for (int i = 0; i < 8000; ++i) in.insert(in.end(), {as_bits(std::exp2(-125.0f + i * 0.0313f)), 0});
  for (int i = 0; i < 1000; ++i) in.insert(in.end(), {as_bits(0.5f + i * 0.0015f), 0});
  in.insert(in.end(), {0, 0, as_bits(INFINITY), 0, as_bits(-1.0f), 0});
  auto got = apply<Function::lg2>(in);
  for (int i = 0; i < 9000; ++i) {
    double x = as_float(in[2 * i]), want = std::log2(x), y = as_float(got[i]);
    require(std::fabs(y - want) <= std::max(1.0, std::fabs(want)) * 0x1p-20, text("lg2(%a) is %a", x, y));
  }
  require(as_float(got[9000]) == -INFINITY && as_float(got[9001]) == INFINITY && std::isnan(as_float(got[9002])),
          "lg2 of 0, infinity or -1");
}

void division() {
  auto in = random_words(40000);
  auto got = apply<Function::div>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    float x = as_float(in[2 * i]), y = as_float(in[2 * i + 1]);
    volatile float want = x / y;
    require(std::isnan(want) ? std::isnan(as_float(got[i])) : got[i] == as_bits(want),
            text("%a / %a is %a", x, y, as_float(got[i])));
  }
}

void reciprocal() {
  auto in = random_words(40000);
  auto got = apply<Function::rcp>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    float x = as_float(in[2 * i]);
    volatile float want = 1 / x;
    require(std::isnan(x) ? std::isnan(as_float(got[i])) : got[i] == as_bits(want),
            text("1 / %a is %a", x, as_float(got[i])));
  }
}

// With a sum after it, which the compiler must not fuse.
void multiplication() {
  auto in = random_words(40000);
  for (auto& word : in) word = (word & 0x87ffffff) | 0x38000000;  // about 1: the product and the third are of one size
  auto got = apply<Function::mul>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    float x = as_float(in[2 * i]), y = as_float(in[2 * i + 1]), z = as_float((in[2 * i] ^ in[2 * i + 1]) | 0x38000000);
    volatile float product = x * y;
    volatile float want = product + z;
    require(got[i] == as_bits(want), text("%a * %a + %a is %a", x, y, z, as_float(got[i])));
  }
}

void multiply_add() {
  auto in = random_words(40000);
  for (auto& word : in) word = (word & 0x87ffffff) | 0x38000000;  // about 1: the product and the third are of one size
  auto got = apply<Function::fma>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    float x = as_float(in[2 * i]), y = as_float(in[2 * i + 1]), z = as_float((in[2 * i] ^ in[2 * i + 1]) | 0x38000000);
    float want = std::fma(x, y, z);
    require(got[i] == as_bits(want), text("fma(%a, %a, %a) is %a", x, y, z, as_float(got[i])));
  }
}

void count_of_bits() {
  auto in = random_words(4000);
  in[0] = 0, in[1] = ~0u;
  auto got = apply<Function::popc>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    uint32_t want = 0;
    for (int bit = 0; bit < 32; ++bit) want += (in[2 * i] >> bit & 1) << 8, want += in[2 * i + 1] >> bit & 1;
    require(got[i] == want, text("the bits of %#x and %#x are %#x", in[2 * i], in[2 * i + 1], got[i]));
  }
}

void maximum() {
  auto in = random_words(4000);
  auto got = apply<Function::max>(in);
  for (size_t i = 0; i < got.size(); ++i) {
    uint32_t low = std::max(in[2 * i] & 0xffff, in[2 * i + 1] & 0xffff),
             high = std::max(in[2 * i] >> 16, in[2 * i + 1] >> 16);
    require(got[i] == (high << 16 | low), text("the maximum of %#x and %#x is %#x", in[2 * i], in[2 * i + 1], got[i]));
  }
}

// ---- barriers ----

// 96 producers, 32 consumers, a ring of one: ten phases of two barriers.
struct Phases : Kernel<128> {
  struct Smem {
    Shared<uint32_t> values[96];
    Barrier full, empty;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index();
    if (t == 0) {
      mbarrier_init(s.full, 96);
      mbarrier_init(s.empty, 32);
    }
    bar_sync(0, threads);
    for (int i = 0; i < 10; ++i) {
      if (warp_index() < 3) {
        mbarrier_wait(s.empty, (i + 1) % 2);
        store(s.values[t], uint32_t(i * 1000 + t));
        mbarrier_arrive(s.full);
      } else {
        mbarrier_wait(s.full, i % 2);
        uint32_t sum = 0;
        for (int j = lane_index(); j < 96; j += 32) sum += load(s.values[j]);
        mbarrier_arrive(s.empty);
        store_global(p.out, i * 32 + lane_index(), sum);
      }
    }
  }
};

void phases() {
  std::vector<uint32_t> want;
  for (int i = 0; i < 10; ++i)
    for (int lane = 0; lane < 32; ++lane) want.push_back(3 * (i * 1000 + lane) + 96);
  same(outputs<Phases>({}, 320), want);
}

// Bytes expected apart from the arrival, together with it, and of two copies: the phase ends with the last of them.
struct Transactions : Kernel<128> {
  struct Smem {
    Tile<1024> tile;
    Barrier full;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index();
    if (t == 0) {
      mbarrier_init(s.full, 3);
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
    for (int i = 0; i < 3; ++i) {
      if (t == 0) {
        mbarrier_expect_tx(s.full, 512);
        cp_async_bulk(s.tile.data, p.in, i * 256, 256, s.full);
        cp_async_bulk(s.tile.data + 256, p.in, i * 256 + 64, 256, s.full);
        mbarrier_arrive(s.full);
      } else if (t == 32) {
        mbarrier_arrive_expect_tx(s.full, 512);
        cp_async_bulk(s.tile.data + 512, p.in, i * 256 + 128, 512, s.full);
      } else if (t == 64) {
        mbarrier_arrive(s.full);
      }
      mbarrier_wait(s.full, i % 2);
      for (int j = t; j < 256; j += threads)
        store_global(p.out, i * 256 + j, load_shared<uint32_t>(shared_address(&s.tile) + 4 * j));
      bar_sync(0, threads);
    }
  }
};

void transactions() {
  auto in = random_words(768);
  same(outputs<Transactions>(in, 768), in);
}

// Warps 0 and 1 meet at barrier 3, warp 2 hands to warp 3 through barriers 5 and 6 that one of them does not wait at.
struct NamedBarriers : Kernel<128> {
  struct Smem {
    Shared<uint32_t> x[64], y[32];
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index(), lane = lane_index(), warp = warp_index();
    for (uint32_t i = 0; i < 4; ++i) {
      if (warp < 2) {
        store(s.x[t], i * 100 + t);
        bar_sync(3, 64);
        store_global(p.out, i * 64 + t, load(s.x[63 - t]));
        bar_sync(3, 64);
      } else if (warp == 2) {
        if (i > 0) bar_sync(6, 64);
        store(s.y[lane], i * 1000 + lane);
        bar_arrive(5, 64);
      } else {
        bar_sync(5, 64);
        store_global(p.out, 256 + i * 32 + lane, load(s.y[31 - lane]));
        if (i < 3) bar_arrive(6, 64);
      }
    }
  }
};

void named_barriers() {
  std::vector<uint32_t> want;
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t t = 0; t < 64; ++t) want.push_back(i * 100 + 63 - t);
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t t = 0; t < 32; ++t) want.push_back(i * 1000 + 31 - t);
  same(outputs<NamedBarriers>({}, 384), want);
}

// ---- clusters ----

struct Cluster : Kernel<64> {
  struct Smem {
    Tile<256> sent;
    Shared<uint32_t> x[128], y[64], z[64];
    Barrier meet, full, received;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index(), rank = cluster_rank(), other = rank ^ 1, out = block_index() * 320;
    if (t == 0) {
      mbarrier_init(s.meet, 2 * 32);
      mbarrier_init(s.full, 1);
      mbarrier_init(s.received, 1);
      fence_mbarrier_init();
    }
    for (int i = 0; i < 2; ++i) store(s.x[2 * t + i], uint32_t(block_index() * 1000 + 2 * t + i));
    barrier_cluster_arrive();
    barrier_cluster_wait();
    Pack<uint32_t, 2> pair = load_cluster<2>(s.x[2 * (63 - t)], other);
    store_global(p.out, out + 2 * t, pair);
    store_cluster(s.y[(t + 5) % 64], other, uint32_t(block_index() * 2000 + t));
    // Each barrier hears of a warp of both blocks, three times.
    for (int i = 0; i < 3; ++i) {
      if (warp_index() == 1)
        for (int r = 0; r < 2; ++r) mbarrier_arrive_cluster(s.meet, r);
      mbarrier_wait(s.meet, i % 2);
      bar_sync(0, threads);  // nobody may fall two phases behind
    }
    if (t == 0) mbarrier_arrive_expect_tx(s.full, 256);
    st_async(s.z[63 - t], other, uint32_t(block_index() * 3000 + t), s.full);
    mbarrier_wait(s.full, 0);
    store_global(p.out, out + 128 + t, load(s.z[t]));
    barrier_cluster_arrive();
    barrier_cluster_wait();
    uint32_t apart = mapa(&s.y, other) - mapa(&s.x, other) - (shared_address(&s.y) - shared_address(&s.x));
    store_global(p.out, out + 192 + t, load(s.y[t]) + apart);
    // Each sends its half of `sent`.
    uint32_t half = shared_address(s.sent.data) + rank * 128;
    if (t < 32) store_shared(half + t * 4, uint32_t(block_index() * 4000 + t));
    fence_proxy_async();
    bar_sync(0, threads);
    if (t == 0) {
      mbarrier_arrive_expect_tx(s.received, 128);
      cp_async_bulk_cluster(half, 128, s.received, other);
    }
    mbarrier_wait(s.received, 0);
    store_global(p.out, out + 256 + t, load_shared<uint32_t>(shared_address(s.sent.data) + t * 4));
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

void cluster() {
  std::vector<uint32_t> want;
  for (uint32_t block = 0; block < 4; ++block) {
    uint32_t other = block ^ 1;
    for (uint32_t t = 0; t < 64; ++t)
      for (uint32_t i = 0; i < 2; ++i) want.push_back(other * 1000 + 2 * (63 - t) + i);
    for (uint32_t t = 0; t < 64; ++t) want.push_back(other * 3000 + 63 - t);
    for (uint32_t t = 0; t < 64; ++t) want.push_back(other * 2000 + (t + 59) % 64);
    for (uint32_t t = 0; t < 64; ++t) want.push_back((block / 2 * 2 + t / 32) * 4000 + t % 32);
  }
  same(outputs<Cluster>({}, 1280, {}, 4, 2), want);
}

// ---- the copy engine ----

// Where the copy engine leaves byte b of row r of a box with rows of `width` bytes: the 16-byte chunks of the rows in
// 128 bytes of shared memory are permuted by the number of that line.
int swizzled_position(int r, int b, int width, Swizzle swizzle) {
  if (swizzle == Swizzle::none) return r * width + b;
  int chunks = width / 16, line = r * width / 128;
  return r * width + (b / 16 ^ line % chunks) * 16 + b % 16;
}

constexpr int tile_bytes = 16384;

DEVICE void dump(const Params& p, int64_t first, const void* tile, int bytes) {
  for (int i = thread_index(); i < bytes / 4; i += 128)
    store_global(p.out, first + i, load_shared<uint32_t>(shared_address(tile) + 4 * i));
}

// n[0]: the box's bytes.
template <int rank>
struct TensorLoad : Kernel<128> {
  struct Smem {
    Tile<tile_bytes> tile;
    Barrier full;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) {
      prefetch_tensormap(p.map);
      mbarrier_init(s.full, 1);
      fence_mbarrier_init();
    }
    bar_sync(0, threads);
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(s.full, p.n[0]);
      if constexpr (rank == 2)
        cp_async_bulk_tensor<2>(&s.tile, p.map, {p.at[0], p.at[1]}, s.full);
      else
        cp_async_bulk_tensor<3>(&s.tile, p.map, {p.at[0], p.at[1], p.at[2]}, s.full);
    }
    mbarrier_wait(s.full, 0);
    dump(p, 0, &s.tile, p.n[0]);
  }
};

// The two blocks of a cluster copy half of the box each, of n[0] bytes and n[1] rows or planes, to both.
template <int rank>
struct Multicast : Kernel<128> {
  struct Smem {
    Tile<tile_bytes> tile;
    Barrier full;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int mine = cluster_rank();
    if (thread_index() == 0) {
      mbarrier_init(s.full, 1);
      fence_mbarrier_init();
    }
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(s.full, 2 * p.n[0]);
      uint8_t* half = s.tile.data + mine * p.n[0];
      if constexpr (rank == 2)
        cp_async_bulk_tensor_multicast<2>(half, p.map, {p.at[0], p.at[1] + mine * p.n[1]}, s.full, 3);
      else
        cp_async_bulk_tensor_multicast<3>(half, p.map, {p.at[0], p.at[1], p.at[2] + mine * p.n[1]}, s.full, 3);
    }
    mbarrier_wait(s.full, 0);
    dump(p, block_index() * (p.n[0] / 2), &s.tile, 2 * p.n[0]);
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

// n[0] bytes of in, as they are in shared memory.
template <int rank, bool add>
struct TensorStore : Kernel<128> {
  struct Smem {
    Tile<tile_bytes> tile;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    for (int i = thread_index(); i < p.n[0] / 4; i += threads)
      store_shared(shared_address(&s.tile) + 4 * i, load_global<uint32_t>(p.in, i));
    fence_proxy_async();
    bar_sync(0, threads);
    if (thread_index() == 0) {
      if constexpr (rank == 2 && !add) cp_async_bulk_tensor_store<2>(p.map, {p.at[0], p.at[1]}, &s.tile);
      if constexpr (rank == 3 && !add) cp_async_bulk_tensor_store<3>(p.map, {p.at[0], p.at[1], p.at[2]}, &s.tile);
      if constexpr (rank == 2 && add) cp_reduce_async_bulk_tensor_add<2>(p.map, {p.at[0], p.at[1]}, &s.tile);
      if constexpr (rank == 3 && add) cp_reduce_async_bulk_tensor_add<3>(p.map, {p.at[0], p.at[1], p.at[2]}, &s.tile);
      bulk_commit_group();
      bulk_wait_group_read<0>();
      bulk_wait_group<0>();
    }
  }
};

// A tensor of three axes, not full multiples of the box, rows and planes with gaps between them.
struct Tensor {
  Element element;
  int rank, size;  // of an element
  int64_t sizes[3], strides[3];
  int box[3];
  Swizzle swizzle;

  Tensor(Element element, int rank, Swizzle swizzle) : element(element), rank(rank), swizzle(swizzle) {
    size = element == Element::uint8 ? 1 : element == Element::bfloat16 ? 2 : 4;
    int width = swizzle == Swizzle::none ? 48 : 16 << static_cast<int>(swizzle);
    box[0] = width / size;
    box[1] = rank == 2 ? 24 : 10;
    box[2] = rank == 2 ? 1 : 3;
    sizes[0] = box[0] * 5 / 2 + 1;
    sizes[1] = 37;
    sizes[2] = rank == 2 ? 1 : 5;
    strides[0] = size;
    strides[1] = round_up(sizes[0] * size, 16) + 32;
    strides[2] = sizes[1] * strides[1] + 64;
  }
  int width() const { return box[0] * size; }
  int box_bytes() const { return width() * box[1] * box[2]; }
  int64_t bytes() const { return sizes[2] * strides[2]; }
  void map(Params& p, void* base) const {
    p.n[0] = box_bytes();
    if (rank == 2)
      check(tensor_map<2>(p.map, base, element, {sizes[0], sizes[1]}, {strides[1]}, {box[0], box[1]}, swizzle));
    else
      check(tensor_map<3>(p.map, base, element, {sizes[0], sizes[1], sizes[2]}, {strides[1], strides[2]},
                          {box[0], box[1], box[2]}, swizzle));
  }
  // f(byte in shared memory, byte in the tensor or -1) for each byte of the box at these coordinates.
  template <typename F>
  void for_box(const int (&at)[3], F f) const {
    for (int z = 0; z < box[2]; ++z)
      for (int y = 0; y < box[1]; ++y)
        for (int x = 0; x < box[0]; ++x)
          for (int b = 0; b < size; ++b) {
            int64_t i = at[0] + x, j = at[1] + y, k = (rank == 3 ? at[2] : 0) + z;
            bool inside = i >= 0 && i < sizes[0] && j >= 0 && j < sizes[1] && k >= 0 && k < sizes[2];
            int64_t global = i * size + b + j * strides[1] + k * strides[2];
            f(swizzled_position(z * box[1] + y, x * size + b, width(), swizzle), inside ? global : -1);
          }
  }
};

// The innermost coordinate is a multiple of 16 bytes: any other is an illegal instruction to the copy engine.
constexpr int corners[][3] = {{0, 0, 0},     {16, 3, 1}, {-16, -2, -1}, {32, 30, 4},
                              {-1600, 0, 0}, {0, 36, 0}, {16, -23, -3}, {0, 50, 9}};
constexpr Element elements[] = {Element::uint8, Element::bfloat16, Element::float32};

std::vector<uint8_t> bytes_of(const std::vector<uint32_t>& words) {
  std::vector<uint8_t> bytes(words.size() * 4);
  memcpy(bytes.data(), words.data(), bytes.size());
  return bytes;
}
std::vector<uint32_t> words_of(const std::vector<uint8_t>& bytes) {
  std::vector<uint32_t> words(bytes.size() / 4);
  memcpy(words.data(), bytes.data(), words.size() * 4);
  return words;
}

// Random numbers of the element's kind; floats are small integers, whose sums are exact.
std::vector<uint8_t> random_elements(Element element, int64_t bytes, uint64_t seed) {
  auto words = random_words(round_up(bytes, 16) / 4, seed);
  if (element == Element::float32)
    for (auto& w : words) w = as_bits(float(int(w % 41) - 20));
  if (element == Element::bfloat16)
    for (auto& w : words) w = as_bits(float(int(w % 41) - 20)) >> 16 | as_bits(float(int(w >> 8 & 31) - 16));
  return bytes_of(words);
}

template <int rank>
void tensor_load(Swizzle swizzle) {
  for (Element element : elements)
    for (auto& at : corners) {
      Tensor t(element, rank, swizzle);
      auto in = random_elements(element, t.bytes(), 7);
      Memory memory(in.size());
      memory.put(in);
      Params p = {};
      t.map(p, memory.data);
      std::copy(at, at + 3, p.at);
      std::vector<uint8_t> want(t.box_bytes(), 0);
      t.for_box(at, [&](int to, int64_t from) { want[to] = from < 0 ? 0 : in[from]; });
      same(outputs<TensorLoad<rank>>({}, want.size() / 4, p), words_of(want));
    }
}

template <int rank>
void multicast() {
  for (Swizzle swizzle : {Swizzle::none, Swizzle::bytes_128})
    for (auto& at : corners) {
      Tensor t(Element::bfloat16, rank, swizzle);
      // The halves must end where the swizzle repeats, and be aligned for it.
      t.box[0] = 64;
      t.box[1] = rank == 2 ? 16 : 8;
      t.box[2] = rank == 2 ? 1 : 2;
      auto in = random_elements(Element::bfloat16, t.bytes(), 8);
      Memory memory(in.size());
      memory.put(in);
      Params p = {};
      t.map(p, memory.data);
      std::copy(at, at + 3, p.at);
      p.n[1] = t.box[rank - 1];
      std::vector<uint8_t> want(2 * t.box_bytes());
      for (int half = 0; half < 2; ++half) {
        int corner[3] = {at[0], at[1], at[2]};
        corner[rank - 1] += half * p.n[1];
        t.for_box(corner, [&](int to, int64_t from) { want[half * t.box_bytes() + to] = from < 0 ? 0 : in[from]; });
      }
      want.insert(want.end(), want.begin(), want.begin() + 2 * t.box_bytes());
      same(outputs<Multicast<rank>>({}, want.size() / 4, p, 2, 2), words_of(want));
    }
}

float element_at(const std::vector<uint8_t>& bytes, int64_t i, int size) {
  uint32_t word = 0;
  memcpy(size == 4 ? reinterpret_cast<uint8_t*>(&word) : reinterpret_cast<uint8_t*>(&word) + 2, &bytes[i], size);
  return as_float(word);
}

template <int rank, bool add>
void tensor_store(Swizzle swizzle) {
  for (Element element : elements)
    for (auto& at : corners) {
      if (add && element == Element::uint8) continue;
      if (std::min({at[0], at[1], at[2]}) < 0) continue;  // an illegal instruction, for a store alone
      Tensor t(element, rank, swizzle);
      t.sizes[0] = round_up(t.sizes[0], 16 / t.size);  // a store writes whole pieces of 16 bytes
      auto before = random_elements(element, t.bytes(), 9), tile = random_elements(element, t.box_bytes(), 10);
      Memory memory(before.size());
      memory.put(before);
      Params p = {};
      t.map(p, memory.data);
      std::copy(at, at + 3, p.at);
      auto want = before;
      t.for_box(at, [&](int from, int64_t to) {
        if (to < 0) return;
        if (!add) {
          want[to] = tile[from];
        } else if (to % t.size == 0) {
          uint32_t sum = as_bits(element_at(before, to, t.size) + element_at(tile, from, t.size));
          if (t.size == 2) sum >>= 16;
          memcpy(&want[to], &sum, t.size);
        }
      });
      outputs<TensorStore<rank, add>>(words_of(tile), 4, p);
      same(words_of(memory.get<uint8_t>()), words_of(want));
    }
}

struct Bulk : Kernel<128> {
  struct Smem {
    Tile<4096> tile;
    Barrier full;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) {
      mbarrier_init(s.full, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(s.full, p.n[0]);
      cp_async_bulk(s.tile.data + 48, p.in, p.n[1], p.n[0], s.full);
      mbarrier_wait(s.full, 0);
      cp_async_bulk_store(p.out, p.n[2], s.tile.data + 48, p.n[0] - 32);
      bulk_commit_group();
      cp_async_bulk_store(p.out, p.n[2] + 512, s.tile.data + 64, 16);
      bulk_commit_group();
      bulk_wait_group<1>();
      bulk_wait_group<0>();
    }
  }
};

void bulk() {
  auto in = random_words(2048);
  for (int bytes : {48, 1024, 2000}) {
    Params p = {};
    p.n[0] = bytes;
    p.n[1] = 20;
    p.n[2] = 12;
    std::vector<uint32_t> want(1024, 0xdeadbeef);
    std::copy_n(&in[20], (bytes - 32) / 4, &want[12]);
    std::copy_n(&in[24], 4, &want[12 + 512]);
    same(outputs<Bulk>(in, 1024, p), want);
  }
}

// Two groups of copies, in reversed order, some of them of zeros.
template <int bytes, bool by_barrier>
struct AsyncCopy : Kernel<128> {
  struct Smem {
    Tile<4096> tile;
    Barrier full;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    constexpr int words = bytes / 4;
    int t = thread_index();
    uint32_t tile = shared_address(&s.tile);
    if (t == 0) mbarrier_init(s.full, threads);
    bar_sync(0, threads);
    for (int i = 0; i < 2; ++i) {
      bool valid = (t + i) % 3 != 0;
      cp_async<bytes>(tile + (i * threads + t) * bytes, p.in, valid ? (i * threads + 127 - t) * words : 1 << 20, valid);
      if (!by_barrier) cp_async_commit_group();
    }
    uint32_t early = 0;
    if constexpr (by_barrier) {
      cp_async_mbarrier_arrive(s.full);
      mbarrier_wait(s.full, 0);
    } else {
      cp_async_wait_group<1>();
      early = load_shared<uint32_t>(tile + t * bytes);  // its own of the first group is there
      cp_async_wait_group<0>();
      bar_sync(0, threads);
    }
    dump(p, 0, &s.tile, 2 * threads * bytes);
    store_global(p.out, 2 * threads * words + t, early);
  }
};

template <int bytes, bool by_barrier>
void async_copy() {
  constexpr int words = bytes / 4;
  auto in = random_words(256 * words);
  std::vector<uint32_t> want(256 * words + 128, 0);
  for (int i = 0; i < 2; ++i)
    for (int t = 0; t < 128; ++t)
      if ((t + i) % 3) std::copy_n(&in[(i * 128 + 127 - t) * words], words, &want[(i * 128 + t) * words]);
  for (int t = 0; t < 128 && !by_barrier; ++t) want[256 * words + t] = want[t * words];
  same(outputs<AsyncCopy<bytes, by_barrier>>(in, want.size()), want);
}

// ---- tensor cores ----

// The host lays out shared memory and the registers, so that every layout is stated there. `in`: the images of A and B
// in shared memory, D before, by thread, and A in registers, by step and thread.
constexpr int a_image = 8192, b_image = 32768;

enum class Format { e4m3, bf16, f16 };

template <Format format, int n, bool a_in_registers, bool transposed_b, int steps, bool transposed_a>
struct Product : Kernel<128> {
  struct Smem {
    Tile<a_image> a;
    Tile<b_image> b;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    int t = thread_index();
    for (int i = t; i < a_image / 4; i += threads)
      store_shared(shared_address(&s.a) + 4 * i, load_global<uint32_t>(p.in, i));
    for (int i = t; i < b_image / 4; i += threads)
      store_shared(shared_address(&s.b) + 4 * i, load_global<uint32_t>(p.in, a_image / 4 + i));
    fence_proxy_async();
    bar_sync(0, threads);
    constexpr int image = (a_image + b_image) / 4;
    float d[n / 2];
    uint32_t fragments[steps][4];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) d[i] = load_global<float>(p.in, image + t * (n / 2) + i);
#pragma unroll
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fragments[step][i] =
            a_in_registers ? load_global<uint32_t>(p.in, image + 64 * n + (step * threads + t) * 4 + i) : 0;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint64_t a =
          matrix_descriptor(shared_address(&s.a) + step * p.n[2], p.n[0], p.n[1], static_cast<Swizzle>(p.n[6]));
      uint64_t b =
          matrix_descriptor(shared_address(&s.b) + step * p.n[5], p.n[3], p.n[4], static_cast<Swizzle>(p.n[7]));
      bool accumulate = step > 0 || p.at[0];
      if constexpr (format == Format::e4m3 && a_in_registers) wgmma_e4m3<n>(d, fragments[step], b, accumulate);
      if constexpr (format == Format::e4m3 && !a_in_registers) wgmma_e4m3<n>(d, a, b, accumulate);
      using Number = std::conditional_t<format == Format::f16, float16, bfloat16>;
      if constexpr (format != Format::e4m3 && a_in_registers)
        wgmma_16bit<Number, n, transposed_b>(d, fragments[step], b, accumulate);
      if constexpr (format != Format::e4m3 && !a_in_registers)
        wgmma_16bit<Number, n, transposed_b, transposed_a>(d, a, b, accumulate);
    }
    wgmma_commit_group();
    wgmma_wait_group<0>(d);
#pragma unroll
    for (int i = 0; i < n / 2; ++i) store_global(p.out, t * (n / 2) + i, float_bits(d[i]));
  }
};

// Where byte b of row r lies in a K-major matrix without a swizzle: 8 x 16 byte matrices, each contiguous.
int unswizzled_position(int r, int b, int leading, int stride) {
  return r / 8 * stride + b / 16 * leading + r % 8 * 16 + b % 16;
}

// `by_columns`: without a swizzle, whether the 8 x 16 byte matrices lie column after column or row after row.
template <Format format, int n, bool a_in_registers, bool transposed_b, int steps, bool transposed_a = false>
void product(Swizzle swizzle, bool by_columns = false) {
  constexpr bool fp8 = format == Format::e4m3;
  constexpr int size = fp8 ? 1 : 2, k = steps * 32 / size, k_bytes = steps * 32;
  std::mt19937 random(n + 2 * fp8);
  auto small = [&] { return float(int(random() % 5) - 2); };
  std::vector<float> a(64 * k), b(n * k), c(64 * n);
  for (auto* matrix : {&a, &b, &c})
    for (float& x : *matrix) x = small();
  auto put = [&](uint8_t* to, float x) {
    uint32_t code = fp8 ? want_e4m3(x) : format == Format::f16 ? want_float16(x) : as_bits(x) >> 16;
    memcpy(to, &code, size);
  };
  Swizzle a_swizzle = transposed_b && !transposed_a ? Swizzle::bytes_128 : swizzle;
  Params p = {};
  p.n[6] = static_cast<int>(a_swizzle);
  p.n[7] = static_cast<int>(swizzle);
  auto k_major = [&](const std::vector<float>& matrix, int rows, Swizzle swizzle, int* how, uint8_t* image) {
    bool plain = swizzle == Swizzle::none;
    int width = 16 << static_cast<int>(swizzle);
    how[0] = by_columns ? rows * 16 : 128;                         // leading
    how[1] = !plain ? 8 * width : by_columns ? 128 : 8 * k_bytes;  // stride
    how[2] = plain ? 2 * how[0] : 32;                              // a step along k
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < k; ++i) {
        int byte = i * size;
        int at = plain ? unswizzled_position(r, byte, how[0], how[1]) : swizzled_position(r, byte, width, swizzle);
        put(image + at, matrix[r * k + i]);
      }
  };
  // Rows of k; as many columns as the swizzle is wide, then the next columns of all rows.
  auto mn_major = [&](const std::vector<float>& matrix, int columns, int* how, uint8_t* image) {
    int width = 16 << static_cast<int>(swizzle);
    how[0] = k * width;
    how[1] = 8 * width;
    how[2] = 16 * width;
    for (int column = 0; column < columns; ++column)
      for (int i = 0; i < k; ++i)
        put(image + column * 2 / width * k * width + swizzled_position(i, column * 2 % width, width, swizzle),
            matrix[column * k + i]);
  };
  std::vector<uint8_t> image(a_image + b_image, 0);
  if (transposed_a)
    mn_major(a, 64, p.n, image.data());
  else
    k_major(a, 64, a_swizzle, p.n, image.data());
  if (transposed_b)
    mn_major(b, n, p.n + 3, image.data() + a_image);
  else
    k_major(b, n, swizzle, p.n + 3, image.data() + a_image);
  auto in = words_of(image);
  // D: thread t, item i.
  auto row = [](int t, int i) { return 16 * (t / 32) + t % 32 / 4 + (i & 2 ? 8 : 0); };
  auto column = [](int t, int i) { return 8 * (i / 4) + 2 * (t % 4) + (i & 1); };
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < n / 2; ++i) in.push_back(as_bits(c[row(t, i) * n + column(t, i)]));
  // A: four bytes a register; bytes of k 4 (t % 4) on in the first and second, 16 further in the others.
  for (int step = 0; step < steps; ++step)
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < 4; ++i) {
        uint32_t word = 0;
        int r = 16 * (t / 32) + t % 32 / 4 + (i & 1 ? 8 : 0), byte = step * 32 + 4 * (t % 4) + (i & 2 ? 16 : 0);
        for (int j = 0; j < 4 / size; ++j)
          put(reinterpret_cast<uint8_t*>(&word) + j * size, a[r * k + byte / size + j]);
        in.push_back(word);
      }
  for (int accumulate = 0; accumulate < 2; ++accumulate) {
    p.at[0] = accumulate;
    auto got = outputs<Product<format, n, a_in_registers, transposed_b, steps, transposed_a>>(in, 64 * n, p);
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < n / 2; ++i) {
        int r = row(t, i), col = column(t, i);
        float want = accumulate ? c[r * n + col] : 0, x = as_float(got[t * (n / 2) + i]);
        for (int j = 0; j < k; ++j) want += a[r * k + j] * b[col * k + j];
        require(x == want, text("accumulate %d: row %d, column %d (thread %d, item %d) is %g, not %g", accumulate, r,
                                col, t, i, x, want));
      }
  }
}

// ---- how the tensor cores sum ----

// One wgmma: the sum of these products, a pair of factors each, and the accumulator. Row 0, column 0.
template <bool fp8>
float tensor_sum(const std::vector<std::pair<float, float>>& products, float accumulator) {
  constexpr int size = fp8 ? 1 : 2;
  std::vector<uint8_t> image(a_image + b_image, 0);
  for (size_t i = 0; i < products.size(); ++i)
    for (int side = 0; side < 2; ++side) {
      float x = side ? products[i].second : products[i].first;
      uint32_t code = fp8 ? want_e4m3(x) : want_bfloat16(x);
      memcpy(&image[side * a_image + swizzled_position(0, i * size, 32, Swizzle::bytes_32)], &code, size);
    }
  auto in = words_of(image);
  in.resize(in.size() + 64 * 8 + 512, 0);
  in[(a_image + b_image) / 4] = as_bits(accumulator);
  Params p = {};
  p.n[1] = p.n[4] = 256;
  p.n[6] = p.n[7] = static_cast<int>(Swizzle::bytes_32);
  p.at[0] = 1;
  return as_float(outputs<Product<fp8 ? Format::e4m3 : Format::bf16, 8, false, false, 1, false>>(in, 64 * 8, p)[0]);
}

// Two factors that both formats hold, with the product s 2^e: e from -16 to 8, s of three bits.
std::pair<float, float> power(int e, float s = 1) {
  int second = e < 0 ? -9 : 0;
  return {std::ldexp(s, e - second), std::ldexp(1.0f, second)};
}

template <bool fp8>
void measure_sums(const char* format) {
  auto show = [&](const char* what, int j, float result, float reference) {
    printf("measure %s %s %d: %.9g = %a, less the largest %a\n", format, what, j, result, result,
           double(result) - double(reference));
  };
  using Products = std::vector<std::pair<float, float>>;
  auto sum = [](const Products& products, float accumulator) { return tensor_sum<fp8>(products, accumulator); };
  constexpr int top = 8, last = fp8 ? 24 : 30, k = fp8 ? 32 : 16;  // 2^top is the largest product: room for small ones
  const float big = std::ldexp(1.0f, top);
  for (int j = 6; j <= last; ++j)
    show("product 1 and one of 2^-j, times 2^8,", j, sum({power(top), power(top - j)}, 0), big);
  for (int j = 6; j <= last; ++j)
    show("product 1 and one of -2^-j, times 2^8,", j, sum({power(top), power(top - j, -1)}, 0), big);
  for (int j = 6; j <= last; ++j)
    show("product 1 and one of 1.75 2^-j, times 2^8,", j, sum({power(top), power(top - j, 1.75f)}, 0), big);
  for (int j = 6; j <= last; ++j)
    show("product -1 and one of 1.75 2^-j, times 2^8,", j, sum({power(top, -1), power(top - j, 1.75f)}, 0), -big);
  for (int j = 6; j <= last; ++j) {
    Products pair{power(top), power(top - j), power(top - j)}, all(k, power(top - j));
    all[0] = power(top);
    show("product 1 and two of 2^-j, times 2^8,", j, sum(pair, 0), big);
    show("product 1 and k - 1 of 2^-j, times 2^8,", j, sum(all, 0), big);
  }
  for (int j = 6; j <= last; ++j)  // is the exponent that of the product, or the sum of its factors'?
    show("product 2.25 = 1.5 1.5 and one of 2^-j, times 2^8,", j, sum({{24, 24}, power(top - j)}, 0), 2.25f * big);
  for (int j = 6; j <= last; ++j)
    show("accumulator 1 and product 2^-j, times 2^8,", j, sum({power(top - j)}, big), big);
  for (int j = 6; j <= last; ++j)
    show("accumulator 1 and product 1.75 2^-j, times 2^8,", j, sum({power(top - j, 1.75f)}, big), big);
  for (int j = 6; j <= last; ++j)
    show("product 1 and accumulator 2^-j, times 2^8,", j, sum({power(top)}, std::ldexp(big, -j)), big);
  for (int j = 6; j <= 23; ++j)
    show("accumulator 1 + 2^-j and product 0, times 2^8,", j, sum({}, big + std::ldexp(big, -j)), big);
  for (int j = 6; j <= 23; ++j)
    show("accumulator 1 + 2^-j and product 1, times 2^8,", j, sum({power(top)}, big + std::ldexp(big, -j)), 2 * big);
  for (int j = 6; j <= 23; ++j)
    show("accumulator 1 + 2^-j and product 2^-6, times 2^8,", j, sum({power(top - 6)}, big + std::ldexp(big, -j)),
         big + std::ldexp(big, -6));
  for (int j = 0; j <= 30; ++j)
    show("accumulator 2^j and product 1,", j, sum({power(0)}, std::ldexp(1.0f, j)), std::ldexp(1.0f, j));
  for (int j = 6; j <= last; ++j)
    show("products 1, -1 and 2^-j, times 2^8,", j, sum({power(top), power(top, -1), power(top - j)}, 0), 0);
  for (int j = 6; j <= last; ++j)
    show("accumulator 1, products -1 and 2^-j, times 2^8,", j, sum({power(top, -1), power(top - j)}, big), 0);
  // Which products are summed together: 1 at 0, -1 at 1, and a small one at j.
  for (int j = 2; j < k; ++j) {
    Products products(k, {0, 0});
    products[0] = power(top);
    products[1] = power(top, -1);
    products[j] = power(top - last);
    show("products 1 at 0, -1 at 1 and a small one at j, times 2^8,", j, sum(products, 0), 0);
  }
  for (int j = 1; j < k; ++j) {
    Products products(k, {0, 0});
    products[0] = power(top);
    products[j] = power(top, -1);
    products[j == k - 1 ? 1 : k - 1] = power(top - last);
    show("products 1 at 0, -1 at j and a small one at the end, times 2^8,", j, sum(products, 0), 0);
  }
  std::mt19937 random(5);
  for (int j = 0; j < 32; ++j) {
    Products products(k);
    double exact = 0;
    float before = float(int(random() % 4001) - 2000) / 64;
    for (auto& [x, y] : products) {
      x = e4m3_value(random() % 256 % 0x78 | (random() & 128));
      y = e4m3_value(random() % 256 % 0x78 | (random() & 128));
      exact += double(x) * y;
    }
    float result = sum(products, before);
    printf("measure %s random products %d: %.9g = %a, exactly %a\n", format, j, result, result, exact + before);
  }
}

// ---- all cases ----

struct Case {
  std::string name;
  std::function<void()> run;
};

template <int n>
void add_products(std::vector<Case>& cases) {
  auto add = [&](const char* kind, auto run) { cases.push_back({text("wgmma %s, n %d", kind, n), run}); };
  add("e4m3", [] { product<Format::e4m3, n, false, false, 4>(Swizzle::bytes_128); });
  add("e4m3, A in registers", [] { product<Format::e4m3, n, true, false, 4>(Swizzle::bytes_128); });
  add("bf16", [] { product<Format::bf16, n, false, false, 4>(Swizzle::bytes_128); });
  add("bf16, A in registers", [] { product<Format::bf16, n, true, false, 4>(Swizzle::bytes_128); });
  add("bf16, B MN-major", [] { product<Format::bf16, n, false, true, 4>(Swizzle::bytes_128); });
  add("f16", [] { product<Format::f16, n, false, false, 4>(Swizzle::bytes_128); });
  add("f16, A in registers", [] { product<Format::f16, n, true, false, 4>(Swizzle::bytes_128); });
  add("f16, A in registers, B MN-major", [] { product<Format::f16, n, true, true, 4>(Swizzle::bytes_128); });
  add("f16, B MN-major", [] { product<Format::f16, n, false, true, 4>(Swizzle::bytes_128); });
  add("bf16, A in registers, B MN-major", [] { product<Format::bf16, n, true, true, 4>(Swizzle::bytes_128); });
  add("bf16, A MN-major", [] { product<Format::bf16, n, false, false, 4, true>(Swizzle::bytes_128); });
  add("f16, A MN-major", [] { product<Format::f16, n, false, false, 4, true>(Swizzle::bytes_128); });
  add("bf16, A and B MN-major", [] { product<Format::bf16, n, false, true, 4, true>(Swizzle::bytes_128); });
  add("f16, A and B MN-major", [] { product<Format::f16, n, false, true, 4, true>(Swizzle::bytes_128); });
}

template <bool fp8>
void add_layouts(std::vector<Case>& cases) {
  constexpr Format format = fp8 ? Format::e4m3 : Format::bf16;
  std::string kind = fp8 ? "wgmma e4m3, " : "wgmma bf16, ";
  auto add = [&](const char* layout, auto run) { cases.push_back({kind + layout, run}); };
  add("64-byte swizzle", [] { product<format, 64, false, false, 2>(Swizzle::bytes_64); });
  add("64-byte swizzle, A in registers", [] { product<format, 96, true, false, 2>(Swizzle::bytes_64); });
  add("32-byte swizzle", [] { product<format, 64, false, false, 1>(Swizzle::bytes_32); });
  add("no swizzle", [] { product<format, 64, false, false, 2>(Swizzle::none); });
  add("no swizzle, by columns", [] { product<format, 64, false, false, 2>(Swizzle::none, true); });
  if constexpr (!fp8) {
    add("64-byte swizzle, B MN-major", [] { product<Format::bf16, 96, false, true, 4>(Swizzle::bytes_64); });
    add("32-byte swizzle, B MN-major", [] { product<Format::bf16, 96, false, true, 4>(Swizzle::bytes_32); });
    add("64-byte swizzle, A and B MN-major",
        [] { product<Format::bf16, 96, false, true, 4, true>(Swizzle::bytes_64); });
    add("32-byte swizzle, A and B MN-major",
        [] { product<Format::bf16, 96, false, true, 4, true>(Swizzle::bytes_32); });
  }
}

// ---- what the simulator counts ----

#ifdef JAXKERN_SIM
// All lanes in one bank, all in banks of their own, half as many; 128 bytes read twice and 128 written.
struct Counted : Kernel<32> {
  struct Smem {
    Tile<4096> tile;
  };
  DEVICE static void run(const Params& p, Smem& s) {
    uint32_t tile = shared_address(&s.tile);
    int lane = lane_index();
    store_shared(tile + 128 * lane, load_global<uint32_t>(p.in, lane));
    syncwarp();
    store_shared(tile + 4 * lane, load_global<uint32_t>(p.in, lane));
    syncwarp();
    for (int i = 0; i < 5000; ++i) store_shared(tile + 8 * lane, 0u);  // each lane all of them before the next lane
    for (int i = 0; lane == 0 && i < 10000; ++i) store_shared(tile, 0u);
    store_global(p.out, lane, 1u);
  }
};

void counts() {
  sim::clear_statistics();
  outputs<Counted>(random_words(32), 32);
  std::string counted = sim::statistics();
  for (const char* part : {"\"launches\": 1,", "\"least_bytes\": 256,", "\"moved_bytes\": 384,",
                           "\"shared_accesses\": 15002,", "\"bank_conflicts\": 5031,"})
    require(counted.find(part) != std::string::npos, text("%s is not in %s", part, counted.c_str()));
}
#endif

std::vector<Case> all_cases() {
  std::vector<Case> cases = {
      {"indices", indices},
      {"shfl, ballot, elect", shuffles},
      {"setmaxnreg", registers},
      {"loads and stores", packs},
      {"ldmatrix, stmatrix x1", matrix_fragments<1, false>},
      {"ldmatrix, stmatrix x2", matrix_fragments<2, false>},
      {"ldmatrix, stmatrix x4", matrix_fragments<4, false>},
      {"ldmatrix, stmatrix x1 transposed", matrix_fragments<1, true>},
      {"ldmatrix, stmatrix x2 transposed", matrix_fragments<2, true>},
      {"ldmatrix, stmatrix x4 transposed", matrix_fragments<4, true>},
      {"cvt_e4m3x2", e4m3_conversion},
      {"cvt_bf16x2", bf16_conversion},
      {"cvt_f16x2", f16_conversion},
      {"cvt_f16x2_e4m3x2", from_e4m3},
      {"to_float", from_16_bits},
      {"ex2", exponential},
      {"lg2", logarithm},
      {"div", division},
      {"rcp", reciprocal},
      {"mul", multiplication},
      {"fma", multiply_add},
      {"popc", count_of_bits},
      {"max_u16x2", maximum},
#ifdef JAXKERN_SIM
      {"counts of the simulator", counts},
#endif
      {"mbarrier phases", phases},
      {"mbarrier bytes", transactions},
      {"bar.sync, bar.arrive", named_barriers},
      {"cluster", cluster},
      {"cp.async.bulk", bulk},
      {"cp.async 4", async_copy<4, false>},
      {"cp.async 8", async_copy<8, false>},
      {"cp.async 16", async_copy<16, false>},
      {"cp.async 4, mbarrier", async_copy<4, true>},
      {"cp.async 8, mbarrier", async_copy<8, true>},
      {"cp.async 16, mbarrier", async_copy<16, true>},
      {"tensor load, multicast 2D", multicast<2>},
      {"tensor load, multicast 3D", multicast<3>},
  };
  const char* names[] = {"no swizzle", "32-byte swizzle", "64-byte swizzle", "128-byte swizzle"};
  for (int i = 0; i < 4; ++i) {
    auto swizzle = static_cast<Swizzle>(i);
    auto add = [&](const char* what, auto run) {
      cases.push_back({std::string(what) + names[i], [=] { run(swizzle); }});
    };
    add("tensor load 2D, ", tensor_load<2>);
    add("tensor load 3D, ", tensor_load<3>);
    add("tensor store 2D, ", tensor_store<2, false>);
    add("tensor store 3D, ", tensor_store<3, false>);
    add("tensor add 2D, ", tensor_store<2, true>);
    add("tensor add 3D, ", tensor_store<3, true>);
  }
  add_products<8>(cases);
  add_products<16>(cases);
  add_products<24>(cases);
  add_products<64>(cases);
  add_products<96>(cases);
  add_products<128>(cases);
  add_products<192>(cases);
  add_products<256>(cases);
  add_layouts<true>(cases);
  add_layouts<false>(cases);
  return cases;
}

}  // namespace jaxkern::cuda::conformance

int main(int count, char** arguments) {
  using namespace jaxkern::cuda::conformance;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  int failures = 0;
#ifdef JAXKERN_SIM
  constexpr uint64_t seeds = 4;
#else
  constexpr uint64_t seeds = 1;
#endif
  for (Case& c : all_cases()) {
    std::string error;
    for (uint64_t seed = 0; seed < seeds && error.empty(); ++seed) {
      SIM(jaxkern::cuda::sim::configure({.seed = seed});)
      try {
        c.run();
      } catch (const std::exception& e) {
        error = e.what();
      }
    }
    if (error.empty())
      printf("ok %s\n", c.name.c_str());
    else
      printf("FAILED %s: %s\n", c.name.c_str(), error.c_str()), ++failures;
  }
  if (count > 1 && !strcmp(arguments[1], "no")) return failures > 0;
  SIM(jaxkern::cuda::sim::configure({.hardware_sums = true});)
  try {
    measure_sums<true>("e4m3");
    measure_sums<false>("bf16");
  } catch (const std::exception& e) {
    printf("FAILED measure: %s\n", e.what());
    ++failures;
  }
  return failures > 0;
}
