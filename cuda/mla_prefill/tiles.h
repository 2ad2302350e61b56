// Which tile of a head's queries, or keys, a persistent block of threads takes next.
#pragma once

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::kernels {

struct HeadTiles {
  int batch, heads;
  int tiles;            // of a head
  int together, units;  // heads, 1 or 2, of which a block of threads takes a tile each; how often one does
};

// The tiles of a head are neighbours: blocks of threads that run together share in L2 what they read of it. A block
// takes a tile of one head and then one of the next head, from the other end: with causal spans all such pairs are as
// long. With these the longest tiles come first: the last ones of queries, the first ones of keys.
template <int rows, bool first_first = false>
struct HeadWalk {
  int unit = block_index(), part = 0, batch, head;
  int token;  // the tile's first, of `rows`

  DEVICE bool next(const HeadTiles& p) {
    int index;  // of a head of a sequence
    do {
      if (unit >= p.units) return false;
      int tile = unit % p.tiles;
      token = ((part == 0) == first_first ? tile : p.tiles - 1 - tile) * rows;
      index = unit / p.tiles * p.together + part;
      if (++part == p.together) {
        part = 0;
        unit += grid_size();
      }
    } while (index >= p.batch * p.heads);  // the last head may be alone
    head = index % p.heads;
    batch = index / p.heads;
    return true;
  }
};

}  // namespace jaxkern::cuda::kernels
