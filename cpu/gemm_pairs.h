// Products of pairs of bfloat16, on the matrix unit (cpu/amx.h) or by vdpbf16ps. An e4m3 is exact as a bfloat16, so FP8
// operands go in as they are, and their scales multiply the sums over each 128 of k.
#pragma once

#ifdef JAXKERN_LEVEL_avx512

#include <immintrin.h>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/gemm_pack.h"
#include "cpu/pairs.h"
#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kAmxMinRows = 5, kPairsMinRows = 13;  // of a; fewer are faster as dot products
constexpr int64_t kTile = 16;                           // rows of a tile
constexpr int64_t kTileK = 32;                          // of k in a tile
constexpr int64_t kTileBytes = 64;                      // of a row of a tile
constexpr int64_t kPairsRows = 32;                      // of b at a time: two tiles
constexpr int64_t kPairsBlockRows = 64;                 // of b packed at a time
constexpr int64_t kPairsBlockK = 1024;                  // of k at a time, a multiple of kScaleBlock
constexpr int64_t kPairsRowStride = kPairsBlockK + 32;

JAXKERN_INLINE bool is_paired(const Operand& o) { return !o.transposed && o.type != DType::f32; }

// ---- few rows: dot products ----

// 64 elements. Of e4m3, x[0] gets the first half of each 16 and x[1] the other: what is cheapest.
JAXKERN_INLINE void load_pairs(const bf16* p, __m512i (&x)[2]) {
  x[0] = load_bf16(p);
  x[1] = load_bf16(p + 32);
}

JAXKERN_INLINE void load_pairs(const e4m3* p, __m512i (&x)[2]) { to_bf16(_mm512_loadu_si512(p), x); }

// As dot_rows, for an a of bfloat16 and a_scales [blocks of k][m].
template <typename B, int kRows>
void dot_pairs(const bf16* a, int64_t m, const float* a_scales, const Operand& b, int64_t k0, int64_t k1, f32v* total,
               Codes&) {
  constexpr int kChains = kRows <= 3 ? 4 : kRows <= 8 ? 2 : 1;
  for (int64_t k = k0; k < k1; k += kScaleBlock, a += m * kScaleBlock, a_scales += m) {
    const B* x = static_cast<const B*>(b.data) + k;
    f32v part[kRows][kChains] = {};
    auto step = [&](const B* x, int64_t i, int chain) __attribute__((always_inline)) {
      __m512i y[2];
      load_pairs(x, y);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
          part[r][(chain + v) % kChains] = add_product(part[r][(chain + v) % kChains], (u32v)y[v],
                                                       (u32v)load_bf16(a + r * kScaleBlock + i + v * 32));
    };
    if (k1 - k >= kScaleBlock) {
      prefetch_block(x);
      step(x, 0, 0);
      step(x + 64, 64, 2);
    } else {
      for (int64_t i = 0; i < k1 - k; i += 64) {
        B piece[64] = {};
        std::memcpy(piece, x + i, min(64, k1 - k - i) * sizeof(B));
        step(piece, i, 0);
      }
    }
    float scale = b.scales ? scale_at(b, 0, k) : 1.0f;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) part[r][0] += part[r][chain];
      total[r] += part[r][0] * splat(scale * a_scales[r]);
    }
  }
}

// Its a: [k / kScaleBlock][m][kScaleBlock], each row in the order of load_pairs of b.
template <typename A>
void pack_dot_pairs(const Segment& s, int64_t k0, int64_t k1, bf16* to, float* scales) {
  for (int64_t k = k0; k < k1; k += kScaleBlock)
    for (int64_t r = 0; r < s.m; ++r) {
      const A* x = static_cast<const A*>(s.a.data) + r * s.a.stride + k;
      bf16* block = to + k * s.m + r * kScaleBlock;
      for (int64_t i = 0; i < kScaleBlock; i += 64) {
        alignas(64) bf16 row[64];
        for (int64_t j = 0; j < 64; j += 32) _mm512_store_si512(row + j, load_bf16_lanes(x + i + j, k1 - k - i - j));
        if (s.b.type == DType::e4m3) {
          for (int half = 0; half < 2; ++half)
            for (int j = 0; j < 4; ++j)
              std::memcpy(block + i + half * 32 + j * 8, row + j * 16 + half * 8, 8 * sizeof(bf16));
        } else {
          std::memcpy(block + i, row, sizeof(row));
        }
      }
      scales[k / kScaleBlock * s.m + r] = s.a.scales ? scale_at(s.a, r, k) : 1.0f;
    }
}

// ---- a, as what the tiles of b are multiplied with: panels of 16 rows [k / 2][16][2], then scales [k / 128][16] ----

int64_t pairs_padded_k(const Segment& s) { return ceil_div(s.k, kTileK) * kTileK; }
int64_t pairs_panel_floats(const Segment& s) {
  return kTile * pairs_padded_k(s) / 2 + kTile * ceil_div(s.k, kScaleBlock);
}
bf16* pairs_panel(const Segment& s, float* packed, int64_t panel) {
  return reinterpret_cast<bf16*>(packed + panel * pairs_panel_floats(s));
}
float* pairs_panel_scales(const Segment& s, float* packed, int64_t panel) {
  return packed + panel * pairs_panel_floats(s) + kTile * pairs_padded_k(s) / 2;
}

template <typename A>
void pack_pairs_panel(const Segment& s, int64_t panel, int64_t begin, int64_t end, float* packed) {
  const A* a = static_cast<const A*>(s.a.data);
  int64_t row = panel * kTile, rows = min(kTile, s.m - row);
  bf16* to = pairs_panel(s, packed, panel);
  for (int64_t k = begin; k < end; k += kTileK) {
    f32v square[kLanes];  // of pairs
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
      square[r] = r < rows ? (f32v)load_bf16_lanes(a + (row + r) * s.a.stride + k, end - k) : f32v{};
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) store_raw(to + k * kTile + i * kTileK, square[i]);
  }
  float* scales = pairs_panel_scales(s, packed, panel);
  for (int64_t k = begin; k < end; k += kScaleBlock)
    for (int r = 0; r < kTile; ++r)
      scales[k / kScaleBlock * kTile + r] = !s.a.scales ? 1.0f : r < rows ? scale_at(s.a, row + r, k) : 0.0f;
}

// ---- b by tiles ----

// Rows [row, row + rows) of b, k [k0, k0 + kc), as [rows rounded up to kPairsRows][kPairsRowStride]. The rows are too
// short for the hardware to fetch them ahead.
template <typename B>
void pack_pairs_rows(const Operand& b, int64_t row, int64_t rows, int64_t k0, int64_t kc, bf16* to) {
  for (int64_t r = 0; r < ceil_div(rows, kPairsRows) * kPairsRows; ++r) {
    const B* x = static_cast<const B*>(b.data) + (row + r) * b.stride + k0;
    for (int64_t i = 0; i < kc; i += kTileK) {
      if (i % (64 / int64_t(sizeof(B))) == 0) __builtin_prefetch(x + i + 2 * b.stride);
      _mm512_storeu_si512(to + r * kPairsRowStride + i, r < rows ? load_bf16_lanes(x + i, kc - i) : __m512i{});
    }
  }
}

// Tiles 0 to 3 += b [2 tiles of rows] a^T [kPanels panels], over k [0, kc).
template <int kPanels>
JAXKERN_INLINE void amx_multiply(const bf16* b, const bf16* a, int64_t panel_stride, int64_t kc) {
  for (int64_t i = 0; i < kc; i += kTileK) {
    JAXKERN_TILE_LOAD(4, b + i, kPairsRowStride * 2);
    JAXKERN_TILE_LOAD(6, a + i * kTile, kTileBytes);
    JAXKERN_TILE_LOAD(5, b + kTile * kPairsRowStride + i, kPairsRowStride * 2);
    JAXKERN_TILE_PRODUCT(0, 4, 6);
    JAXKERN_TILE_PRODUCT(2, 5, 6);
    if constexpr (kPanels == 2) {
      JAXKERN_TILE_LOAD(7, a + panel_stride + i * kTile, kTileBytes);
      JAXKERN_TILE_PRODUCT(1, 4, 7);
      JAXKERN_TILE_PRODUCT(3, 5, 7);
    }
  }
}

template <int kPanels>
JAXKERN_INLINE void amx_store(float* c) {  // [kPanels][32][16]
  JAXKERN_TILE_STORE(0, c, kTileBytes);
  JAXKERN_TILE_STORE(2, c + kTile * kTile, kTileBytes);
  if constexpr (kPanels == 2) {
    JAXKERN_TILE_STORE(1, c + kPairsRows * kTile, kTileBytes);
    JAXKERN_TILE_STORE(3, c + kPairsRows * kTile + kTile * kTile, kTileBytes);
  }
}

// c [kPanels][32][16] += b a^T, or = for the first of k. With scales, those of a are [k / 128][16] for each panel and
// those of b [k / 128][32].
template <int kPanels, bool kScaled>
void amx_block(const bf16* b, const bf16* a, int64_t panel_stride, int64_t kc, bool first, const float* a_scales,
               const float* b_scales, float* c) {
  if constexpr (!kScaled) {
    if (first) {
      JAXKERN_TILE_ZERO(0);
      JAXKERN_TILE_ZERO(1);
      JAXKERN_TILE_ZERO(2);
      JAXKERN_TILE_ZERO(3);
    } else {
      JAXKERN_TILE_LOAD(0, c, kTileBytes);
      JAXKERN_TILE_LOAD(2, c + kTile * kTile, kTileBytes);
      if constexpr (kPanels == 2) {
        JAXKERN_TILE_LOAD(1, c + kPairsRows * kTile, kTileBytes);
        JAXKERN_TILE_LOAD(3, c + kPairsRows * kTile + kTile * kTile, kTileBytes);
      }
    }
    amx_multiply<kPanels>(b, a, panel_stride, kc);
    amx_store<kPanels>(c);
    return;
  }
  alignas(64) float part[kPanels * kPairsRows * kTile];
  for (int64_t k = 0; k < kc; k += kScaleBlock) {
    JAXKERN_TILE_ZERO(0);
    JAXKERN_TILE_ZERO(1);
    JAXKERN_TILE_ZERO(2);
    JAXKERN_TILE_ZERO(3);
    amx_multiply<kPanels>(b + k, a + k * kTile, panel_stride, min(kScaleBlock, kc - k));
    amx_store<kPanels>(part);
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      f32v scale = load(a_scales + panel * panel_stride / 2 + k / kScaleBlock * kTile);
#pragma GCC unroll 4
      for (int r = 0; r < kPairsRows; ++r) {
        int at = (panel * kPairsRows + r) * kTile;
        f32v sum = first ? f32v{} : load(c + at);
        store(c + at, sum + load(part + at) * (scale * splat(b_scales[k / kScaleBlock * kPairsRows + r])));
      }
    }
    first = false;
  }
}

// As amx_block, without the unit.
template <int kPanels, bool kScaled>
void pairs_block(const bf16* b, const bf16* a, int64_t panel_stride, int64_t kc, bool first, const float* a_scales,
                 const float* b_scales, float* c) {
  constexpr int kRows = 16 / kPanels;  // of b at a time
  for (int64_t k = 0; k < kc; k += kScaleBlock) {
    int64_t end = min(kScaleBlock, kc - k);
    f32v scales[kPanels];
    for (int panel = 0; panel < kPanels; ++panel)
      scales[panel] = kScaled ? load(a_scales + panel * panel_stride / 2 + k / kScaleBlock * kTile) : splat(1.0f);
    for (int64_t row = 0; row < kPairsRows; row += kRows) {
      const bf16 *p = b + row * kPairsRowStride + k, *q = a + k * kTile;
      f32v sums[kRows][kPanels] = {};
      for (int64_t i = 0; i < end; i += 2) {
        __m512i x[kPanels];
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel)
          x[panel] = _mm512_loadu_si512(q + panel * panel_stride + i * kTile);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int panel = 0; panel < kPanels; ++panel)
            sums[r][panel] = add_product(sums[r][panel], (u32v)x[panel],
                                         (u32v)_mm512_set1_epi32(load_raw<int32_t>(p + r * kPairsRowStride + i)));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float scale = kScaled ? b_scales[k / kScaleBlock * kPairsRows + row + r] : 1.0f;
#pragma GCC unroll 2
        for (int panel = 0; panel < kPanels; ++panel) {
          float* to = c + (panel * kPairsRows + row + r) * kTile;
          store(to, (first ? f32v{} : load(to)) + sums[r][panel] * (scales[panel] * splat(scale)));
        }
      }
    }
    first = false;
  }
}

// c [blocks of 32 rows][panels][32][16] of out^T, for the rows [row, row + rows) of b, at most kPairsBlockRows.
template <typename B, bool kAmx>
void pairs_outer(const Segment& s, int64_t row, int64_t rows, float* packed, float* c) {
  constexpr bool kScaled = std::is_same_v<B, e4m3>;
  bf16* b = static_cast<bf16*>(scratch(kPairsBlockRows * kPairsRowStride * sizeof(bf16), 0));
  float b_scales[kPairsBlockRows / kPairsRows][kPairsBlockK / kScaleBlock * kPairsRows] = {};
  int64_t panels = ceil_div(s.m, kTile), stride = pairs_panel_floats(s) * 2;
  for (int64_t k0 = 0; k0 < s.k; k0 += kPairsBlockK) {
    int64_t kc = min(kPairsBlockK, s.k - k0);
    pack_pairs_rows<B>(s.b, row, rows, k0, kc, b);
    if constexpr (kScaled) {
      for (int64_t k = 0; k < kc; k += kScaleBlock)
        for (int64_t r = 0; r < rows; ++r)
          b_scales[r / kPairsRows][k / kScaleBlock * kPairsRows + r % kPairsRows] = scale_at(s.b, row + r, k0 + k);
    }
    for (int64_t panel = 0; panel < panels; panel += 2) {
      const bf16* a = pairs_panel(s, packed, panel) + k0 * kTile;
      const float* a_scales = pairs_panel_scales(s, packed, panel) + k0 / kScaleBlock * kTile;
      for (int64_t block = 0; block * kPairsRows < rows; ++block) {
        const bf16* b_block = b + block * kPairsRows * kPairsRowStride;
        float* to = c + (block * panels + panel) * kPairsRows * kTile;
        auto multiply = panel + 1 < panels ? (kAmx ? amx_block<2, kScaled> : pairs_block<2, kScaled>)
                                           : (kAmx ? amx_block<1, kScaled> : pairs_block<1, kScaled>);
        multiply(b_block, a, stride, kc, k0 == 0, a_scales, b_scales[block], to);
      }
    }
  }
}

}  // namespace
}  // namespace jaxkern::cpu::JAXKERN_LEVEL

#endif
