// Fibers, their scheduler, collectives of a warp, and the launch of a kernel.
#include "cuda/sim/machine.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <mutex>
#include <numeric>
#include <utility>

namespace jaxkern::cuda::sim {
namespace {

thread_local Machine* running = nullptr;

std::mutex lock;  // of the two below
Settings current_settings;
std::map<std::string, Counts> all_counts;

// Stacks are kept for the next launch of this host thread.
constexpr size_t stack_bytes = 128 << 10;
struct Stacks {
  std::vector<void*> all, free;
  ~Stacks() {
    for (void* stack : all) munmap(stack, stack_bytes);
  }
  void* take() {
    if (free.empty()) {
      void* stack =
          mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) return nullptr;
      mprotect(stack, 4096, PROT_NONE);  // what overflows stops here, not in another thread's stack
      all.push_back(stack);
      free.push_back(stack);
    }
    void* stack = free.back();
    free.pop_back();
    return stack;
  }
};
thread_local Stacks stacks;

// Saves no signal mask, so that a switch is no system call.
__attribute__((noinline)) void switch_context(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

bool same_line(const Where& a, const Where& b) { return a.line() == b.line() && a.file_name() == b.file_name(); }

std::string describe(const Where& where) {
  const char* path = where.file_name();
  const char* file = strstr(path, "cuda/");
  if (!file) file = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  return text("%s:%u", file, where.line());
}

}  // namespace

std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

Settings settings() {
  std::lock_guard guard(lock);
  return current_settings;
}

void configure(const Settings& settings) {
  std::lock_guard guard(lock);
  current_settings = settings;
}

void clear_statistics() {
  std::lock_guard guard(lock);
  all_counts.clear();
}

std::string statistics() {
  std::lock_guard guard(lock);
  std::string json = "{\"kernels\": {";
  const char* comma = "";
  for (auto& [name, c] : all_counts) {
    json += text("%s\"%s\": {\"launches\": %ld, \"blocks\": %ld, \"threads\": %ld, \"shared_bytes\": %ld, ", comma,
                 name.c_str(), long(c.launches), long(c.blocks), long(c.threads), long(c.shared_bytes));
    json += text("\"least_bytes\": %ld, \"moved_bytes\": %ld, \"shared_accesses\": %ld, \"bank_conflicts\": %ld, ",
                 long(c.least_bytes), long(c.moved_bytes), long(c.shared_accesses), long(c.bank_conflicts));
    json += text("\"wgmma\": %ld, \"cycles\": %.0f, \"tensor_busy\": %.4f, \"idle\": {", long(c.wgmmas), c.cycles,
                 c.cycles ? c.tensor_cycles / c.cycles : 0);
    const char* inner = "";
    for (auto& [group, cycles] : c.idle) {
      json += text("%s\"warpgroup %d\": %.4f", inner, group, c.cycles ? cycles / c.cycles : 0);
      inner = ", ";
    }
    json += "}, \"seeds\": [";
    inner = "";
    for (uint64_t seed : c.seeds) {
      json += text("%s%lu", inner, (unsigned long)seed);
      inner = ", ";
    }
    json += "]}";
    comma = ", ";
  }
  return json + "}}";
}

int multiprocessors() { return settings().multiprocessors; }

Machine& machine() { return *running; }

void fail(const Where& where, const std::string& message) { machine().fail(where, message); }

__attribute__((target_clones("avx2", "default"))) void join(Clock& clock, const Clock& other) {
  uint32_t* a = clock.data();
  const uint32_t* b = other.data();
  for (size_t i = 0, n = clock.size(); i < n; ++i) a[i] = std::max(a[i], b[i]);
}

std::string launch(const Kernel& kernel, int blocks, const void* params, void (*run)(const void*, void*)) {
  if (blocks <= 0 || blocks % kernel.cluster)
    return text("%s: %d blocks are no positive multiple of the cluster's %d", kernel.name.c_str(), blocks,
                kernel.cluster);
  if (kernel.threads <= 0 || kernel.threads > 1024 || kernel.threads % lanes)
    return text("%s: %d threads are no multiple of 32 up to 1024", kernel.name.c_str(), kernel.threads);
  auto machine = std::make_unique<Machine>(kernel, blocks, params, run);
  Machine* outer = std::exchange(running, machine.get());
  std::string report = machine->run();
  running = outer;
  return report;
}

// ---- the launch ----

Machine::Machine(const Kernel& kernel, int blocks, const void* params, void (*run)(const void*, void*))
    : kernel_(kernel), grid_(blocks), settings_(settings()), params_(params), run_(run), random_(settings_.seed) {
  sites_.emplace_back();
}

std::string Machine::run() {
  std::vector<int> order(grid_ / kernel_.cluster);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_);
  try {
    for (int cluster : order) run_cluster(cluster * kernel_.cluster);
  } catch (const Failed&) {
    return report_;
  }
  for (auto& [base, usage] : usage_)
    for (uint8_t bits : usage.touched) counts_.least_bytes += 16 * __builtin_popcount(bits);
  std::lock_guard guard(lock);
  Counts& c = all_counts[kernel_.name];
  c.launches += 1;
  c.blocks += grid_;
  c.threads = kernel_.threads;
  c.shared_bytes = kernel_.shared_bytes;
  c.moved_bytes += counts_.moved_bytes;
  c.least_bytes += counts_.least_bytes;
  c.shared_accesses += counts_.shared_accesses;
  c.bank_conflicts += counts_.bank_conflicts;
  c.wgmmas += counts_.wgmmas;
  c.cycles += counts_.cycles;
  c.tensor_cycles += counts_.tensor_cycles;
  for (auto& [group, cycles] : counts_.idle) c.idle[group] += cycles;
  if (std::find(c.seeds.begin(), c.seeds.end(), settings_.seed) == c.seeds.end()) c.seeds.push_back(settings_.seed);
  return {};
}

void Machine::make_block(int index, int rank) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->rank = rank;
  size_t bytes = (kernel_.shared_bytes + 15) / 16 * 16;
  block->storage.assign(bytes + 1024, 0xff);  // NaNs
  auto start = reinterpret_cast<uintptr_t>(block->storage.data());
  block->shared = reinterpret_cast<uint8_t*>((start + 1023) / 1024 * 1024);
  block->words.assign(bytes / 4, {});
  block->readers.assign(bytes / 16, 0);
  block->reader_sites.assign(bytes / 16, 0);
  block->reads.assign(bytes / 16 * warps_, 0);
  block->small_reads.resize(bytes / page_bytes + 1);
  block->warpgroups.resize((kernel_.threads + 127) / 128);
  for (int i = 0; i < kernel_.threads; ++i) {
    if (i % lanes == 0) {
      auto warp = std::make_unique<Warp>();
      warp->block = block.get();
      warp->index = rank * (kernel_.threads / lanes) + i / lanes;
      warp->registers = kernel_.registers;
      warp->priority = static_cast<int>(random_() % 1024);
      block->warps.push_back(std::move(warp));
    }
    auto thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->warp = block->warps.back().get();
    thread->index = i;
    thread->lane = i % lanes;
    thread->component = components_++;
    thread->warp->threads.push_back(thread.get());
    block->threads.push_back(std::move(thread));
  }
  blocks_.push_back(std::move(block));
}

void Machine::run_cluster(int first_block) {
  constexpr int most_barriers = 128;
  blocks_.clear();
  components_ = 0;
  warps_ = kernel_.cluster * kernel_.threads / lanes;
  cluster_arrived_ = 0;
  cluster_generation_ = 0;
  cluster_time_ = 0;
  for (int rank = 0; rank < kernel_.cluster; ++rank) make_block(first_block + rank, rank);
  cluster_clock_.assign(components_ + most_barriers, 0);
  std::vector<Warp*> warps;
  for (auto& block : blocks_) {
    for (auto& thread : block->threads) {
      thread->clock.assign(components_ + most_barriers, 0);
      thread->clock[thread->component] = 1;
      if (!(thread->stack = stacks.take())) fail({}, "no memory for the stacks");
    }
    for (auto& warp : block->warps) warps.push_back(warp.get());
  }
  // Some seeds take turns, some choose anew each time, some let the same warps go first as long as they can.
  enum { turns, at_random, priorities } policy = static_cast<decltype(policy)>(settings_.seed % 3);
  size_t next = 0;
  while (true) {
    Warp* chosen = nullptr;
    auto is_ready = [](Warp* w) {
      return std::any_of(w->threads.begin(), w->threads.end(), [](Thread* t) { return t->ready && !t->done; });
    };
    size_t start = policy == at_random ? random_() % warps.size() : policy == turns ? next : 0;
    for (size_t i = 0; i < warps.size(); ++i) {
      Warp* warp = warps[(start + i) % warps.size()];
      if (!is_ready(warp)) continue;
      if (policy != priorities) {
        chosen = warp;
        next = (start + i + 1) % warps.size();
        break;
      }
      if (!chosen || warp->priority > chosen->priority) chosen = warp;
    }
    if (chosen) {
      for (Thread* thread : chosen->threads)
        if (thread->ready && !thread->done) resume(*thread);
      if (!pending_.empty() && chance(4)) {
        auto operation = pending_[random_() % pending_.size()];
        if (operation->mode == Operation::any) step(*operation);
      }
      if (policy == priorities && chance(64)) chosen->priority = static_cast<int>(random_() % 1024);
      continue;
    }
    bool all_done = true;
    for (auto& block : blocks_)
      for (auto& thread : block->threads) all_done &= thread->done;
    if (all_done) break;
    on_demand();
  }
  finish_cluster();
}

void Machine::resume(Thread& thread) {
  current_ = &thread;
  thread.ready = false;
  if (thread.started) {
    switch_context(scheduler_, thread.context);
  } else {
    thread.started = true;
    static thread_local ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    if (_setjmp(scheduler_) == 0) setcontext(&context);
  }
  current_ = nullptr;
  if (failed_) {
    stacks.free = stacks.all;
    throw Failed{};
  }
}

void Machine::enter() {
  Machine& m = *running;
  m.run_(m.params_, m.block().shared);
  m.mismatch_at_exit(m.self());
  m.self().done = true;
  --m.self().warp->live_lanes;
  _longjmp(m.scheduler_, 1);
}

void Machine::block_on(Wait wait, const Where& where) {
  Thread& thread = self();
  thread.wait = wait;
  thread.where = where;
  switch_context(thread.context, scheduler_);
  thread.wait = {};
}

void Machine::fail(const Where& where, const std::string& message, Thread* thread) {
  if (!thread) thread = current_ ? current_ : acting_;
  if (!failed_) {
    report_ = text("%s: ", kernel_.name.c_str());
    if (thread)
      report_ += text("block %d, warp %d, lane %d: ", thread->block->index, thread->index / lanes, thread->lane);
    report_ += describe(where) + ": " + message;
  }
  failed_ = true;
  if (!current_) {
    stacks.free = stacks.all;
    throw Failed{};
  }
  _longjmp(scheduler_, 1);
}

// ---- collectives ----

void Machine::collective(const char* what, const Where& where, uint64_t in, void* pointer, Act act) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  Collective& c = warp.collective;
  if (warp.live_lanes != lanes) fail(where, text("%s needs the whole warp, but lanes of it have exited", what));
  if (c.present && (strcmp(c.what, what) || !same_line(c.where, where)))
    fail(where,
         text("divergent warp: %s here, while other lanes are in %s at %s", what, c.what, describe(c.where).c_str()));
  c.what = what;
  c.where = where;
  c.present |= 1u << thread.lane;
  c.in[thread.lane] = in;
  c.pointers[thread.lane] = pointer;
  if (c.present == 0xffffffff) {
    act(warp, c);
    c.present = 0;
    ++c.generation;
    double time = 0;
    for (Thread* t : warp.threads) time = std::max(time, t->time);
    for (Thread* t : warp.threads) t->time = time + 1;
    for (Thread* t : warp.threads)
      if (t != &thread) wake(t);
  } else {
    uint64_t generation = c.generation;
    while (c.generation == generation) block_on({.kind = Wait::warp, .what = what}, where);
  }
}

Clock Machine::join_lanes(Warp& warp) {
  Clock joined = warp.threads[0]->clock;
  uint32_t epoch = 0;
  for (Thread* t : warp.threads) {
    join(joined, t->clock);
    epoch = std::max(epoch, t->clock[t->component]);
  }
  for (Thread* t : warp.threads) {
    t->clock = joined;
    t->clock[t->component] = epoch + 1;  // the same for all, so that their reads can be noted as one
  }
  return joined;
}

void Machine::release(Thread& thread) { ++thread.clock[thread.component]; }

int thread_index() { return machine().self().index; }
int block_index() { return machine().block().index; }
int grid_size() { return machine().grid_; }
int cluster_rank() { return machine().block().rank; }

uint32_t shfl(uint32_t value, int lane, Where where) {
  Machine& m = machine();
  m.collective("shfl.sync", where, value | uint64_t(lane & 31) << 32, nullptr, [](Warp&, Collective& c) {
    for (int i = 0; i < lanes; ++i) c.out[i] = static_cast<uint32_t>(c.in[c.in[i] >> 32]);
  });
  return static_cast<uint32_t>(m.collective_result());
}

uint32_t ballot(bool predicate, Where where) {
  Machine& m = machine();
  m.collective("vote.sync", where, predicate, nullptr, [](Warp&, Collective& c) {
    uint32_t all = 0;
    for (int i = 0; i < lanes; ++i) all |= uint32_t(c.in[i] & 1) << i;
    c.out.fill(all);
  });
  return static_cast<uint32_t>(m.collective_result());
}

void syncwarp(Where where) {
  machine().collective("bar.warp.sync", where, 0, nullptr, [](Warp& w, Collective&) { machine().join_lanes(w); });
}

bool elect(Where where) {
  Machine& m = machine();
  m.collective("elect.sync", where, 0, nullptr, [](Warp&, Collective& c) {
    c.out.fill(0);
    c.out[0] = 1;
  });
  return m.collective_result();
}

void setmaxnreg(int registers, bool increase, Where where) {
  Machine& m = machine();
  const char* what = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  Block& block = m.block();
  Warp& warp = *m.self().warp;
  if (!m.kernel_.registers) fail(where, "setmaxnreg in a kernel that does not name its registers at launch");
  if (increase ? registers < warp.registers : registers > warp.registers)
    fail(where, text("%s to %d, but the warp has %d", what, registers, warp.registers));
  m.collective(what, where, registers, nullptr, [](Warp&, Collective&) {});
  if (m.self().lane == 0) {
    int more = (registers - warp.registers) * lanes;
    while (more > block.free_registers)
      m.block_on({.kind = Wait::registers, .detail = uint32_t(registers), .what = what}, where);
    block.free_registers -= more;
    warp.registers = registers;
    for (auto& thread : block.threads)
      if (thread->wait.kind == Wait::registers) m.wake(thread.get());
  }
  m.collective(what, where, registers, nullptr, [](Warp&, Collective&) {});
}

// ---- asynchronous operations ----

Operation::Mode Machine::mode(bool tensor_cores) {
  // Bit 0: the copy engine is late, bit 1: the tensor cores are.
  if (settings_.seed < 4) return settings_.seed >> (tensor_cores ? 1 : 0) & 1 ? Operation::late : Operation::early;
  switch (random_() % 3) {
    case 0:
      return Operation::early;
    case 1:
      return Operation::late;
    default:
      return Operation::any;
  }
}

void Machine::start(std::shared_ptr<Operation> operation) {
  if (operation->mode == Operation::early) {
    finish(*operation);
    return;
  }
  pending_.push_back(std::move(operation));
}

namespace {

bool waits_for_copies(const Thread& thread) {
  return thread.wait.kind == Wait::bulk || thread.wait.kind == Wait::cp_async;
}

bool is_waited_for(const Operation& operation) {
  if (operation.warp)
    return std::any_of(operation.warp->threads.begin(), operation.warp->threads.end(),
                       [](Thread* t) { return t->wait.kind == Wait::wgmma; });
  return operation.barrier ? !operation.barrier->waiting.empty() : waits_for_copies(*operation.thread);
}

}  // namespace

void Machine::step(Operation& operation) {
  if (operation.done()) return;
  if (operation.warp) {  // the tensor cores do a warp's operations in order
    finish(operation);
    return;
  }
  auto next = std::move(operation.steps.front());
  operation.steps.erase(operation.steps.begin());
  acting_ = operation.thread;
  next();
  acting_ = nullptr;
  if (waits_for_copies(*operation.thread)) wake(operation.thread);
  if (operation.done()) std::erase_if(pending_, [&](auto& o) { return o->done(); });
}

void Machine::finish(Operation& operation, int steps_left) {
  if (operation.warp) {
    while (!operation.done()) {
      auto first = operation.warp->in_order.front();
      operation.warp->in_order.pop_front();
      auto next = std::move(first->steps.front());
      first->steps.clear();
      next();
    }
    for (Thread* thread : operation.warp->threads)
      if (thread->wait.kind == Wait::wgmma) wake(thread);
    std::erase_if(pending_, [&](auto& o) { return o->done(); });
    return;
  }
  while (static_cast<int>(operation.steps.size()) > steps_left) step(operation);
}

// Nobody can run: something that somebody waits for happens, the latest that it can.
void Machine::on_demand() {
  std::vector<std::shared_ptr<Operation>> wanted;
  for (auto& operation : pending_)
    if (is_waited_for(*operation)) wanted.push_back(operation);
  if (wanted.empty()) deadlock();
  step(*wanted[random_() % wanted.size()]);
}

void Machine::deadlock() {
  std::string all;
  Thread* first = nullptr;
  for (auto& block : blocks_)
    for (auto& warp : block->warps) {
      std::string last;
      for (Thread* t : warp->threads) {
        if (t->done) continue;
        if (!first) first = t;
        std::string waits = text("%s at %s", t->wait.what, describe(t->where).c_str());
        if (t->wait.kind == Wait::mbarrier) {
          Mbarrier& b = *t->wait.barrier;
          waits += text(" (barrier %#x, parity %u: in phase %u, %ld arrivals and %ld bytes are missing)", b.address,
                        t->wait.detail, b.phase, long(b.pending), long(b.bytes));
        } else if (t->wait.kind == Wait::bar) {
          NamedBarrier& n = block->named[t->wait.detail];
          waits += text(" (barrier %u: %d of %d threads have come)", t->wait.detail, n.arrived, n.expected);
        } else if (t->wait.kind == Wait::registers) {
          waits += text(" (to %u: %d registers are free)", t->wait.detail, block->free_registers);
        }
        if (waits != last) all += text("\n  block %d, warp %d: ", block->index, t->index / lanes) + waits;
        last = waits;
      }
    }
  fail(first ? first->where : Where{}, "deadlock; " + std::string("waiting:") + all, first);
}

void Machine::mismatch_at_exit(Thread& thread) {
  for (auto& operation : pending_)
    if (operation->thread == &thread && !operation->warp && operation->barrier == nullptr &&
        static_cast<int>(operation->steps.size()) > operation->steps_after_read)
      fail(operation->where, text("%s is in flight when its thread exits", operation->what));
  if (thread.warp->collective.present)
    fail(thread.warp->collective.where,
         text("divergent warp: lane %d exits while others wait in %s", thread.lane, thread.warp->collective.what));
  if (!thread.warp->in_order.empty() || !thread.warp->open_group.empty())
    fail(thread.where, "a thread exits with wgmma in flight or in no group");
}

void Machine::finish_cluster() {
  for (auto& operation : std::vector(pending_)) {
    if (operation->barrier)
      fail(operation->where, text("%s is in flight when its block exits", operation->what), operation->thread);
    finish(*operation);
  }
  pending_.clear();
  for (auto& block : blocks_) {
    for (size_t g = 0; g < block->warpgroups.size(); ++g) {
      Warpgroup& group = block->warpgroups[g];
      for (size_t w = 4 * g + 1; w < 4 * g + 4 && w < block->warps.size(); ++w) {
        Warp &first = *block->warps[4 * g], &other = *block->warps[w];
        if (other.issued != first.issued)
          fail(other.threads[0]->where,
               text("divergent warpgroup: its warps issued %zu and %zu wgmma", first.issued, other.issued),
               other.threads[0]);
        if (other.registers != first.registers)
          fail(other.threads[0]->where,
               text("divergent warpgroup: setmaxnreg gave its warps %d and %d registers", first.registers,
                    other.registers),
               other.threads[0]);
      }
      counts_.idle[g] += group.idle;
      counts_.tensor_cycles += group.tensor;
    }
    for (size_t i = 0; i < block->named.size(); ++i) {
      NamedBarrier& named = block->named[i];
      if (named.arrived)
        fail(named.where,
             text("the block exits with %d of %d threads arrived at barrier %zu", named.arrived, named.expected, i),
             named.last);
    }
    for (auto& warp : block->warps)
      for (BankLine& line : warp->bank_lines) close(line);
    double end = 0;
    for (auto& thread : block->threads) {
      end = std::max(end, thread->time);
      stacks.free.push_back(thread->stack);
    }
    counts_.cycles += end;
  }
}

// ---- bank conflicts ----

void Machine::count_banks(uint32_t address, int bytes, const Where& where) {
  constexpr size_t most_open = 8192;  // a line that not all lanes ever come to is not followed further
  Thread& thread = self();
  auto& lines = thread.warp->bank_lines;
  size_t at = site(where);
  if (lines.size() <= at) lines.resize(at + 1);
  BankLine& line = lines[at];
  if (line.accesses.size() == most_open) close(line);
  uint32_t& execution = line.executions[thread.lane];
  execution = std::max(execution, line.counted);
  uint32_t i = execution++ - line.counted;
  if (i == line.accesses.size()) {
    line.accesses.emplace_back();
    ++line.open;
  }
  BankAccess& access = line.accesses[i];
  access.present |= 1u << thread.lane;
  access.address[thread.lane] = address;
  access.bytes = bytes;
  if (access.present == 0xffffffff && --line.open == 0) close(line);
}

void Machine::close(BankLine& line) {
  for (const BankAccess& access : line.accesses) count_banks(access);
  line.counted += line.accesses.size();
  line.accesses.clear();
  line.open = 0;
}

void Machine::count_banks(const BankAccess& access) {
  constexpr int banks = 32;
  // Words of one bank in one go; wider accesses are done by 16 or 8 lanes at a time.
  int together = access.bytes >= 16 ? 8 : access.bytes == 8 ? 16 : 32;
  for (int first = 0; first < lanes; first += together) {
    std::array<std::array<uint32_t, lanes>, banks> words;  // that are wanted of each bank
    std::array<int, banks> wanted{};
    for (int i = first; i < first + together; ++i) {
      if (!(access.present >> i & 1)) continue;
      for (uint32_t a = access.address[i] / 4; a <= (access.address[i] + access.bytes - 1) / 4; ++a) {
        auto begin = words[a % banks].begin(), end = begin + wanted[a % banks];
        if (std::find(begin, end, a) == end) *end = a, ++wanted[a % banks];
      }
    }
    int most = *std::max_element(wanted.begin(), wanted.end());
    if (most) counts_.shared_accesses += 1, counts_.bank_conflicts += most - 1;
  }
}

void Machine::count_matrix_banks(const Collective& c, int matrices) {
  for (int matrix = 0; matrix < matrices; ++matrix) {
    std::array<int, 8> columns{};  // of 16 bytes
    for (int row = 0; row < 8; ++row) ++columns[c.in[matrix * 8 + row] / 16 % 8];
    counts_.shared_accesses += 1;
    counts_.bank_conflicts += *std::max_element(columns.begin(), columns.end()) - 1;
  }
}

uint16_t Machine::site(const Where& where) {
  auto [found, is_new] = site_of_.try_emplace({where.file_name(), where.line()}, sites_.size());
  if (is_new) sites_.push_back(where);
  return found->second;
}

std::string Machine::describe_site(uint16_t site) const { return describe(sites_[site]); }

}  // namespace jaxkern::cuda::sim
