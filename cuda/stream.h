// What a launch function needs of its caller. No CUDA header and no XLA header is needed to include it.
#pragma once

#include <initializer_list>
#include <string>

namespace jaxkern::cuda {

// A cudaStream_t; nothing on the simulator.
using Stream = void*;

// Why a launch failed; empty if it did not.
using Error = std::string;

enum class Float { float32, bfloat16, float16 };

// Of several steps.
inline Error first_error(std::initializer_list<Error> errors) {
  for (const Error& error : errors)
    if (!error.empty()) return error;
  return {};
}

}  // namespace jaxkern::cuda
