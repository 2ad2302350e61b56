// What every CPU handler needs: XLA's thread pool as cpu::Threads, and dtypes.
#pragma once

#include "bindings/check.h"
#include "cpu/threads.h"
#include "cpu/types.h"

namespace jaxkern {

// XLA's pool lent to a kernel. The caller works too, so a pool whose threads are all busy only costs speed.
cpu::Threads threads_of(ffi::ThreadPool& pool);

// The kernels' name of a dtype. Only for dtypes that a Check let pass.
cpu::DType dtype_of(ffi::DataType type);

// What a CPU handler is bound to: XLA's thread pool, operands, results.
template <int operands, int results>
auto signature(Operands<operands>, Results<results>) {
  return add_buffers<operands, results>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>());
}

}  // namespace jaxkern
