// The matrix unit of Level::amx: 8 tile registers, each 16 rows of 64 bytes. For code compiled at level avx512.
//
// c [16][16] float32 += a [16][32] bfloat16 x b [16][16][2] bfloat16, where b holds the product's 32 x 16 operand with
// the rows 2i and 2i + 1 interleaved. Sums are float32; denormals count as zero.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

// Tile numbers are literals; strides are in bytes. The "memory" clobbers keep ordinary loads and stores in order.
#define JAXKERN_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define JAXKERN_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(int64_t(stride)) : "memory")
#define JAXKERN_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define JAXKERN_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::: "memory")

namespace jaxkern::cpu::JAXKERN_LEVEL {

struct TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Makes all tiles 16 x 64 bytes, and puts back what the thread had before: other libraries use the unit too.
class Tiles {
 public:
  JAXKERN_INLINE Tiles() {
    TileConfig config;
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  JAXKERN_INLINE ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  Tiles(const Tiles&) = delete;

 private:
  TileConfig before_;
};

}  // namespace jaxkern::cpu::JAXKERN_LEVEL
