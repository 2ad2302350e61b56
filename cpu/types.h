// Element types that the kernels read and write.
#pragma once

#include <cstdint>

namespace jaxkern::cpu {

enum class DType { f32, bf16, f16, e4m3, e8m0 };

constexpr int64_t size_of(DType type) {
  return type == DType::f32 ? 4 : type == DType::bf16 || type == DType::f16 ? 2 : 1;
}

// Storage types, so that overloads can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};
struct e8m0 {
  uint8_t bits;
};

}  // namespace jaxkern::cpu
