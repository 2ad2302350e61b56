#include "cpu/kv_cache.h"

#include <cstring>
#include <type_traits>

#include "cpu/fp8.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;  // to write, for a task to be worth its thread

// Where row i of `rows` goes; page -1: nowhere.
struct Slot {
  int64_t page, offset;
};

Slot slot_of(const KvCacheAppendParams& p, int64_t i) {
  int64_t position = p.positions[i];
  if (position < 0 || position >= p.table_pages * p.page) return {-1, 0};
  int64_t page = p.block_table[i / p.tokens * p.table_pages + position / p.page];
  return {page < p.pages ? page : -1, position % p.page};
}

// Which of `tasks` writes this page. Mixed, as the pages of a step may be equally far apart.
int64_t task_of(int64_t page, int64_t tasks) { return (uint32_t(page) * 2654435769u >> 8) % tasks; }

template <typename From, typename To>
void convert(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, n * sizeof(To));
  } else {
    for_each_register(0, n, [&](int64_t i, int64_t lanes) { store_lanes(to + i, load_lanes(from + i, lanes), lanes); });
  }
}

template <typename T>
void pack(const T* from, uint8_t* to, int64_t latent, int64_t width) {
  int64_t blocks = (latent + kBlock - 1) / kBlock;
  uint8_t* scales = to + latent;
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t begin = block * kBlock, end = begin + kBlock < latent ? begin + kBlock : latent;
    u32v largest = {};
    for_each_register(begin, end,
                      [&](int64_t i, int64_t lanes) { largest = larger(largest, load_lanes(from + i, lanes)); });
    float scale = scale_of(largest_of(largest), true);
    std::memcpy(scales + block * sizeof(scale), &scale, sizeof(scale));
    if (scale != scale) {  // one code for NaN, whatever its sign was
      std::memset(to + begin, 0x7f, end - begin);
      continue;
    }
    for_each_register(begin, end, [&](int64_t i, int64_t lanes) {
      store_lanes(reinterpret_cast<e4m3*>(to + i), load_lanes(from + i, lanes) / scale, lanes);
    });
  }
  convert(from + latent, reinterpret_cast<bf16*>(scales + blocks * sizeof(float)), width - latent);
}

template <typename T>
void write(const KvCacheAppendParams& p, int64_t i, Slot slot) {
  const T* from = static_cast<const T*>(p.rows) + i * p.width;
  uint8_t* to = static_cast<uint8_t*>(p.cache) + (slot.page * p.page + slot.offset) * p.row_bytes;
  if (p.packed) return pack(from, to, p.latent, p.width);
  with_float_type(p.cache_type, [&](auto type) { convert(from, reinterpret_cast<decltype(type)*>(to), p.width); });
}

}  // namespace

// A page is one task's, which takes its rows in order: so the later of two rows for one slot wins, and the number of
// tasks does not show.
void kv_cache_append(const KvCacheAppendParams& p, const Threads& threads) {
  int64_t rows = p.batch * p.tokens, worthy = rows * p.row_bytes / kTaskBytes;
  int64_t tasks = worthy < 1 ? 1 : worthy < threads.count() ? worthy : threads.count();
  with_float_type(p.rows_type, [&](auto type) {
    threads.for_each(tasks, [&](int64_t task) {
      for (int64_t i = 0; i < rows; ++i) {
        Slot slot = slot_of(p, i);
        if (slot.page >= 0 && task_of(slot.page, tasks) == task) write<decltype(type)>(p, i, slot);
      }
    });
  });
}

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
