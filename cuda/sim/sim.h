// A functional model of a Hopper multiprocessor: what cuda/arch calls when a kernel is compiled by a plain C++
// compiler.
//
// Every thread of a block is a fiber. The blocks of a cluster live together, clusters run one after the other, both in
// an order that a seed chooses. What the hardware does asynchronously happens at a moment that the seed chooses too,
// between as early and as late as the memory model allows. Whatever the memory model forbids stops the launch with a
// report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <source_location>
#include <string>

namespace jaxkern::cuda::sim {

using Where = std::source_location;

// ---- what a user of the simulator sets and reads ----

struct Settings {
  uint64_t seed = 0;           // order and moments: 0 to 3 are the corners early / late of copies x tensor cores
  bool hardware_sums = false;  // e4m3 products summed as the tensor cores do, not in float32
  int multiprocessors = 6;     // what the launch functions see: few, so that small problems have several tiles a block
};

Settings settings();
void configure(const Settings& settings);

// Counts of every kernel launched since the last clear, as JSON.
std::string statistics();
void clear_statistics();

// ---- what cuda/arch calls: launches ----

struct Kernel {
  std::string name;
  int threads, cluster, registers;
  size_t shared_bytes;
};

// Runs the kernel; the report of the first thing that went wrong, or nothing.
std::string launch(const Kernel& kernel, int blocks, const void* params, void (*run)(const void*, void*));
int multiprocessors();

// Fails the launch that is running with this message, at `where`.
[[noreturn]] void fail(const Where& where, const std::string& message);

// ---- threads ----

int thread_index();
int block_index();
int grid_size();
int cluster_rank();
uint32_t shfl(uint32_t value, int lane, Where where);
uint32_t ballot(bool predicate, Where where);
void syncwarp(Where where);
bool elect(Where where);
void setmaxnreg(int registers, bool increase, Where where);

// ---- memory ----

uint32_t shared_address(const void* pointer);
uint32_t mapa(uint32_t address, int rank);
void load_shared(void* value, uint32_t address, int bytes, Where where);
void store_shared(uint32_t address, const void* value, int bytes, Where where);
void load_global(void* value, const void* base, int64_t size, int64_t offset, int bytes, Where where);
void store_global(void* base, int64_t size, int64_t offset, const void* value, int bytes, Where where);
void ldmatrix(uint32_t* fragment, int matrices, bool transposed, uint32_t address, Where where);
void stmatrix(const uint32_t* fragment, int matrices, bool transposed, uint32_t address, Where where);

// ---- barriers ----

void mbarrier_init(uint32_t barrier, uint32_t arrivals, Where where);
void mbarrier_arrive(uint32_t barrier, Where where);
void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes, Where where);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where);
void fence_mbarrier_init(Where where);
void fence_proxy_async(Where where);
void bar(int name, int threads, bool wait, Where where);
void barrier_cluster_arrive(Where where);
void barrier_cluster_wait(Where where);
void st_async(uint32_t address, uint32_t bits, uint32_t barrier, Where where);

// ---- copies ----

struct alignas(64) TensorMap {
  uint8_t* base;
  int element_bytes;
  bool is_bfloat16;
  int rank;
  int64_t sizes[3];
  int64_t strides[3];  // bytes; of the innermost axis the element's
  int box[3];
  int swizzle;  // rows of 16 << swizzle bytes are permuted
};

std::string tensor_map(TensorMap& map, const void* base, int element_bytes, bool is_bfloat16, const int64_t* sizes,
                       const int64_t* strides, const int* box, int rank, int swizzle);
void tensor_load(uint32_t destination, const TensorMap& map, const int* at, int rank, uint32_t barrier, uint16_t blocks,
                 Where where);
void tensor_store(const TensorMap& map, const int* at, int rank, uint32_t source, bool add, Where where);
void bulk_load(uint32_t destination, const void* base, int64_t size, int64_t offset, uint32_t bytes, uint32_t barrier,
               Where where);
void bulk_store(void* base, int64_t size, int64_t offset, uint32_t source, uint32_t bytes, Where where);
void bulk_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t barrier, Where where);
void bulk_commit_group(Where where);
void bulk_wait_group(int pending, bool read, Where where);
void cp_async(uint32_t destination, const void* base, int64_t size, int64_t offset, int bytes, bool valid, Where where);
void cp_async_commit_group(Where where);
void cp_async_wait_group(int pending, Where where);
void cp_async_mbarrier_arrive(uint32_t barrier, Where where);

// ---- tensor cores ----

enum class Format { e4m3, bfloat16, float16 };

void wgmma_fence(Where where);
void wgmma(Format format, int n, float* d, const uint32_t* a_fragment, uint64_t a, uint64_t b, bool transposed_a,
           bool transposed_b, bool accumulate, Where where);
void wgmma_commit_group(Where where);
void wgmma_wait_group(int pending, std::initializer_list<float*> accumulators, Where where);

// ---- numbers ----

template <typename T>
uint32_t bits(T value) {
  uint32_t result;
  static_assert(sizeof(T) == 4);
  memcpy(&result, &value, 4);
  return result;
}
template <typename T>
T unbits(uint32_t bits) {
  T result;
  static_assert(sizeof(T) == 4);
  memcpy(&result, &bits, 4);
  return result;
}

void check_number(float x, Where where);  // fails for an accumulator in flight: conversions would hide it
uint32_t to_bfloat16(float x);
uint32_t to_float16(float x);
uint32_t to_e4m3(float x);
float from_e4m3(uint8_t x);
float from_float16(uint16_t x);

}  // namespace jaxkern::cuda::sim
