// The copy engine: tensor and bulk copies between global and shared memory, and cp.async.
#pragma once

#include <string>

#include "cuda/arch/barrier.h"

#ifndef JAXKERN_SIM
#include <cuda.h>  // for types alone; the driver is found at run time
#endif

namespace jaxkern::cuda {

// A tensor in global memory, for copies of boxes. In a kernel's Params, as grid constants.
#ifdef JAXKERN_SIM
using TensorMap = sim::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

enum class Element { uint8, bfloat16, float32 };

// How 16-byte chunks of a box's rows are permuted in shared memory, and with it the length of a row: 32, 64 or 128
// bytes; without, up to 256 elements.
enum class Swizzle { none, bytes_32, bytes_64, bytes_128 };

// A map over `base`, sizes and box from the innermost axis out. `strides` are in bytes, of the axes but the innermost.
// What a box holds beyond the tensor reads as zero and is not written. Returns why it cannot be; empty if it can.
template <int rank>
std::string tensor_map(TensorMap& map, const void* base, Element element, const int64_t (&sizes)[rank],
                       const int64_t (&strides)[rank - 1], const int (&box)[rank], Swizzle swizzle);

// prefetch.tensormap. PTX 9.7.9.15.
DEVICE void prefetch_tensormap(const TensorMap& map) {
  PTX(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");)
  SIM(static_cast<void>(map);)
}

// cp.async.bulk.tensor: the box of `map` at `at` (innermost first) into shared memory; its bytes, also of what lies
// beyond the tensor, are counted on `barrier`. By one thread. at[0] must be a multiple of 16 bytes. PTX 9.7.9.25.5.2.
template <int rank>
DEVICE void cp_async_bulk_tensor(void* destination, const TensorMap& map, const int (&at)[rank],
                                 Barrier& barrier AND_WHERE) {
  static_assert(rank == 2 || rank == 3);
#ifndef JAXKERN_SIM
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(destination)),
        "l"(&map), "r"(at[0]), "r"(at[1]), "r"(shared_address(&barrier))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(destination)),
        "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(&barrier))
        : "memory");
  }
#endif
  SIM(sim::tensor_load(shared_address(destination), map, at, rank, shared_address(&barrier), 0, where);)
}

// The same into each block of the cluster whose bit is set in `blocks`, at the same addresses there.
template <int rank>
DEVICE void cp_async_bulk_tensor_multicast(void* destination, const TensorMap& map, const int (&at)[rank],
                                           Barrier& barrier, uint16_t blocks AND_WHERE) {
  static_assert(rank == 2 || rank == 3);
#ifndef JAXKERN_SIM
  if constexpr (rank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(at[0]), "r"(at[1]), "r"(shared_address(&barrier)), "h"(blocks)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(&barrier)), "h"(blocks)
        : "memory");
  }
#endif
  SIM(sim::tensor_load(shared_address(destination), map, at, rank, shared_address(&barrier), blocks, where);)
}

// cp.async.bulk.tensor from shared memory to the box of `map` at `at`, none of it negative. By one thread;
// bulk_commit_group follows. Where the innermost axis ends inside 16 bytes, all 16 are written.
template <int rank>
DEVICE void cp_async_bulk_tensor_store(const TensorMap& map, const int (&at)[rank], const void* source AND_WHERE) {
  static_assert(rank == 2 || rank == 3);
#ifndef JAXKERN_SIM
  if constexpr (rank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(at[0]),
                 "r"(at[1]), "r"(shared_address(source))
                 : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
                 "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(source))
                 : "memory");
  }
#endif
  SIM(sim::tensor_store(map, at, rank, shared_address(source), false, where);)
}

// cp.reduce.async.bulk.tensor.add: the same, added to what is there. PTX 9.7.9.25.5.3.
template <int rank>
DEVICE void cp_reduce_async_bulk_tensor_add(const TensorMap& map, const int (&at)[rank], const void* source AND_WHERE) {
  static_assert(rank == 2 || rank == 3);
#ifndef JAXKERN_SIM
  if constexpr (rank == 2) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
                 "r"(at[0]), "r"(at[1]), "r"(shared_address(source))
                 : "memory");
  } else {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
        "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(shared_address(source))
        : "memory");
  }
#endif
  SIM(sim::tensor_store(map, at, rank, shared_address(source), true, where);)
}

// cp.async.bulk: `bytes`, a multiple of 16, from x[i] on. PTX 9.7.9.25.4.1.
template <typename T>
DEVICE void cp_async_bulk(void* destination, Global<const T> x, int64_t i, uint32_t bytes, Barrier& barrier AND_WHERE) {
  PTX(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(destination)),
                   "l"(x.data + i), "r"(bytes), "r"(shared_address(&barrier)) : "memory");)
  SIM(sim::bulk_load(shared_address(destination), x.data, x.size * sizeof(T), i * sizeof(T), bytes,
                     shared_address(&barrier), where);)
}

template <typename T>
DEVICE void cp_async_bulk_store(Global<T> x, int64_t i, const void* source, uint32_t bytes AND_WHERE) {
  PTX(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(x.data + i),
                   "r"(shared_address(source)), "r"(bytes) : "memory");)
  SIM(sim::bulk_store(x.data, x.size * sizeof(T), i * sizeof(T), shared_address(source), bytes, where);)
}

// cp.async.bulk from this block's shared memory to the same place in another block of the cluster, where the bytes, a
// multiple of 16, count on the barrier of that place. PTX 9.7.9.25.4.1.
DEVICE void cp_async_bulk_cluster(uint32_t source, uint32_t bytes, Barrier& barrier, int rank AND_WHERE) {
  PTX(asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       mapa(source, rank)),
                   "r"(source), "r"(bytes), "r"(mapa(&barrier, rank)) : "memory");)
  SIM(sim::bulk_copy(mapa(source, rank), source, bytes, mapa(&barrier, rank), where);)
}

// cp.async.bulk.commit_group: makes a group of this thread's stores so far. PTX 9.7.9.25.6.1.
DEVICE void bulk_commit_group(WHERE) {
  PTX(asm volatile("cp.async.bulk.commit_group;" :: : "memory");)
  SIM(sim::bulk_commit_group(where);)
}

// cp.async.bulk.wait_group: until at most `pending` groups of this thread are not complete; `_read`: not yet read from
// shared memory, which may then be written again. PTX 9.7.9.25.6.2.
template <int pending>
DEVICE void bulk_wait_group(WHERE) {
  PTX(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");)
  SIM(sim::bulk_wait_group(pending, false, where);)
}

template <int pending>
DEVICE void bulk_wait_group_read(WHERE) {
  PTX(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");)
  SIM(sim::bulk_wait_group(pending, true, where);)
}

// cp.async: 4, 8 or 16 bytes from x[i] on, or zeros if not `valid`, for which i may be anything. PTX 9.7.9.25.3.1.
template <int bytes, typename T>
DEVICE void cp_async(uint32_t destination, Global<const T> x, int64_t i, bool valid AND_WHERE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#ifndef JAXKERN_SIM
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(x.data + (valid ? i : 0)),
                 "r"(valid ? bytes : 0)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(x.data + (valid ? i : 0)),
                 "n"(bytes), "r"(valid ? bytes : 0)
                 : "memory");
#endif
  SIM(sim::cp_async(destination, x.data, x.size * sizeof(T), i * sizeof(T), bytes, valid, where);)
}

// cp.async.commit_group and cp.async.wait_group. PTX 9.7.9.25.3.2 and 9.7.9.25.3.3.
DEVICE void cp_async_commit_group(WHERE) {
  PTX(asm volatile("cp.async.commit_group;" :: : "memory");)
  SIM(sim::cp_async_commit_group(where);)
}

template <int pending>
DEVICE void cp_async_wait_group(WHERE) {
  PTX(asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");)
  SIM(sim::cp_async_wait_group(pending, where);)
}

// cp.async.mbarrier.arrive.noinc: one of the barrier's expected arrivals, once this thread's copies so far are
// complete. PTX 9.7.13.15.15.
DEVICE void cp_async_mbarrier_arrive(Barrier& barrier AND_WHERE) {
  PTX(asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");)
  SIM(sim::cp_async_mbarrier_arrive(shared_address(&barrier), where);)
}

// ---- on the host ----

#ifdef JAXKERN_SIM

template <int rank>
std::string tensor_map(TensorMap& map, const void* base, Element element, const int64_t (&sizes)[rank],
                       const int64_t (&strides)[rank - 1], const int (&box)[rank], Swizzle swizzle) {
  constexpr int bytes_of[] = {1, 2, 4};
  return sim::tensor_map(map, base, bytes_of[static_cast<int>(element)], element == Element::bfloat16, sizes, strides,
                         box, rank, static_cast<int>(swizzle));
}

#else

template <int rank>
std::string tensor_map(TensorMap& map, const void* base, Element element, const int64_t (&sizes)[rank],
                       const int64_t (&strides)[rank - 1], const int (&box)[rank], Swizzle swizzle) {
  // The driver's function is found through the runtime, so that nothing links to libcuda.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return "the CUDA driver has no cuTensorMapEncodeTiled";
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t driver_sizes[rank], driver_strides[rank - 1];
  cuuint32_t driver_box[rank], element_strides[rank];
  for (int i = 0; i < rank; ++i) {
    driver_sizes[i] = sizes[i];
    driver_box[i] = box[i];
    element_strides[i] = 1;
  }
  for (int i = 0; i < rank - 1; ++i) driver_strides[i] = strides[i];
  CUresult result =
      encode(&map, types[static_cast<int>(element)], rank, const_cast<void*>(base), driver_sizes, driver_strides,
             driver_box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? "" : "cuTensorMapEncodeTiled failed with " + std::to_string(result);
}

#endif

}  // namespace jaxkern::cuda
