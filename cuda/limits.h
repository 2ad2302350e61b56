// What the tables of groups hold.
#pragma once

#include <cstdint>

namespace jaxkern::cuda {

constexpr int64_t most_groups = 1024, most_grouped = (1 << 26) - 1;  // groups, and rows of all of them

}  // namespace jaxkern::cuda
