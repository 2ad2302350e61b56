// Which block attends to which keys of which rows. Work is cut into pieces: 64 rows of one request, a group of them,
// against a run of its blocks of keys. Lengths of requests are read on the device, so the host waits for nothing.
//
// Without num_splits the blocks of keys of all requests lie on one line, and every block of threads takes an equal
// stretch of it, so that one long request uses the whole machine; with several groups of rows as many blocks of threads
// take the same stretch, a group each, at about the same time, so that the keys come from memory once. With num_splits
// every request is cut into so many equal runs, whatever else is in the batch: the same bits alone or in any batch.
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

// How `blocks` blocks of threads share the line.
struct Stretches {
  int together;  // blocks that take the same stretch, each every so many-th group of rows
  int count, share;

  DEVICE Stretches(const MlaSizes& m, int blocks) {
    together = m.row_groups < blocks ? m.row_groups : blocks;
    count = blocks / together;
    share = static_cast<int>(ceil_div(load_global<int32_t>(m.starts, m.batch), count));
  }
};

// The slot of a partial result: those of one group of one request are row_groups apart.
DEVICE int slot_of(const MlaSizes& m, int run, int group) { return run * m.row_groups + group; }

// The pieces of one block of threads, in order.
struct MlaWalk {
  const MlaSizes& m;
  int at, end, group = 0, request = 0;
  int begin = 0, index = 0, together = 1;  // of the stretch

  DEVICE MlaWalk(const MlaSizes& m) : m(m) {
    if (m.splits > 0) {
      at = block_index();
      end = m.batch * m.splits * m.row_groups;
      return;
    }
    Stretches s(m, grid_size());
    int all = load_global<int32_t>(m.starts, m.batch);
    together = s.together;
    index = block_index() / together;
    group = index < s.count ? block_index() % together : m.row_groups;
    begin = index * s.share;
    end = begin + s.share < all ? begin + s.share : all;
    restart();
  }

  // To the stretch's first request.
  DEVICE void restart() {
    at = begin;
    request = 0;
    int beyond = m.batch;  // it is in [request, beyond)
    while (beyond - request > 1) {
      int middle = (request + beyond) / 2;
      if (load_global<int32_t>(m.starts, middle) <= at)
        request = middle;
      else
        beyond = middle;
    }
  }

  DEVICE bool next(Piece& piece) {
    if (m.splits > 0) {
      if (at >= end) return false;
      int run = at / m.row_groups, split = run % m.splits;
      piece.request = run / m.splits;
      piece.group = at % m.row_groups;
      piece.length = length_of(m, piece.request);
      int blocks = key_blocks_of(piece.length), share = static_cast<int>(ceil_div(blocks, m.splits));
      piece.first = split * share < blocks ? split * share : blocks;
      piece.last = piece.first + share < blocks ? piece.first + share : blocks;
      piece.slot = slot_of(m, run, piece.group);
      piece.whole = m.splits == 1;
      at += grid_size();
      return true;
    }
    if (at >= end && begin < end) {
      group += together;
      if (group < m.row_groups) restart();
    }
    if (at >= end || group >= m.row_groups) return false;
    int start = load_global<int32_t>(m.starts, request), blocks = load_global<int32_t>(m.starts, request + 1) - start;
    piece.request = request;
    piece.group = group;
    piece.length = length_of(m, request);
    piece.first = at - start;
    piece.last = blocks - piece.first < end - at ? blocks : piece.first + end - at;
    // A stretch's next piece is of the next request, the next stretch's first of the same or the next: no two share
    // one.
    piece.slot = slot_of(m, request + index, group);
    piece.whole = piece.first == 0 && piece.last == blocks;
    at += piece.last - piece.first;
    if (piece.last == blocks) ++request;
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
