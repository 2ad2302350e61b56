// Which tile of the result a block computes next, and from what. The kernels are the same for every schedule:
//
//   Batches    out[i] = a[i] b[i]^T, the matrices of a batch one after the other
//   RowGroups  the rows of group i of a, times b[i]^T
//   KGroups    a[:, group i] b[:, group i]^T, the groups along the reduction
//
// Block i takes tiles i, i + grid, ... Sizes of groups are read on the device, so the host waits for nothing; a block
// walks over the groups once, with its tiles.
#pragma once

#include "cuda/gemm/tile.h"
#include "cuda/groups.h"

namespace jaxkern::cuda::kernels {

// One tile of the result.
struct Work {
  int a_batch, b_batch, batch;  // the matrices of a, b and out
  int row, column;
  int row_end;            // the tile's rows from here on are not to be written
  int first_k, k_blocks;  // in blocks of k, of a stage each
  int start;              // the element of k at which block 0 begins; 0 but in a group along k
  int tail;               // elements of k in the last block, of a group along k
};

// A role's way through the block's tiles.
template <typename Walk, typename F>
DEVICE void for_tiles(Walk walk, F&& f) {
  Work w;
  for (int tile = block_index(); walk.find(tile, w); tile += grid_size()) f(w);
}

// Tile `i` of m_tiles x n_tiles, in bands of `band` rows of tiles: what runs at one time shares rows of a and of b in
// L2. `across` tiles in turn lie side by side; n_tiles is a multiple of it.
struct TilePosition {
  int m_tile, n_tile;
};

DEVICE TilePosition tile_position(int i, int m_tiles, int n_tiles, int band, int across) {
  int aside = i % across;
  i /= across;
  n_tiles /= across;
  int first = i / (band * n_tiles) * band;
  int rows = m_tiles - first < band ? m_tiles - first : band;
  int in_band = i - first * n_tiles;
  return {first + in_band % rows, in_band / rows * across + aside};
}

// ---- batches ----

struct Batches {
  static constexpr const char* name = "Batches";
  static constexpr bool tails = false;          // of groups along k
  static constexpr bool edges = false;          // rows of a tile that belong to another group
  static constexpr bool follows_small = false;  // one of several kernels, each for groups of some sizes

  struct Params {
    int batch, b_batch, m, k_blocks;
    int m_tiles, n_tiles, band;
  };
  struct Smem {};

  DEVICE static void prepare(const Params&, Smem&) {}

  template <int tile_m, int tile_n, int across = 1>
  struct Walk {
    const Params& p;
    DEVICE Walk(const Params& p, const Smem&) : p(p) {}

    // Whether there is a tile `i`. Each i is larger than the one before.
    DEVICE bool find(int i, Work& w) {
      int per_batch = p.m_tiles * p.n_tiles, batch = i / per_batch;
      if (batch >= p.batch) return false;
      TilePosition t = tile_position(i % per_batch, p.m_tiles, p.n_tiles, p.band, across);
      w = {batch, p.b_batch == 1 ? 0 : batch, batch, t.m_tile * tile_m, t.n_tile * tile_n, p.m, 0, p.k_blocks, 0, 0};
      return true;
    }
  };
};

// ---- groups ----

struct RowGroups {
  static constexpr const char* name = "RowGroups";
  static constexpr bool tails = false;
  static constexpr bool edges = true;
  static constexpr bool follows_small = true;

  struct Params {
    GroupList groups;  // of rows
    int least, most;   // rows of the groups that this kernel computes
    int k_blocks, n_tiles, band;
  };
  using Smem = GroupTable;

  DEVICE static void prepare(const Params& p, Smem& s) { fill_table(p.groups, s); }

  template <int tile_m, int tile_n, int across = 1>
  struct Walk {
    const Params& p;
    const Smem& s;
    int group = 0, first = 0;  // tile of this group

    DEVICE Walk(const Params& p, const Smem& s) : p(p), s(s) {}

    DEVICE bool find(int i, Work& w) {
      for (; group < p.groups.count; ++group) {
        int size = load(s.size[group]);
        if (size < p.least || size > p.most) continue;
        int m_tiles = ceil_div(size, tile_m), tiles = m_tiles * p.n_tiles;
        if (i < first + tiles) {
          TilePosition t = tile_position(i - first, m_tiles, p.n_tiles, p.band < m_tiles ? p.band : m_tiles, across);
          int start = load(s.start[group]);
          w = {0, group, 0, start + t.m_tile * tile_m, t.n_tile * tile_n, start + size, 0, p.k_blocks, 0, 0};
          return true;
        }
        first += tiles;
      }
      return false;
    }
  };
};

struct KGroups {
  static constexpr const char* name = "KGroups";
  static constexpr bool tails = true;
  static constexpr bool edges = false;
  static constexpr bool follows_small = false;

  struct Params {
    GroupList groups;  // of k; with scales they start at multiples of block_k
    int m, m_tiles, n_tiles, band;
    int stage_k;  // the format's
  };
  using Smem = GroupTable;

  DEVICE static void prepare(const Params& p, Smem& s) { fill_table(p.groups, s); }

  template <int tile_m, int tile_n, int across = 1>
  struct Walk {
    const Params& p;
    const Smem& s;
    DEVICE Walk(const Params& p, const Smem& s) : p(p), s(s) {}

    DEVICE bool find(int i, Work& w) {
      int tiles = p.m_tiles * p.n_tiles, group = i / tiles;
      if (group >= p.groups.count) return false;
      TilePosition t = tile_position(i % tiles, p.m_tiles, p.n_tiles, p.band, across);
      int start = load(s.start[group]), size = load(s.size[group]);
      int blocks = ceil_div(size, p.stage_k);
      w = {0, 0, group, t.m_tile * tile_m, t.n_tile * tile_n, p.m, 0, blocks, start, size - (blocks - 1) * p.stage_k};
      return true;
    }
  };
};

}  // namespace jaxkern::cuda::kernels
