// Shared and global memory: every access of a kernel goes through here, so that the simulator sees it.
//
// Shared memory is the members of a kernel's `Smem`:
//   Shared<T>       one element, for load and store
//   Tile<bytes>     bytes that the copy engine and the tensor cores work on, aligned for 128-byte swizzles
//   Barrier         cuda/arch/barrier.h
// Global memory is a `Global<T>`, a pointer that knows its end.
#pragma once

#include "cuda/arch/base.h"
#include "cuda/arch/number.h"

namespace jaxkern::cuda {

template <typename T>
class alignas(sizeof(T)) Shared {
  T value;  // reached through `load` and `store`
};

// The swizzle works on absolute address bits 4 to 9, so a tile starts at a multiple of 1024 bytes.
template <int bytes>
struct alignas(1024) Tile {
  uint8_t data[bytes];
};

template <typename T>
struct Global {
  T* data;
  int64_t size;  // elements
};

// Neighbouring elements that are loaded or stored at once.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T item[count];
};

// cvta.to.shared: the address in the shared window of this block. PTX 9.7.9.20.
DEVICE uint32_t shared_address(const void* pointer) {
  PTX(return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));)
  SIM(return sim::shared_address(pointer);)
}

// mapa: the same place in another block of the cluster. PTX 9.7.9.23.
DEVICE uint32_t mapa(uint32_t address, int rank) {
  PTX(uint32_t other; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(address), "r"(rank));
      return other;)
  SIM(return sim::mapa(address, rank);)
}
DEVICE uint32_t mapa(const void* pointer, int rank) { return mapa(shared_address(pointer), rank); }

// ld.shared, st.shared. PTX 9.7.9.8, 9.7.9.11. By address for tiles, by name for everything else.
template <typename T>
DEVICE T load_shared(uint32_t address AND_WHERE) {
  PTX(return *static_cast<const T*>(__cvta_shared_to_generic(address));)
  SIM(T value; sim::load_shared(&value, address, sizeof(T), where); return value;)
}

template <typename T>
DEVICE void store_shared(uint32_t address, T value AND_WHERE) {
  PTX(*static_cast<T*>(__cvta_shared_to_generic(address)) = value;)
  SIM(sim::store_shared(address, &value, sizeof(T), where);)
}

template <typename T>
DEVICE T load(const Shared<T>& x AND_WHERE) {
  PTX(return *reinterpret_cast<const T*>(&x);)
  SIM(return load_shared<T>(shared_address(&x), where);)
}

template <typename T>
DEVICE void store(Shared<T>& x, T value AND_WHERE) {
  PTX(*reinterpret_cast<T*>(&x) = value;)
  SIM(store_shared(shared_address(&x), value, where);)
}

// `x` must be aligned for all of them.
template <int count, typename T>
DEVICE Pack<T, count> load_pack(const Shared<T>& x AND_WHERE) {
  PTX(return *reinterpret_cast<const Pack<T, count>*>(&x);)
  SIM(return load_shared<Pack<T, count>>(shared_address(&x), where);)
}

// ld.shared::cluster, st.shared::cluster: another block's variable. Only between two cluster barriers.
// PTX 9.7.9.8, 9.7.9.11.
template <int count, typename T>
DEVICE Pack<T, count> load_cluster(const Shared<T>& x, int rank AND_WHERE) {
  static_assert(sizeof(Pack<T, count>) == 8);
  PTX(uint64_t bits; asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(mapa(&x, rank)) : "memory");
      Pack<T, count> value; memcpy(&value, &bits, 8); return value;)
  SIM(return load_shared<Pack<T, count>>(mapa(&x, rank), where);)
}

template <typename T>
DEVICE void store_cluster(Shared<T>& x, int rank, T value AND_WHERE) {
  static_assert(sizeof(T) == 4);
  PTX(uint32_t bits; memcpy(&bits, &value, 4);
      asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(mapa(&x, rank)), "r"(bits) : "memory");)
  SIM(store_shared(mapa(&x, rank), value, where);)
}

// ld.global, st.global of `count` neighbouring elements; element i is the first. PTX 9.7.9.8, 9.7.9.11.
template <typename V, typename T>
DEVICE V load_global(Global<const T> x, int64_t i AND_WHERE) {
  PTX(return *reinterpret_cast<const V*>(x.data + i);)
  SIM(V value; sim::load_global(&value, x.data, x.size * sizeof(T), i * sizeof(T), sizeof(V), where); return value;)
}

template <typename V, typename T>
DEVICE void store_global(Global<T> x, int64_t i, V value AND_WHERE) {
  PTX(*reinterpret_cast<V*>(x.data + i) = value;)
  SIM(sim::store_global(x.data, x.size * sizeof(T), i * sizeof(T), &value, sizeof(V), where);)
}

// ldmatrix, stmatrix: 8 x 8 matrices of 16-bit elements between shared memory and fragments. Lane 8 i + r gives the
// address of row r of matrix i; a lane gets of each matrix the pair (row lane / 4, columns 2 (lane % 4) and one more),
// or of its transpose. PTX 9.7.14.5.15 and 9.7.14.5.16.
template <int matrices, bool transposed>
DEVICE void ldmatrix(uint32_t (&fragment)[matrices], uint32_t address AND_WHERE) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
#ifndef JAXKERN_SIM
#define LDMATRIX(form, registers, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8." form ".shared.b16 {" registers : __VA_ARGS__ : "r"(address) : "memory");
#define EITHER_WAY(form, ...)            \
  if constexpr (transposed) {            \
    LDMATRIX(form ".trans", __VA_ARGS__) \
  } else {                               \
    LDMATRIX(form, __VA_ARGS__)          \
  }
  if constexpr (matrices == 1) {
    EITHER_WAY("x1", "%0}, [%1];", "=r"(fragment[0]))
  } else if constexpr (matrices == 2) {
    EITHER_WAY("x2", "%0, %1}, [%2];", "=r"(fragment[0]), "=r"(fragment[1]))
  } else {
    EITHER_WAY("x4", "%0, %1, %2, %3}, [%4];", "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]),
               "=r"(fragment[3]))
  }
#undef EITHER_WAY
#undef LDMATRIX
#endif
  SIM(sim::ldmatrix(fragment, matrices, transposed, address, where);)
}

template <int matrices, bool transposed>
DEVICE void stmatrix(uint32_t address, const uint32_t (&fragment)[matrices] AND_WHERE) {
  static_assert(matrices == 1 || matrices == 2 || matrices == 4);
#ifndef JAXKERN_SIM
#define STMATRIX(form, registers, ...)                                                 \
  asm volatile("stmatrix.sync.aligned.m8n8." form ".shared.b16 [%0], {" registers "};" \
               :                                                                       \
               : "r"(address), __VA_ARGS__                                             \
               : "memory");
#define EITHER_WAY(form, ...)            \
  if constexpr (transposed) {            \
    STMATRIX(form ".trans", __VA_ARGS__) \
  } else {                               \
    STMATRIX(form, __VA_ARGS__)          \
  }
  if constexpr (matrices == 1) {
    EITHER_WAY("x1", "%1", "r"(fragment[0]))
  } else if constexpr (matrices == 2) {
    EITHER_WAY("x2", "%1, %2", "r"(fragment[0]), "r"(fragment[1]))
  } else {
    EITHER_WAY("x4", "%1, %2, %3, %4", "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]))
  }
#undef EITHER_WAY
#undef STMATRIX
#endif
  SIM(sim::stmatrix(fragment, matrices, transposed, address, where);)
}

}  // namespace jaxkern::cuda
