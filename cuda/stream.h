// What a launch function needs of its caller. No CUDA header and no XLA header is needed to include it.
#pragma once

#include <string>

namespace jaxkern::cuda {

// A cudaStream_t; nothing on the simulator.
using Stream = void*;

// Why a launch failed; empty if it did not.
using Error = std::string;

}  // namespace jaxkern::cuda
