// Products on the matrix unit (cpu/amx.h). An e4m3 is exact as a bfloat16, so FP8 operands go in as they are, and their
// scales multiply the sums over each 128 of k.
// scales multiply the sums over each 128 of k.
#pragma once

#ifdef JAXKERN_LEVEL_avx512

#include <immintrin.h>

#include "cpu/amx.h"
#include "cpu/gemm.h"
#include "cpu/gemm_pack.h"
#include "cpu/simd.h"

namespace jaxkern::cpu::JAXKERN_LEVEL {
namespace {

constexpr int64_t kAmxMinRows = 5;     // of a; fewer are faster without
constexpr int64_t kTile = 16;          // rows of a tile
constexpr int64_t kTileK = 32;         // of k in a tile
constexpr int64_t kTileBytes = 64;     // of a row of a tile
constexpr int64_t kAmxRows = 32;       // of b at a time: two tiles
constexpr int64_t kAmxBlockRows = 64;  // of b packed at a time
constexpr int64_t kAmxBlockK = 1024;   // of k at a time, a multiple of kScaleBlock
constexpr int64_t kAmxRowStride = kAmxBlockK + 32;

// 32 elements as bfloat16.
JAXKERN_INLINE __m512i load_bf16(const bf16* p) { return _mm512_loadu_si512(p); }

// Normal codes need another exponent bias only; those with the smallest and the largest exponent (denormals, NaN) come
// from a table.
JAXKERN_INLINE __m512i load_bf16(const e4m3* p) {
  const __m512i table = _mm512_set_epi64(0x7fc043e043d043c0, 0x43b043a043904380, 0, 0, 0, 0,  //
                                         0x3c603c403c203c00, 0x3bc03b803b000000);
  __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(0x7f0));
  __m512i value = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
  __mmask32 special = _mm512_testn_epi16_mask(_mm512_add_epi16(code, _mm512_set1_epi16(8)), _mm512_set1_epi16(0x70));
  value = _mm512_mask_permutexvar_epi16(value, special, code, table);
  return _mm512_ternarylogic_epi32(value, code, _mm512_set1_epi16(int16_t(0x8000)), 0xf8);  // value | (code & sign)
}

// The first n, n < 32; the others are zero.
template <typename T>
JAXKERN_INLINE __m512i load_bf16_lanes(const T* p, int64_t n) {
  if (n >= kTileK) return load_bf16(p);
  T buffer[kTileK] = {};
  if (n > 0) std::memcpy(buffer, p, n * sizeof(T));
  return load_bf16(buffer);
}

JAXKERN_INLINE bool can_amx(const Operand& o) { return !o.transposed && o.type != DType::f32; }

// ---- a, as what the tiles of b are multiplied with: panels of 16 rows [k / 2][16][2], then scales [k / 128][16] ----

int64_t amx_padded_k(const Segment& s) { return ceil_div(s.k, kTileK) * kTileK; }
int64_t amx_panel_floats(const Segment& s) { return kTile * amx_padded_k(s) / 2 + kTile * ceil_div(s.k, kScaleBlock); }
bf16* amx_panel(const Segment& s, float* packed, int64_t panel) {
  return reinterpret_cast<bf16*>(packed + panel * amx_panel_floats(s));
}
float* amx_panel_scales(const Segment& s, float* packed, int64_t panel) {
  return packed + panel * amx_panel_floats(s) + kTile * amx_padded_k(s) / 2;
}

template <typename A>
void amx_pack_panel(const Segment& s, int64_t panel, int64_t begin, int64_t end, float* packed) {
  const A* a = static_cast<const A*>(s.a.data);
  int64_t row = panel * kTile, rows = min(kTile, s.m - row);
  bf16* to = amx_panel(s, packed, panel);
  for (int64_t k = begin; k < end; k += kTileK) {
    f32v square[kLanes];  // of pairs
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
      square[r] = r < rows ? (f32v)load_bf16_lanes(a + (row + r) * s.a.stride + k, end - k) : f32v{};
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) store_raw(to + k * kTile + i * kTileK, square[i]);
  }
  float* scales = amx_panel_scales(s, packed, panel);
  for (int64_t k = begin; k < end; k += kScaleBlock)
    for (int r = 0; r < kTile; ++r)
      scales[k / kScaleBlock * kTile + r] = !s.a.scales ? 1.0f : r < rows ? scale_at(s.a, row + r, k) : 0.0f;
}

// ---- b by tiles ----

// Rows [row, row + rows) of b, k [k0, k0 + kc), as [rows rounded up to kAmxRows][kAmxRowStride]. The rows are too short
// for the hardware to fetch them ahead.
template <typename B>
void amx_pack_rows(const Operand& b, int64_t row, int64_t rows, int64_t k0, int64_t kc, bf16* to) {
  for (int64_t r = 0; r < ceil_div(rows, kAmxRows) * kAmxRows; ++r) {
    const B* x = static_cast<const B*>(b.data) + (row + r) * b.stride + k0;
    for (int64_t i = 0; i < kc; i += kTileK) {
      if (i % (64 / int64_t(sizeof(B))) == 0) __builtin_prefetch(x + i + 2 * b.stride);
      _mm512_storeu_si512(to + r * kAmxRowStride + i, r < rows ? load_bf16_lanes(x + i, kc - i) : __m512i{});
    }
  }
}

// Tiles 0 to 3 += b [2 tiles of rows] a^T [kPanels panels], over k [0, kc).
template <int kPanels>
JAXKERN_INLINE void amx_multiply(const bf16* b, const bf16* a, int64_t panel_stride, int64_t kc) {
  for (int64_t i = 0; i < kc; i += kTileK) {
    JAXKERN_TILE_LOAD(4, b + i, kAmxRowStride * 2);
    JAXKERN_TILE_LOAD(6, a + i * kTile, kTileBytes);
    JAXKERN_TILE_LOAD(5, b + kTile * kAmxRowStride + i, kAmxRowStride * 2);
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
    JAXKERN_TILE_STORE(1, c + kAmxRows * kTile, kTileBytes);
    JAXKERN_TILE_STORE(3, c + kAmxRows * kTile + kTile * kTile, kTileBytes);
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
        JAXKERN_TILE_LOAD(1, c + kAmxRows * kTile, kTileBytes);
        JAXKERN_TILE_LOAD(3, c + kAmxRows * kTile + kTile * kTile, kTileBytes);
      }
    }
    amx_multiply<kPanels>(b, a, panel_stride, kc);
    amx_store<kPanels>(c);
    return;
  }
  alignas(64) float part[kPanels * kAmxRows * kTile];
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
      for (int r = 0; r < kAmxRows; ++r) {
        int at = (panel * kAmxRows + r) * kTile;
        f32v sum = first ? f32v{} : load(c + at);
        store(c + at, sum + load(part + at) * (scale * splat(b_scales[k / kScaleBlock * kAmxRows + r])));
      }
    }
    first = false;
  }
}

// c [blocks of 32 rows][panels][32][16] of out^T, for the rows [row, row + rows) of b, at most kAmxBlockRows.
template <typename B>
void amx_outer(const Segment& s, int64_t row, int64_t rows, float* packed, float* c) {
  constexpr bool kScaled = std::is_same_v<B, e4m3>;
  bf16* b = static_cast<bf16*>(scratch(kAmxBlockRows * kAmxRowStride * sizeof(bf16), 0));
  float b_scales[kAmxBlockRows / kAmxRows][kAmxBlockK / kScaleBlock * kAmxRows] = {};
  int64_t panels = ceil_div(s.m, kTile), stride = amx_panel_floats(s) * 2;
  for (int64_t k0 = 0; k0 < s.k; k0 += kAmxBlockK) {
    int64_t kc = min(kAmxBlockK, s.k - k0);
    amx_pack_rows<B>(s.b, row, rows, k0, kc, b);
    if constexpr (kScaled) {
      for (int64_t k = 0; k < kc; k += kScaleBlock)
        for (int64_t r = 0; r < rows; ++r)
          b_scales[r / kAmxRows][k / kScaleBlock * kAmxRows + r % kAmxRows] = scale_at(s.b, row + r, k0 + k);
    }
    for (int64_t panel = 0; panel < panels; panel += 2) {
      const bf16* a = amx_panel(s, packed, panel) + k0 * kTile;
      const float* a_scales = amx_panel_scales(s, packed, panel) + k0 / kScaleBlock * kTile;
      for (int64_t block = 0; block * kAmxRows < rows; ++block) {
        const bf16* b_block = b + block * kAmxRows * kAmxRowStride;
        float* to = c + (block * panels + panel) * kAmxRows * kTile;
        if (panel + 1 < panels)
          amx_block<2, kScaled>(b_block, a, stride, kc, k0 == 0, a_scales, b_scales[block], to);
        else
          amx_block<1, kScaled>(b_block, a, stride, kc, k0 == 0, a_scales, b_scales[block], to);
      }
    }
  }
}

}  // namespace
}  // namespace jaxkern::cpu::JAXKERN_LEVEL

#endif
