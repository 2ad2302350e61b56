// The state of one launch. One thread of the host runs it, so nothing here is locked.
#pragma once

#include <setjmp.h>

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/sim/sim.h"

namespace jaxkern::cuda::sim {

constexpr int lanes = 32;
constexpr uint32_t shared_base = 0x400;  // where a block's shared memory begins: the first KiB is the system's
constexpr uint32_t page_bytes = 256;     // of what is known of small reads
constexpr int rank_shift = 24;           // mapa's addresses: rank + 1 above the address
constexpr float poison = __builtin_nanf("0x3b0b0");  // accumulators in flight; arithmetic keeps the payload

// ---- who knows of whose accesses: vector clocks ----

// One entry for each thread of the cluster, the last of its epochs that is known, and one for each mbarrier: its
// phases. A thread's epoch ends when it releases what it did: at every arrival and every barrier.
using Clock = std::vector<uint32_t>;

void join(Clock& clock, const Clock& other);

// ---- shared memory and what is known of it ----

struct Word {           // of 4 bytes: its last write, or what all its writers have in common
  uint32_t epoch = 0;   // of the component that wrote
  uint32_t fences = 0;  // of the writing thread, then
  uint16_t component = 0;
  uint16_t site = 0;
  uint8_t written = 0;  // a bit a byte
  bool by_copy_engine = false;
  bool in_flight = false;  // a copy will write it
  bool is_barrier = false;
  bool is_split = false;  // its bytes differ in who wrote them: see Block::split
};

struct Thread;
struct Warp;
struct Block;

struct Mbarrier {
  Block* block;
  uint32_t address;
  int component;
  uint32_t arrivals;         // expected in each phase
  int64_t pending;           // arrivals still expected in this one
  int64_t bytes = 0;         // still expected; negative if they came first
  uint32_t phase = 0;        // phases that have ended
  Clock arriving, released;  // what those knew who arrived in this phase, and in all that have ended
  double arriving_time = 0, released_time = 0;
  Thread* initialiser;
  uint32_t initialiser_epoch, initialiser_fences;
  std::vector<Thread*> waiting;
};

// What a thread waits for, for the scheduler and for the report of a deadlock.
struct Wait {
  enum Kind { none, warp, mbarrier, bar, cluster, bulk, cp_async, wgmma, registers } kind = none;
  Mbarrier* barrier = nullptr;
  uint32_t detail = 0;  // parity, name of the barrier, ...
  const char* what = "";
};

struct Operation;
struct Accumulator;

struct Thread {
  Block* block;
  Warp* warp;
  int index, lane, component;
  jmp_buf context;
  void* stack = nullptr;
  bool started = false, ready = true, done = false;
  Where where;
  Wait wait;
  Clock clock;
  double time = 0;           // cycles, by the model of speed
  uint32_t fences = 1;       // proxy fences executed
  uint32_t init_fences = 1;  // of barriers
  uint64_t cluster_arrived = 0, cluster_waited = 0;
  std::unordered_map<Mbarrier*, int64_t> observed;  // last phase waited for, -1 the one before the first
  // cp.async.bulk stores and cp.async copies: not yet in a group, and the groups
  std::vector<std::shared_ptr<Operation>> bulk, copies;
  std::vector<std::vector<std::shared_ptr<Operation>>> bulk_groups, copy_groups;
};

// An asynchronous operation. Its steps happen one after the other, each at a moment of the simulator's choice.
struct Operation {
  enum Mode { early, late, any } mode;
  Thread* thread;
  Mbarrier* barrier = nullptr;
  Warp* warp = nullptr;  // of a wgmma
  const Accumulator* accumulator = nullptr;
  Where where;
  const char* what;
  std::vector<std::function<void()>> steps;
  bool published = false;    // of cp.async: through an mbarrier
  int steps_after_read = 0;  // left when the source may be written again
  bool read_awaited = false;
  Block* block = nullptr;  // the shared memory that it reads or, for cp.async, writes
  uint32_t address = 0;
  int bytes = 0;
  std::vector<uint32_t> pieces;  // of 16 bytes each, that a wgmma reads
  bool done() const { return steps.empty(); }
};

// ---- a warp's collectives ----

struct Accumulator {  // in flight
  std::array<float*, lanes> registers;
  int n;
  int pending = 0;            // operations
  std::vector<float> values;  // [16, n]: what the registers will hold
};

struct Fragment {  // an A in registers, in flight
  std::array<const uint32_t*, lanes> registers;
  std::array<std::array<uint32_t, 4>, lanes> values;
  std::shared_ptr<Operation> operation;
};

struct Collective {
  const char* what = nullptr;
  Where where;
  uint32_t present = 0;
  std::array<uint64_t, lanes> in, out;
  std::array<void*, lanes> pointers;
  uint64_t generation = 0;
};

// What the last lane to come does. It refers to a callable, where std::function would allocate one for every lane.
class Act {
 public:
  template <typename F>
  Act(F&& f)
      : callable_(&f),
        call_([](void* f, Warp& w, Collective& c) { (*static_cast<std::remove_reference_t<F>*>(f))(w, c); }) {}
  void operator()(Warp& warp, Collective& c) const { call_(callable_, warp, c); }

 private:
  void* callable_;
  void (*call_)(void*, Warp&, Collective&);
};

// ---- bank conflicts ----

// Addresses that the lanes of a warp give to one execution of one instruction.
struct BankAccess {
  uint32_t present = 0;
  int bytes;
  std::array<uint32_t, lanes> address;
};

// A line's executions by one warp. Its lanes do not run in step here: the n-th of each are taken for one instruction.
struct BankLine {
  std::array<uint32_t, lanes> executions{};
  uint32_t counted = 0;              // instructions
  uint32_t open = 0;                 // of `accesses`: those that not all lanes have come to
  std::vector<BankAccess> accesses;  // after those
};

struct Warp {
  Block* block;
  int index;  // in the cluster
  std::vector<Thread*> threads;
  Collective collective;
  bool fenced = false;  // wgmma_fence since the last wait
  std::vector<std::shared_ptr<Operation>> open_group;
  std::deque<std::vector<std::shared_ptr<Operation>>> groups;
  std::deque<std::shared_ptr<Operation>> in_order;              // wgmmas, as the tensor cores will do them
  std::map<float*, std::shared_ptr<Accumulator>> accumulators;  // by lane 0's registers
  std::vector<Fragment> fragments;
  std::vector<BankLine> bank_lines;  // by site
  double operations_end = 0;
  size_t issued = 0;  // wgmmas, to compare with the other warps of the group
  int priority = 0, registers = 0;
  int live_lanes = lanes;
};

struct Warpgroup {
  std::vector<std::array<uint64_t, 3>> log;  // of each wgmma its shape and descriptors, in which the warps must agree
  double idle = 0, tensor = 0;               // cycles
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  Thread* last = nullptr;  // who came last, and where
  Where where;
  Clock clock;
  double time = 0;
  std::vector<Warp*> waiting;
  uint64_t generation = 0;
};

struct Block {
  int index, rank;
  std::vector<uint8_t> storage;
  uint8_t* shared;  // aligned as the hardware's
  std::vector<Word> words;
  std::vector<uint16_t> readers;  // of each 16 bytes: asynchronous reads in flight
  std::vector<uint16_t> reader_sites;
  std::map<uint32_t, std::array<Word, 4>> split;  // by word, its bytes
  // The last reads by each warp of the cluster: epoch << 32 | lanes. Of each 16 bytes by accesses of at least as many;
  // of each byte by smaller ones, in pages that exist once something was read there.
  std::vector<uint64_t> reads;
  std::vector<std::vector<uint64_t>> small_reads;
  std::map<uint32_t, std::unique_ptr<Mbarrier>> mbarriers;
  std::array<NamedBarrier, 16> named;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;  // given back by its warps: a block has no others, though the SM may (cutlass issue 2007)
  double copy_engine_free = 0;
  std::array<double, 4> tensor_core_free{};
};

// ---- counts ----

struct Usage {                   // of one buffer in global memory
  std::vector<uint8_t> touched;  // a bit each 16 bytes
};

struct Counts {
  int64_t launches = 0, blocks = 0, threads = 0, shared_bytes = 0;
  int64_t moved_bytes = 0, least_bytes = 0;
  int64_t shared_accesses = 0, bank_conflicts = 0;
  int64_t wgmmas = 0;
  double cycles = 0, tensor_cycles = 0;
  std::map<int, double> idle;  // cycles by warpgroup
  std::vector<uint64_t> seeds;
};

// ---- the launch ----

struct Failed {};

class Machine {
 public:
  Machine(const Kernel& kernel, int blocks, const void* params, void (*run)(const void*, void*));
  std::string run();

  Thread& self() { return *current_; }
  Block& block() { return *current_->block; }
  [[noreturn]] void fail(const Where& where, const std::string& message, Thread* thread = nullptr);

  // Fibers.
  void block_on(Wait wait, const Where& where);
  void wake(Thread* thread) { thread->ready = true; }

  // `act` sees what all lanes brought.
  void collective(const char* what, const Where& where, uint64_t in, void* pointer, Act act);
  uint64_t collective_result() { return current_->warp->collective.out[current_->lane]; }
  Clock join_lanes(Warp& warp);      // what all of them know, before the release that this is
  void release(Thread& thread);      // ends its epoch
  Thread* thread_of(int component);  // null for an mbarrier's

  // Asynchronous operations.
  void start(std::shared_ptr<Operation> operation);
  void step(Operation& operation);
  void finish(Operation& operation, int steps_left = 0);

  // Shared memory. `block` and offset of an address.
  Block& locate(uint32_t& address, const Where& where);
  uint8_t* at(Block& block, uint32_t address, int64_t bytes, int alignment, const char* what, const Where& where);
  void check_read(Block& block, uint32_t address, int bytes, Thread& thread, bool by_async_proxy, const char* what,
                  const Where& where);
  void check_write(Block& block, uint32_t address, int bytes, Thread& thread, const char* what, const Where& where);
  void check_readers(uint64_t reads, int warp, uint32_t address, Thread& thread, const char* what, const Where& where);
  void note_read(Block& block, uint32_t address, int bytes, Thread& thread);
  void note_write(Block& block, uint32_t address, int bytes, int component, uint32_t epoch, uint32_t fences,
                  bool by_copy_engine, const Where& where);
  void set_in_flight(Block& block, uint32_t address, int bytes, bool in_flight, const Where& where);
  void add_readers(Block& block, uint32_t address, int bytes, int change, uint16_t site);
  Mbarrier& mbarrier(uint32_t address, const Where& where);
  void complete_bytes(Mbarrier& barrier, int64_t bytes, double time, const Where& where);
  void arrive(Mbarrier& barrier, const Clock& clock, double time, const Where& where);
  void end_phase_if_complete(Mbarrier& barrier, const Where& where);
  void check_initialised(Mbarrier& barrier, bool needs_fence, const Where& where);
  void check_accumulators(const void* value, int bytes, const char* what, const Where& where);
  void check_registers(const Accumulator& accumulator, const Where& where);
  void count_matrix_banks(const Collective& c, int matrices);
  void count_banks(uint32_t address, int bytes, const Where& where);

  // Global memory.
  uint8_t* global(const void* base, int64_t size, int64_t offset, int64_t bytes, bool write, const Where& where);

  uint16_t site(const Where& where);
  std::string describe_site(uint16_t site) const;

  bool chance(int one_in) { return random_() % one_in == 0; }
  Operation::Mode mode(bool tensor_cores);

  const Kernel kernel_;
  const int grid_;
  const Settings settings_;
  Counts counts_;
  int components_ = 0;
  int warps_ = 0;                               // of the cluster
  std::vector<std::unique_ptr<Block>> blocks_;  // of the cluster that runs
  int cluster_arrived_ = 0;
  uint64_t cluster_generation_ = 0;
  Clock cluster_clock_, cluster_released_;  // of those that have come, and of those whose barrier is complete
  double cluster_time_ = 0;
  std::map<const void*, Usage> usage_;
  Thread* current_ = nullptr;
  Thread* acting_ = nullptr;  // whose operation goes on while no thread runs

 private:
  void run_cluster(int first_block);
  void make_block(int index, int rank);
  void resume(Thread& thread);
  void on_demand();
  void finish_cluster();
  void mismatch_at_exit(Thread& thread);
  [[noreturn]] void deadlock();
  void count_banks(const BankAccess& access);
  void close(BankLine& line);
  static void enter();

  const void* params_;
  void (*run_)(const void*, void*);
  std::mt19937_64 random_;
  jmp_buf scheduler_;
  std::string report_;
  bool failed_ = false;
  std::vector<std::shared_ptr<Operation>> pending_;
  std::map<std::pair<const char*, uint32_t>, uint16_t> site_of_;
  std::vector<Where> sites_;
};

Machine& machine();

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace jaxkern::cuda::sim
