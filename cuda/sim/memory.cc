// Shared and global memory, and what is known of every byte.
#include <algorithm>
#include <cmath>

#include "cuda/sim/machine.h"

namespace jaxkern::cuda::sim {

// ---- shared memory ----

Block& Machine::locate(uint32_t& address, const Where& where) {
  uint32_t rank = address >> rank_shift;
  address &= (1u << rank_shift) - 1;
  if (rank == 0) return block();
  if (rank > blocks_.size()) fail(where, text("no block of rank %u in this cluster", rank - 1));
  Block& peer = *blocks_[rank - 1];
  if (std::all_of(peer.threads.begin(), peer.threads.end(), [](auto& t) { return t->done; }))
    fail(where, text("block %d of the cluster, whose memory is accessed, has exited", peer.index));
  return peer;
}

uint8_t* Machine::at(Block& block, uint32_t address, int64_t bytes, int alignment, const char* what,
                     const Where& where) {
  if (address < shared_base || address - shared_base + bytes > int64_t(block.words.size()) * 4)
    fail(where, text("%s of %ld bytes at shared %#x, outside the block's %zu bytes", what, long(bytes), address,
                     block.words.size() * 4));
  if (address % alignment) fail(where, text("%s at shared %#x is not aligned to %d bytes", what, address, alignment));
  return block.shared + (address - shared_base);
}

namespace {

// For each word of an access, its bytes in the access and what is known of them: once, or byte by byte if they differ.
template <typename F>
void for_words(Block& block, uint32_t address, int bytes, F f) {
  uint32_t first = address - shared_base;
  for (uint32_t i = first / 4; i <= (first + bytes - 1) / 4; ++i) {
    uint32_t begin = std::max(first, i * 4) - i * 4, end = std::min(first + bytes, i * 4 + 4) - i * 4;
    const Word& word = block.words[i];
    if (!word.is_split) {
      f(word, word, (1 << end) - (1 << begin), i * 4 + shared_base);
      continue;
    }
    auto& parts = block.split[i];
    for (uint32_t b = begin; b < end; ++b) f(word, parts[b], 1 << b, i * 4 + shared_base);
  }
}

}  // namespace

void Machine::check_read(Block& block, uint32_t address, int bytes, Thread& thread, bool by_async_proxy,
                         const char* what, const Where& where) {
  for_words(block, address, bytes, [&](const Word& word, const Word& part, uint8_t mask, uint32_t here) {
    if (word.in_flight)
      fail(
          where,
          text("%s reads shared %#x while the copy from %s is in flight", what, here, describe_site(word.site).c_str()),
          &thread);
    if (word.is_barrier) fail(where, text("%s reads shared %#x, an mbarrier", what, here), &thread);
    if ((part.written & mask) != mask)
      fail(where, text("%s reads shared %#x, which nobody has written", what, here), &thread);
    if (part.component != thread.component && thread.clock[part.component] < part.epoch)
      fail(where,
           text("race: %s reads shared %#x, written at %s, with no barrier between", what, here,
                describe_site(part.site).c_str()),
           &thread);
    if (by_async_proxy && !part.by_copy_engine) {
      Thread* writer = thread_of(part.component);
      if (writer && writer->fences <= part.fences)
        fail(where,
             text("%s reads shared %#x, written at %s with no fence.proxy.async after it", what, here,
                  describe_site(part.site).c_str()),
             &thread);
    }
  });
}

void Machine::check_readers(uint64_t reads, int warp, uint32_t address, Thread& thread, const char* what,
                            const Where& where) {
  int per_block = kernel_.threads / lanes;
  Block& block = *blocks_[warp / per_block];
  for (uint32_t mask = static_cast<uint32_t>(reads); mask; mask &= mask - 1) {
    Thread& reader = *block.warps[warp % per_block]->threads[__builtin_ctz(mask)];
    if (&reader != &thread && thread.clock[reader.component] < reads >> 32)
      fail(where,
           text("race: %s over shared %#x, which warp %d of block %d reads, with no barrier between", what, address,
                warp % per_block, block.index),
           &thread);
  }
}

void Machine::check_write(Block& block, uint32_t address, int bytes, Thread& thread, const char* what,
                          const Where& where) {
  uint32_t first = address - shared_base, end = first + bytes;
  for (uint32_t i = first / 16; i <= (end - 1) / 16; ++i) {
    if (block.readers[i])
      fail(where,
           text("%s over shared %#x while the operation from %s may still read it", what, i * 16 + shared_base,
                describe_site(block.reader_sites[i]).c_str()),
           &thread);
    const uint64_t* reads = &block.reads[size_t(i) * warps_];
    for (int w = 0; w < warps_; ++w)
      if (reads[w]) check_readers(reads[w], w, i * 16 + shared_base, thread, what, where);
  }
  for (uint32_t begin = first; begin < end;) {
    uint32_t page = begin / page_bytes, stop = std::min(end, (page + 1) * page_bytes);
    auto& reads = block.small_reads[page];
    for (int w = 0; !reads.empty() && w < warps_; ++w) {
      uint64_t last = 0;
      for (uint32_t i = begin; i < stop; ++i) {
        uint64_t here = reads[w * page_bytes + i % page_bytes];
        if (here != last) check_readers(here, w, i + shared_base, thread, what, where);
        last = here;
      }
    }
    begin = stop;
  }
  for_words(block, address, bytes, [&](const Word& word, const Word& part, uint8_t mask, uint32_t here) {
    if (word.in_flight)
      fail(where,
           text("%s over shared %#x while the copy from %s is in flight", what, here, describe_site(word.site).c_str()),
           &thread);
    if (word.is_barrier) fail(where, text("%s over shared %#x, an mbarrier", what, here), &thread);
    if (part.written & mask && part.component != thread.component && thread.clock[part.component] < part.epoch)
      fail(where,
           text("race: %s over shared %#x, written at %s, with no barrier between", what, here,
                describe_site(part.site).c_str()),
           &thread);
  });
}

void Machine::note_read(Block& block, uint32_t address, int bytes, Thread& thread) {
  uint32_t first = address - shared_base;
  uint64_t epoch = thread.clock[thread.component], lane = uint64_t(1) << thread.lane;
  auto note = [&](uint64_t& reads) { reads = reads >> 32 == epoch ? reads | lane : epoch << 32 | lane; };
  int warp = thread.warp->index;
  if (bytes >= 16) {
    for (uint32_t i = first / 16; i <= (first + bytes - 1) / 16; ++i) note(block.reads[size_t(i) * warps_ + warp]);
    return;
  }
  auto& page = block.small_reads[first / page_bytes];  // an access is aligned to its size: it lies in one page
  if (page.empty()) page.resize(size_t(warps_) * page_bytes);
  for (int i = 0; i < bytes; ++i) note(page[warp * page_bytes + first % page_bytes + i]);
}

void Machine::note_write(Block& block, uint32_t address, int bytes, int component, uint32_t epoch, uint32_t fences,
                         bool by_copy_engine, const Where& where) {
  uint32_t first = address - shared_base;
  uint16_t line = site(where);
  for (uint32_t i = first / 4; i <= (first + bytes - 1) / 4; ++i) {
    Word& word = block.words[i];
    uint32_t begin = std::max(first, i * 4) - i * 4, end = std::min(first + bytes, i * 4 + 4) - i * 4;
    uint8_t mask = (1 << end) - (1 << begin);
    auto set = [&](Word& w) {
      w.written |= mask;
      w.component = component;
      w.epoch = epoch;
      w.fences = fences;
      w.by_copy_engine = by_copy_engine;
      w.site = line;
    };
    if (mask == 0xf) {
      if (word.is_split) block.split.erase(i);
      word.is_split = false;
    } else if (!word.is_split && word.written & ~mask &&
               (word.component != component || word.epoch != epoch || word.fences != fences)) {
      block.split[i].fill(word);
      word.is_split = true;
    }
    if (word.is_split)
      for (uint32_t b = begin; b < end; ++b) set(block.split[i][b]);
    set(word);
  }
}

void Machine::set_in_flight(Block& block, uint32_t address, int bytes, bool in_flight, const Where& where) {
  uint32_t first = address - shared_base;
  uint16_t line = site(where);
  for (uint32_t i = first / 4; i <= (first + bytes - 1) / 4; ++i) {
    block.words[i].in_flight = in_flight;
    block.words[i].site = line;
  }
  if (in_flight) memset(block.shared + first, 0xff, bytes);
}

void Machine::add_readers(Block& block, uint32_t address, int bytes, int change, uint16_t line) {
  uint32_t first = address - shared_base;
  for (uint32_t i = first / 16; i <= (first + bytes - 1) / 16; ++i) {
    block.readers[i] += change;
    block.reader_sites[i] = line;
  }
}

Thread* Machine::thread_of(int component) {
  if (component >= kernel_.cluster * kernel_.threads) return nullptr;
  return blocks_[component / kernel_.threads]->threads[component % kernel_.threads].get();
}

uint32_t shared_address(const void* pointer) {
  Machine& m = machine();
  auto p = static_cast<const uint8_t*>(pointer);
  for (auto& block : m.blocks_)
    if (p >= block->shared && p < block->shared + block->words.size() * 4) {
      uint32_t address = static_cast<uint32_t>(p - block->shared) + shared_base;
      return block.get() == &m.block() ? address : uint32_t(block->rank + 1) << rank_shift | address;
    }
  fail(Where{}, "cvta.to.shared of a pointer that is not into shared memory");
}

uint32_t mapa(uint32_t address, int rank) {
  return uint32_t(rank + 1) << rank_shift | (address & ((1u << rank_shift) - 1));
}

void load_shared(void* value, uint32_t address, int bytes, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  m.count_banks(address, bytes, where);
  Block& block = m.locate(address, where);
  const uint8_t* source = m.at(block, address, bytes, bytes, "ld.shared", where);
  m.check_read(block, address, bytes, thread, false, "ld.shared", where);
  m.note_read(block, address, bytes, thread);
  memcpy(value, source, bytes);
  thread.time += 1;
}

void store_shared(uint32_t address, const void* value, int bytes, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  m.count_banks(address, bytes, where);
  Block& block = m.locate(address, where);
  uint8_t* destination = m.at(block, address, bytes, bytes, "st.shared", where);
  m.check_write(block, address, bytes, thread, "st.shared", where);
  m.check_accumulators(value, bytes, "st.shared", where);
  m.note_write(block, address, bytes, thread.component, thread.clock[thread.component], thread.fences, false, where);
  memcpy(destination, value, bytes);
  thread.time += 1;
}

void ldmatrix(uint32_t* fragment, int matrices, bool transposed, uint32_t address, Where where) {
  Machine& m = machine();
  m.collective("ldmatrix", where, address, fragment, [&](Warp& warp, Collective& c) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row) {
        Thread& thread = *warp.threads[matrix * 8 + row];
        uint32_t a = static_cast<uint32_t>(c.in[thread.lane]);
        Block& block = m.locate(a, where);
        memcpy(rows[row], m.at(block, a, 16, 16, "ldmatrix", where), 16);
        m.check_read(block, a, 16, thread, false, "ldmatrix", where);
        m.note_read(block, a, 16, thread);
      }
      for (int lane = 0; lane < lanes; ++lane) {
        int row = lane / 4, column = lane % 4 * 2;
        uint32_t low = transposed ? rows[column][row] : rows[row][column];
        uint32_t high = transposed ? rows[column + 1][row] : rows[row][column + 1];
        static_cast<uint32_t*>(c.pointers[lane])[matrix] = low | high << 16;
      }
    }
    m.count_matrix_banks(c, matrices);
  });
}

void stmatrix(const uint32_t* fragment, int matrices, bool transposed, uint32_t address, Where where) {
  Machine& m = machine();
  m.check_accumulators(fragment, matrices * 4, "stmatrix", where);
  m.collective("stmatrix", where, address, const_cast<uint32_t*>(fragment), [&](Warp& warp, Collective& c) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      uint16_t rows[8][8];
      for (int lane = 0; lane < lanes; ++lane) {
        int row = lane / 4, column = lane % 4 * 2;
        uint32_t pair = static_cast<const uint32_t*>(c.pointers[lane])[matrix];
        (transposed ? rows[column][row] : rows[row][column]) = static_cast<uint16_t>(pair);
        (transposed ? rows[column + 1][row] : rows[row][column + 1]) = static_cast<uint16_t>(pair >> 16);
      }
      // Every lane gives data and the address lane's epoch stands for all: they are joined only at the next barrier.
      for (int row = 0; row < 8; ++row) {
        Thread& thread = *warp.threads[matrix * 8 + row];
        uint32_t a = static_cast<uint32_t>(c.in[thread.lane]);
        Block& block = m.locate(a, where);
        uint8_t* destination = m.at(block, a, 16, 16, "stmatrix", where);
        m.check_write(block, a, 16, thread, "stmatrix", where);
        m.note_write(block, a, 16, thread.component, thread.clock[thread.component], thread.fences, false, where);
        memcpy(destination, rows[row], 16);
      }
    }
    m.count_matrix_banks(c, matrices);
  });
}

void fence_proxy_async(Where) { ++machine().self().fences; }
void fence_mbarrier_init(Where) { ++machine().self().init_fences; }

// ---- global memory ----

uint8_t* Machine::global(const void* base, int64_t size, int64_t offset, int64_t bytes, bool write,
                         const Where& where) {
  if (offset < 0 || offset + bytes > size)
    fail(where, text("%s of %ld bytes at byte %ld of a global array of %ld", write ? "write" : "read", long(bytes),
                     long(offset), long(size)));
  Usage& usage = usage_[base];
  size_t chunks = static_cast<size_t>(size + 15) / 16;
  if (usage.touched.size() < (chunks + 7) / 8) usage.touched.resize((chunks + 7) / 8);
  for (int64_t i = offset / 16; i <= (offset + bytes - 1) / 16; ++i) usage.touched[i / 8] |= 1 << i % 8;
  counts_.moved_bytes += bytes;
  return static_cast<uint8_t*>(const_cast<void*>(base)) + offset;
}

void load_global(void* value, const void* base, int64_t size, int64_t offset, int bytes, Where where) {
  Machine& m = machine();
  const uint8_t* source = m.global(base, size, offset, bytes, false, where);
  if (reinterpret_cast<uintptr_t>(source) % bytes) fail(where, text("ld.global is not aligned to %d bytes", bytes));
  memcpy(value, source, bytes);
  m.self().time += 1;
}

void store_global(void* base, int64_t size, int64_t offset, const void* value, int bytes, Where where) {
  Machine& m = machine();
  uint8_t* destination = m.global(base, size, offset, bytes, true, where);
  if (reinterpret_cast<uintptr_t>(destination) % bytes)
    fail(where, text("st.global is not aligned to %d bytes", bytes));
  m.check_accumulators(value, bytes, "st.global", where);
  memcpy(destination, value, bytes);
  m.self().time += 1;
}

// ---- numbers ----

void check_number(float x, Where where) { machine().check_accumulators(&x, 4, "a conversion", where); }

uint32_t to_bfloat16(float x) {
  uint32_t b = bits(x);
  if (x != x) return 0x7fff;
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

uint32_t to_float16(float x) {
  uint32_t sign = bits(x) >> 31 << 15;
  float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint32_t(std::nearbyint(magnitude * 0x1p24f));
  uint32_t b = bits(magnitude);
  b += 0xfff + (b >> 13 & 1);
  return sign | ((b >> 13) - ((127 - 15) << 10));
}

uint32_t to_e4m3(float x) {
  uint32_t sign = bits(x) >> 31 << 7;
  float magnitude = std::fabs(x);
  if (x != x) return 0x7f;
  if (magnitude >= 464) return sign | 0x7e;  // satfinite
  if (magnitude < 0x1p-6f) return sign | uint32_t(std::nearbyint(magnitude * 0x1p9f));
  uint32_t b = bits(magnitude);
  b += 0x7ffff + (b >> 20 & 1);
  uint32_t code = (b >> 20) - ((127 - 7) << 3);
  return sign | (code > 0x7e ? 0x7e : code);
}

float from_e4m3(uint8_t x) {
  int exponent = x >> 3 & 15, mantissa = x & 7;
  float value = exponent == 15 && mantissa == 7 ? __builtin_nanf("")
                : exponent                      ? std::ldexp(8.0f + mantissa, exponent - 10)
                                                : std::ldexp(float(mantissa), -9);
  return x & 0x80 ? -value : value;
}

float from_float16(uint16_t x) {
  uint32_t exponent = x >> 10 & 31, mantissa = x & 1023;
  float value = exponent == 31 ? (mantissa ? __builtin_nanf("") : __builtin_inff())
                : exponent     ? unbits<float>((exponent + 127 - 15) << 23 | mantissa << 13)
                               : mantissa * 0x1p-24f;
  return x & 0x8000 ? -value : value;
}

}  // namespace jaxkern::cuda::sim
