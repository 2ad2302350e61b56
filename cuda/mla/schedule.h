// Which block attends to which keys of which rows. Work is cut into pieces: 64 rows of one request, a group of them,
// against a run of its blocks of keys. Lengths of requests are read on the device, so the host waits for nothing.
//
// Without num_splits the blocks of keys of all requests lie on one line, and every block of threads takes a stretch of
// it: of whole requests, if no stretch is much longer than an equal one, for then there are no partial results, which
// cost more than some longer stretches; if need be the requests lie in an order in which that is so. Else equal ones,
// so that one long request uses the whole machine. With several groups of rows as many blocks of threads take the same
// stretch, a group each, at about the same time, so that the keys come from memory once. With num_splits every request
// is cut into so many equal runs, whatever else is in the batch: the same bits alone or in any batch. Either way, if
// groups and blocks are even in number, blocks 2 i and 2 i + 1 have as many pieces, of the same keys: a cluster's.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/mla/mla.h"

namespace jaxkern::cuda::kernels {

constexpr int key_block = 64;  // keys

struct MlaSizes {
  Global<const int32_t> seq_lens;
  Global<const int32_t> order;   // [batch]: the requests as they lie on the line
  Global<const int32_t> starts;  // [batch + 1]: the blocks of keys of all requests before on it
  Global<const int32_t> cuts;    // [stretches + 2]: where each stretch begins, where the last ends, and 1 if any
                                 // request is cut: then all stretches but the last are equal
  int batch, rows, row_groups;   // rows of a request, and how many 64s they are
  int splits;                    // num_splits
  int together, stretches;       // blocks that take the same stretch, each every so many-th group of rows
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

// The last of `count` ascending numbers, the first of which is 0, that is not above x.
DEVICE int last_below(Global<const int32_t> ascending, int count, int x) {
  int first = 0;
  while (count - first > 1) {  // it is in [first, count)
    int middle = (first + count) / 2;
    if (load_global<int32_t>(ascending, middle) <= x)
      first = middle;
    else
      count = middle;
  }
  return first;
}

// The slot of a partial result: those of one group of one request are row_groups apart.
DEVICE int slot_of(const MlaSizes& m, int run, int group) { return run * m.row_groups + group; }

// The pieces of one block of threads, in order.
struct MlaWalk {
  const MlaSizes& m;
  int at, end, group = 0, place = 0;  // on the line, and of a request there

  DEVICE MlaWalk(const MlaSizes& m) : m(m) {
    if (m.splits > 0) {
      at = block_index();
      end = m.batch * m.splits * m.row_groups;
      return;
    }
    if (stretch() < m.stretches)
      restart(block_index() % m.together);
    else
      at = end = 0, group = m.row_groups;
  }

  DEVICE int stretch() { return block_index() / m.together; }

  // To the stretch's first request, for this group of rows.
  DEVICE void restart(int of) {
    group = of;
    at = load_global<int32_t>(m.cuts, stretch());
    end = load_global<int32_t>(m.cuts, stretch() + 1);
    place = last_below(m.starts, m.batch, at);
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
    if (at >= end) {
      if (group + m.together >= m.row_groups) return false;
      restart(group + m.together);
      if (at >= end) return false;
    }
    int start = load_global<int32_t>(m.starts, place), blocks = load_global<int32_t>(m.starts, place + 1) - start;
    piece.request = load_global<int32_t>(m.order, place);
    piece.group = group;
    piece.length = length_of(m, piece.request);
    piece.first = at - start;
    piece.last = blocks - piece.first < end - at ? blocks : piece.first + end - at;
    // A stretch's next piece is of the next request, the next stretch's first of the same or the next: no two share
    // one.
    piece.slot = slot_of(m, place + stretch(), group);
    piece.whole = piece.first == 0 && piece.last == blocks;
    at += piece.last - piece.first;
    if (piece.last == blocks) ++place;
    return true;
  }
};

// Fills `order`, `starts` and `cuts`: one block, a thread for each request and for each stretch.
struct MlaSchedule {
  static constexpr int threads = 1024, warps = threads / warp_size;
  static std::string name() { return "MlaSchedule"; }

  struct Params {
    MlaSizes sizes;
    Global<int32_t> order, starts, cuts;
  };
  struct Smem {
    Shared<int32_t> of_warp[warps];
    Shared<int32_t> blocks[threads];  // of keys, of each request
  };

  DEVICE static void run(const Params& p, Smem& s) {
    griddepcontrol_launch_dependents();
    const MlaSizes& m = p.sizes;
    int thread = thread_index();
    for (int request = thread; request < m.batch; request += threads) store_global(p.order, request, request);
    int all = lay_out(p, s);

    // Whole requests, each to the equal stretch that its middle lies in.
    for (int place = thread; place <= m.batch; place += threads) {
      int start = load_global<int32_t>(m.starts, place);
      int last = place < m.batch ? stretch_of(m, place, all) : m.stretches;
      for (int i = place > 0 ? stretch_of(m, place - 1, all) + 1 : 0; i <= last; ++i) store_global(p.cuts, i, start);
    }
    bool is_cut = is_any_long(m, s, all);

    // In order of their lengths, to one stretch after the other, back and forth.
    if (is_cut && m.stretches < m.batch && m.batch <= threads) {
      sort(p, s);
      lay_out(p, s);
      for (int i = thread; i <= m.stretches; i += threads)
        store_global(p.cuts, i, load_global<int32_t>(m.starts, first_place(m, i)));
      is_cut = is_any_long(m, s, all);
    }

    int share = static_cast<int>(ceil_div(all, m.stretches));
    for (int i = thread; is_cut && i <= m.stretches; i += threads)
      store_global(p.cuts, i, int64_t(i) * share < all ? i * share : all);
    if (thread == 0) store_global(p.cuts, m.stretches + 1, static_cast<int32_t>(is_cut));
  }

  // Fills `starts`; how many blocks there are.
  DEVICE static int lay_out(const Params& p, Smem& s) {
    const MlaSizes& m = p.sizes;
    int thread = thread_index(), lane = lane_index(), warp = thread / warp_size, all = 0;
    bar_sync(0, threads);
    for (int first = 0; first < m.batch; first += threads) {
      int place = first + thread;
      int own = place < m.batch ? key_blocks_of(length_of(m, load_global<int32_t>(m.order, place))) : 0;
      int sum = sum_up_to(own);
      if (lane == warp_size - 1) store(s.of_warp[warp], sum);
      bar_sync(0, threads);
      int of_warps = sum_up_to(load(s.of_warp[lane]));
      int before = all + (warp > 0 ? shfl(of_warps, warp - 1) : 0);
      if (place < m.batch) store_global(p.starts, place, before + sum - own);
      all += shfl(of_warps, warps - 1);
      bar_sync(0, threads);
    }
    if (thread == 0) store_global(p.starts, m.batch, all);
    bar_sync(0, threads);
    return all;
  }

  // Of the lanes up to this one.
  DEVICE static int sum_up_to(int x) {
    for (int distance = 1; distance < warp_size; distance *= 2) {
      int other = shfl(x, lane_index() < distance ? lane_index() : lane_index() - distance);
      if (lane_index() >= distance) x += other;
    }
    return x;
  }

  DEVICE static int stretch_of(const MlaSizes& m, int place, int all) {
    int64_t twice = int64_t(load_global<int32_t>(m.starts, place)) + load_global<int32_t>(m.starts, place + 1);
    return static_cast<int>(twice * m.stretches / (2 * int64_t(all)));
  }

  // Whether a stretch is longer than an equal one by more than it costs to write, read and merge partial results: about
  // as much as a block of keys for every 16 blocks of threads that would share a request; and a sixteenth is not worth
  // it.
  DEVICE static bool is_any_long(const MlaSizes& m, Smem& s, int all) {
    bar_sync(0, threads);
    int thread = thread_index(), share = static_cast<int>(ceil_div(all, m.stretches));
    int shared = (m.batch < m.stretches ? m.batch : m.stretches) * m.together;
    bool is_long = false;
    for (int i = thread; i < m.stretches; i += threads)
      is_long |=
          load_global<int32_t>(m.cuts, i + 1) - load_global<int32_t>(m.cuts, i) > share + share / 16 + shared / 16;
    uint32_t long_lanes = ballot(is_long);
    if (lane_index() == 0) store(s.of_warp[thread / warp_size], static_cast<int32_t>(long_lanes));
    bar_sync(0, threads);
    bool any = ballot(load(s.of_warp[lane_index()]) != 0) != 0;
    bar_sync(0, threads);
    return any;
  }

  // Fills `order` for stretches of requests from the longest to the shortest, dealt back and forth.
  DEVICE static void sort(const Params& p, Smem& s) {
    const MlaSizes& m = p.sizes;
    int request = thread_index(), own = request < m.batch ? key_blocks_of(length_of(m, request)) : 0;
    store(s.blocks[request], own);
    bar_sync(0, threads);
    if (request >= m.batch) return;
    int rank = 0;
#pragma unroll 8
    for (int i = 0; i < m.batch; ++i) {
      int other = load(s.blocks[i]);
      rank += other > own || (other == own && i < request);
    }
    int round = rank / m.stretches, column = rank % m.stretches;
    int stretch = round % 2 == 0 ? column : m.stretches - 1 - column;
    store_global(p.order, first_place(m, stretch) + round, request);
  }

  // Of a stretch, if requests were dealt: some have one more than the others, the first or the last ones.
  DEVICE static int first_place(const MlaSizes& m, int stretch) {
    int rounds = m.batch / m.stretches, rest = m.batch % m.stretches, others = m.stretches - rest;
    int fuller = rounds % 2 == 0 ? (stretch < rest ? stretch : rest) : (stretch > others ? stretch - others : 0);
    return stretch * rounds + fuller;
  }
};

}  // namespace jaxkern::cuda::kernels
