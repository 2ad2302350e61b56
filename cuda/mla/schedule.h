// Which block attends to which keys of which rows. Work is cut into pieces: 64 rows of one request against a run of its
// blocks of keys. Lengths of requests are read on the device, so the host waits for nothing.
//
// Without num_splits all work lies on one line: request after request, of each its groups of rows, of each its blocks
// of keys. Every block takes an equal stretch of the line, so that one long request uses the whole machine. With
// num_splits every group of rows is cut into so many equal runs, whatever else is in the batch: the same bits alone or
// in any batch.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/mla/mla.h"

namespace jaxkern::cuda::kernels {

constexpr int key_block = 64;  // keys

struct MlaSizes {
  Global<const int32_t> seq_lens;
  Global<const int32_t> starts;  // [batch + 1]: the blocks of keys of all requests before
  int batch, rows, row_groups;   // rows of a request, and how many 64s they are
  int splits;                    // num_splits
  int longest;                   // keys that the table has room for
};

DEVICE int length_of(const MlaSizes& m, int request) {
  int length = load_global<int32_t>(m.seq_lens, request);
  return length < 0 ? 0 : length < m.longest ? length : m.longest;
}

// At least one, so that a request without keys is somebody's too.
DEVICE int key_blocks_of(int length) { return length <= key_block ? 1 : static_cast<int>(ceil_div(length, key_block)); }

struct Piece {
  int request, group, length;
  int first, last;  // blocks of keys
  int slot;         // of its partial result
  bool whole;       // all keys of its rows: no partial result
};

// The pieces of one block, in order.
struct MlaWalk {
  const MlaSizes& m;
  int at, end, request = 0;

  DEVICE MlaWalk(const MlaSizes& m) : m(m) {
    if (m.splits > 0) {
      at = block_index();
      end = m.batch * m.row_groups * m.splits;
      return;
    }
    int all = load_global<int32_t>(m.starts, m.batch) * m.row_groups, share = stretch(all);
    at = block_index() * share;
    end = at + share < all ? at + share : all;
    int beyond = m.batch;  // the request at `at` is in [request, beyond)
    while (beyond - request > 1) {
      int middle = (request + beyond) / 2;
      if (load_global<int32_t>(m.starts, middle) * m.row_groups <= at)
        request = middle;
      else
        beyond = middle;
    }
  }

  // What each of the grid's blocks takes of the line.
  DEVICE static int stretch(int all) { return static_cast<int>(ceil_div(all, grid_size())); }

  DEVICE bool next(Piece& piece) {
    if (at >= end) return false;
    if (m.splits > 0) {
      int rows = at / m.splits, split = at % m.splits;
      piece.request = rows / m.row_groups;
      piece.group = rows % m.row_groups;
      piece.length = length_of(m, piece.request);
      int blocks = key_blocks_of(piece.length), share = static_cast<int>(ceil_div(blocks, m.splits));
      piece.first = split * share < blocks ? split * share : blocks;
      piece.last = piece.first + share < blocks ? piece.first + share : blocks;
      piece.slot = at;
      piece.whole = m.splits == 1;
      at += grid_size();
      return true;
    }
    int start = load_global<int32_t>(m.starts, request), blocks = load_global<int32_t>(m.starts, request + 1) - start;
    int in_request = at - start * m.row_groups;
    piece.request = request;
    piece.group = in_request / blocks;
    piece.length = length_of(m, request);
    piece.first = in_request % blocks;
    piece.last = blocks - piece.first < end - at ? blocks : piece.first + end - at;
    // A block's next piece has the next rows, the next block's first piece the same or the next: no two have one slot.
    piece.slot = request * m.row_groups + piece.group + block_index();
    piece.whole = piece.first == 0 && piece.last == blocks;
    at += piece.last - piece.first;
    if (in_request + piece.last - piece.first == blocks * m.row_groups) ++request;
    return true;
  }
};

// Fills `starts`: one warp, 32 requests at a time.
struct MlaSchedule {
  static constexpr int threads = warp_size;
  static std::string name() { return "MlaSchedule"; }

  struct Params {
    MlaSizes sizes;
    Global<int32_t> starts;
  };
  struct Smem {};

  DEVICE static void run(const Params& p, Smem&) {
    int lane = lane_index(), before = 0;
    for (int first = 0; first < p.sizes.batch; first += warp_size) {
      int request = first + lane;
      int own = request < p.sizes.batch ? key_blocks_of(length_of(p.sizes, request)) : 0, sum = own;
      for (int distance = 1; distance < warp_size; distance *= 2) {
        int other = shfl(sum, lane < distance ? lane : lane - distance);
        if (lane >= distance) sum += other;
      }
      if (request < p.sizes.batch) store_global(p.starts, request, before + sum - own);
      before += shfl(sum, warp_size - 1);
    }
    if (lane == 0) store_global(p.starts, p.sizes.batch, before);
  }
};

}  // namespace jaxkern::cuda::kernels
