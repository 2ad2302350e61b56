// The copy engine, cp.async and st.async.
#include <algorithm>

#include "cuda/sim/machine.h"

namespace jaxkern::cuda::sim {
namespace {

// The model of speed: what a copy takes from its start, in cycles.
constexpr double latency_cycles = 600, bytes_per_cycle = 48;

double copy_end(Block& block, const Thread& thread, int bytes) {
  double start = std::max(thread.time, block.copy_engine_free);
  block.copy_engine_free = start + bytes / bytes_per_cycle;
  return block.copy_engine_free + latency_cycles;
}

// Bits 4 to 6 of the address are XORed with bits 7 to 9, as many of them as the swizzle has.
uint32_t swizzled(uint32_t address, int swizzle) { return address ^ (address >> 3 & ((1 << swizzle) - 1) << 4); }

int box_bytes(const TensorMap& map) {
  int bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

int64_t extent(const TensorMap& map) {
  int64_t bytes = map.sizes[0] * map.element_bytes;
  for (int i = 1; i < map.rank; ++i) bytes += (map.sizes[i] - 1) * map.strides[i];
  return bytes;
}

// For each row of the box: its offset in shared memory, its elements inside the tensor and their offset in it.
template <typename F>
void for_rows(const TensorMap& map, const std::array<int, 3>& at, F&& f) {
  int planes = map.rank == 3 ? map.box[2] : 1;
  int row_bytes = map.box[0] * map.element_bytes;
  for (int plane = 0; plane < planes; ++plane)
    for (int row = 0; row < map.box[1]; ++row) {
      int64_t y = int64_t(at[1]) + row, z = int64_t(at[2]) + plane;
      bool inside = y >= 0 && y < map.sizes[1] && (map.rank < 3 || (z >= 0 && z < map.sizes[2]));
      int64_t begin = std::clamp<int64_t>(at[0], 0, map.sizes[0]);
      int64_t end = std::clamp<int64_t>(int64_t(at[0]) + map.box[0], 0, map.sizes[0]);
      if (!inside) end = begin;
      int64_t offset = begin * map.element_bytes + y * map.strides[1] + (map.rank == 3 ? z * map.strides[2] : 0);
      f((plane * map.box[1] + row) * row_bytes, int(begin - at[0]) * map.element_bytes,
        int(end - begin) * map.element_bytes, offset);
    }
}

void check_box(const TensorMap& map, const int* at, int rank, uint32_t address, const char* what, const Where& where) {
  if (map.rank != rank) fail(where, text("%s of rank %d with a tensor map of rank %d", what, rank, map.rank));
  // To an H200 this is an illegal instruction; the ISA does not tell.
  if (at[0] * map.element_bytes % 16)
    fail(where, text("%s from element %d of the innermost axis, no multiple of 16 bytes", what, at[0]));
  int alignment = map.swizzle ? 128 << map.swizzle : 128;
  if (address % alignment)
    fail(where, text("%s at shared %#x is not aligned to %d bytes, as its swizzle needs", what, address, alignment));
}

std::shared_ptr<Operation> operation(const char* what, const Where& where) {
  Machine& m = machine();
  auto o = std::make_shared<Operation>();
  o->mode = m.mode(false);
  o->thread = &m.self();
  o->where = where;
  o->what = what;
  return o;
}

// A copy into shared memory that counts its bytes on a barrier.
void start_load(const char* what, Block& block, uint32_t address, int bytes, Mbarrier& barrier, const Where& where,
                std::function<void(uint8_t*)> fill) {
  Machine& m = machine();
  if (bytes <= 0 || bytes % 16) fail(where, text("%s of %d bytes, no multiple of 16", what, bytes));
  if (barrier.block != &block) fail(where, text("%s with a barrier of another block", what));
  m.at(block, address, bytes, 16, what, where);
  m.check_initialised(barrier, true, where);
  m.check_write(block, address, bytes, m.self(), what, where);
  m.set_in_flight(block, address, bytes, true, where);
  auto o = operation(what, where);
  o->barrier = &barrier;
  double end = copy_end(block, m.self(), bytes);
  o->steps.push_back([=, &m, &block, &barrier] {
    m.set_in_flight(block, address, bytes, false, where);
    fill(block.shared);
    m.note_write(block, address, bytes, barrier.component, barrier.phase + 1, 0, true, where);
    m.complete_bytes(barrier, bytes, end, where);
  });
  m.start(o);
}

// A copy out of shared memory: read first, written later.
void start_store(const char* what, uint32_t address, int bytes, const Where& where,
                 std::function<void(const std::vector<uint8_t>&)> write) {
  Machine& m = machine();
  Thread& thread = m.self();
  Block& block = m.block();
  if (bytes <= 0 || bytes % 16) fail(where, text("%s of %d bytes, no multiple of 16", what, bytes));
  m.at(block, address, bytes, 16, what, where);
  m.check_read(block, address, bytes, thread, true, what, where);
  uint16_t line = m.site(where);
  m.add_readers(block, address, bytes, 1, line);
  copy_end(block, thread, bytes);
  auto o = operation(what, where);
  o->block = &block;
  o->address = address;
  o->bytes = bytes;
  o->steps_after_read = 1;
  auto staged = std::make_shared<std::vector<uint8_t>>();
  o->steps.push_back([=, &m, &block] {
    const uint8_t* source = block.shared + (address - shared_base);
    staged->assign(source, source + bytes);
    m.add_readers(block, address, bytes, -1, line);
  });
  o->steps.push_back([=] { write(*staged); });
  thread.bulk.push_back(o);
  m.start(o);
}

}  // namespace

std::string tensor_map(TensorMap& map, const void* base, int element_bytes, bool is_bfloat16, const int64_t* sizes,
                       const int64_t* strides, const int* box, int rank, int swizzle) {
  map = {};
  map.base = static_cast<uint8_t*>(const_cast<void*>(base));
  map.element_bytes = element_bytes;
  map.is_bfloat16 = is_bfloat16;
  map.rank = rank;
  map.swizzle = swizzle;
  map.strides[0] = element_bytes;
  // What cuTensorMapEncodeTiled refuses.
  if (reinterpret_cast<uintptr_t>(base) % 16) return "tensor map: the base is not aligned to 16 bytes";
  for (int i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (sizes[i] < 1 || sizes[i] > int64_t(1) << 32) return text("tensor map: size %ld of axis %d", long(sizes[i]), i);
    if (box[i] < 1 || box[i] > 256) return text("tensor map: a box of %d along axis %d", box[i], i);
    if (i == 0) continue;
    map.strides[i] = strides[i - 1];
    if (strides[i - 1] % 16 || strides[i - 1] < 0 || strides[i - 1] >= int64_t(1) << 40)
      return text("tensor map: stride %ld of axis %d is no multiple of 16 below 2^40", long(strides[i - 1]), i);
  }
  int row = box[0] * element_bytes;
  if (row % 16) return text("tensor map: rows of %d bytes, no multiple of 16", row);
  if (swizzle && row != 16 << swizzle)
    return text("tensor map: rows of %d bytes with a swizzle of %d", row, 16 << swizzle);
  return {};
}

void tensor_load(uint32_t destination, const TensorMap& map, const int* at, int rank, uint32_t barrier, uint16_t blocks,
                 Where where) {
  Machine& m = machine();
  check_box(map, at, rank, destination, "cp.async.bulk.tensor", where);
  std::array<int, 3> corner{at[0], at[1], rank == 3 ? at[2] : 0};
  if (blocks >> m.blocks_.size())
    fail(where, text("multicast to blocks %#x of a cluster of %zu", blocks, m.blocks_.size()));
  for (int rank = 0; rank < static_cast<int>(m.blocks_.size()); ++rank) {
    Block& block = *m.blocks_[rank];
    if (blocks ? !(blocks >> rank & 1) : &block != &m.block()) continue;
    uint32_t address = destination, barrier_address = uint32_t(rank + 1) << rank_shift | barrier;
    uint32_t in_block = uint32_t(rank + 1) << rank_shift | destination;
    m.locate(in_block, where);
    start_load("cp.async.bulk.tensor", block, address, box_bytes(map), m.mbarrier(barrier_address, where), where,
               [=, &m](uint8_t* shared) {
                 for_rows(map, corner, [&](int row, int skip, int bytes, int64_t offset) {
                   int row_bytes = map.box[0] * map.element_bytes;
                   const uint8_t* source = bytes ? map.base + offset : nullptr;
                   for (int b = 0; b < row_bytes; b += 16) {
                     uint8_t* chunk = shared + (swizzled(address + row + b, map.swizzle) - shared_base);
                     for (int i = 0; i < 16; ++i) {
                       bool inside = b + i >= skip && b + i < skip + bytes;
                       chunk[i] = inside ? source[b + i - skip] : 0;
                     }
                   }
                 });
               });
  }
  // A multicast reads global memory once.
  for_rows(map, corner, [&](int, int, int bytes, int64_t offset) {
    if (bytes) m.global(map.base, extent(map), offset, bytes, false, where);
  });
}

void tensor_store(const TensorMap& map, const int* at, int rank, uint32_t source, bool add, Where where) {
  Machine& m = machine();
  const char* what = add ? "cp.reduce.async.bulk.tensor" : "cp.async.bulk.tensor";
  check_box(map, at, rank, source, what, where);
  if (add && map.element_bytes == 1) fail(where, "cp.reduce.async.bulk.tensor.add of bytes");
  std::array<int, 3> corner{at[0], at[1], rank == 3 ? at[2] : 0};
  if (std::min({corner[0], corner[1], corner[2]}) < 0)  // an illegal instruction to an H200
    fail(where, text("%s to the negative coordinates %d, %d, %d", what, corner[0], corner[1], corner[2]));
  for_rows(map, corner, [&](int, int, int bytes, int64_t) {
    if (bytes % 16)  // an H200 writes all 16
      fail(where, text("%s over the end of rows of %ld elements, no multiple of 16 bytes", what, long(map.sizes[0])));
  });
  start_store(what, source, box_bytes(map), where, [=, &m](const std::vector<uint8_t>& staged) {
    for_rows(map, corner, [&](int row, int skip, int bytes, int64_t offset) {
      if (!bytes) return;
      uint8_t* destination = m.global(map.base, extent(map), offset, bytes, true, where);
      for (int b = 0; b < bytes; b += map.element_bytes) {
        uint32_t from = swizzled(source + row + skip + b, map.swizzle) - source;
        if (!add) {
          memcpy(destination + b, &staged[from], map.element_bytes);
        } else if (map.is_bfloat16) {
          uint16_t x, y;
          memcpy(&x, destination + b, 2);
          memcpy(&y, &staged[from], 2);
          x = to_bfloat16(unbits<float>(uint32_t(x) << 16) + unbits<float>(uint32_t(y) << 16));
          memcpy(destination + b, &x, 2);
        } else {
          float x, y;
          memcpy(&x, destination + b, 4);
          memcpy(&y, &staged[from], 4);
          x += y;
          memcpy(destination + b, &x, 4);
        }
      }
    });
  });
}

void bulk_load(uint32_t destination, const void* base, int64_t size, int64_t offset, uint32_t bytes, uint32_t barrier,
               Where where) {
  Machine& m = machine();
  const uint8_t* source = m.global(base, size, offset, bytes, false, where);
  if (reinterpret_cast<uintptr_t>(source) % 16) fail(where, "cp.async.bulk from global memory not aligned to 16 bytes");
  start_load("cp.async.bulk", m.block(), destination, bytes, m.mbarrier(barrier, where), where,
             [=](uint8_t* shared) { memcpy(shared + (destination - shared_base), source, bytes); });
}

void bulk_store(void* base, int64_t size, int64_t offset, uint32_t source, uint32_t bytes, Where where) {
  Machine& m = machine();
  uint8_t* destination = m.global(base, size, offset, bytes, true, where);
  if (reinterpret_cast<uintptr_t>(destination) % 16)
    fail(where, "cp.async.bulk to global memory not aligned to 16 bytes");
  start_store("cp.async.bulk", source, bytes, where,
              [=](const std::vector<uint8_t>& staged) { memcpy(destination, staged.data(), bytes); });
}

void bulk_copy(uint32_t destination, uint32_t source, uint32_t bytes, uint32_t barrier, Where where) {
  Machine& m = machine();
  Block &from = m.block(), &to = m.locate(destination, where);
  m.at(from, source, bytes, 16, "cp.async.bulk", where);
  m.check_read(from, source, bytes, m.self(), true, "cp.async.bulk", where);
  uint16_t line = m.site(where);
  m.add_readers(from, source, bytes, 1, line);
  start_load("cp.async.bulk", to, destination, bytes, m.mbarrier(barrier, where), where,
             [=, &m, &from](uint8_t* shared) {
               memcpy(shared + (destination - shared_base), from.shared + (source - shared_base), bytes);
               m.add_readers(from, source, bytes, -1, line);
             });
}

void bulk_commit_group(Where) {
  Thread& thread = machine().self();
  thread.bulk_groups.push_back(std::move(thread.bulk));
  thread.bulk.clear();
}

void bulk_wait_group(int pending, bool read, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  const char* what = read ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group";
  int groups = static_cast<int>(thread.bulk_groups.size()) - pending;
  for (int g = 0; g < groups; ++g)
    for (auto& o : thread.bulk_groups[g]) {
      while (static_cast<int>(o->steps.size()) > (read ? o->steps_after_read : 0))
        m.block_on({.kind = Wait::bulk, .what = what}, where);
      if (!o->read_awaited) m.note_read(*o->block, o->address, o->bytes, thread);
      o->read_awaited = true;
    }
  while (!thread.bulk_groups.empty() &&
         std::all_of(thread.bulk_groups.front().begin(), thread.bulk_groups.front().end(),
                     [](auto& o) { return o->done(); }))
    thread.bulk_groups.erase(thread.bulk_groups.begin());
}

void cp_async(uint32_t destination, const void* base, int64_t size, int64_t offset, int bytes, bool valid,
              Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  Block& block = m.block();
  m.at(block, destination, bytes, bytes, "cp.async", where);
  m.check_write(block, destination, bytes, thread, "cp.async", where);
  const uint8_t* source = valid ? m.global(base, size, offset, bytes, false, where) : nullptr;
  if (reinterpret_cast<uintptr_t>(source) % bytes) fail(where, text("cp.async is not aligned to %d bytes", bytes));
  m.set_in_flight(block, destination, bytes, true, where);
  m.count_banks(destination, bytes, where);
  auto o = operation("cp.async", where);
  o->block = &block;
  o->address = destination;
  o->bytes = bytes;
  uint32_t epoch = thread.clock[thread.component], fences = thread.fences;
  o->steps.push_back([=, &m, &block, &thread] {
    m.set_in_flight(block, destination, bytes, false, where);
    uint8_t* to = block.shared + (destination - shared_base);
    if (source)
      memcpy(to, source, bytes);
    else
      memset(to, 0, bytes);
    m.note_write(block, destination, bytes, thread.component, epoch, fences, false, where);
  });
  thread.copies.push_back(o);
  m.start(o);
}

void cp_async_commit_group(Where) {
  Thread& thread = machine().self();
  thread.copy_groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void cp_async_wait_group(int pending, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  while (static_cast<int>(thread.copy_groups.size()) > pending) {
    for (auto& o : thread.copy_groups.front()) {
      while (!o->done()) m.block_on({.kind = Wait::cp_async, .what = "cp.async.wait_group"}, where);
      // Others may read it once they hear from this thread after this wait; or have already, through a barrier.
      if (!o->published)
        m.note_write(*o->block, o->address, o->bytes, thread.component, thread.clock[thread.component], thread.fences,
                     false, o->where);
    }
    thread.copy_groups.erase(thread.copy_groups.begin());
  }
  thread.time += 1;
}

void cp_async_mbarrier_arrive(uint32_t address, Where where) {
  Machine& m = machine();
  Thread& thread = m.self();
  Mbarrier& barrier = m.mbarrier(address, where);
  m.check_initialised(barrier, false, where);
  auto before = thread.copies;
  for (auto& group : thread.copy_groups) before.insert(before.end(), group.begin(), group.end());
  for (auto& copy : before) copy->published = true;
  auto o = operation("cp.async.mbarrier.arrive", where);
  o->barrier = &barrier;
  double end = thread.time + latency_cycles;
  o->steps.push_back([=, &m, &barrier, clock = thread.clock] {
    for (auto& copy : before) m.finish(*copy);
    m.arrive(barrier, clock, end, where);
  });
  m.release(thread);
  // It counts the copies so far; later ones and waits are not concerned with those that it has finished.
  std::erase_if(thread.copies, [](auto& c) { return c->done(); });
  m.start(o);
}

void st_async(uint32_t address, uint32_t value, uint32_t barrier_address, Where where) {
  Machine& m = machine();
  Mbarrier& barrier = m.mbarrier(barrier_address, where);
  Block& block = m.locate(address, where);
  if (barrier.block != &block) fail(where, "st.async with a barrier of another block than its destination");
  m.at(block, address, 4, 4, "st.async", where);
  m.check_initialised(barrier, true, where);
  m.check_write(block, address, 4, m.self(), "st.async", where);
  m.set_in_flight(block, address, 4, true, where);
  auto o = operation("st.async", where);
  o->barrier = &barrier;
  double end = m.self().time + 200;
  o->steps.push_back([=, &m, &block, &barrier] {
    m.set_in_flight(block, address, 4, false, where);
    memcpy(block.shared + (address - shared_base), &value, 4);
    m.note_write(block, address, 4, barrier.component, barrier.phase + 1, 0, true, where);
    m.complete_bytes(barrier, 4, end, where);
  });
  m.start(o);
}

}  // namespace jaxkern::cuda::sim
