// Which block attends to which keys of which rows. Work is cut into pieces: 64 rows of one request, a group of them,
// against a run of its blocks of keys. Lengths of requests are read on the device, so the host waits for nothing, and
// every block of threads finds out by itself what is its own: another kernel would take longer.
//
// Without num_splits the blocks of keys of all requests lie on one line, and every block of threads takes a stretch of
// it: of whole requests, if no stretch is much longer than an equal one, for then there are no partial results, which
// cost more than some longer stretches; if need be requests are dealt to the stretches, if none is much longer then.
// Else equal ones, so that one long request uses the whole machine. With several groups of rows as many blocks of
// threads take the same stretch, a group each, at about the same time, so that the keys come from memory once. With
// num_splits every request is cut into so many equal runs, whatever else is in the batch: the same bits alone or in any
// batch. Either way, if groups and blocks are even in number, blocks 2 i and 2 i + 1 have as many pieces, of the same
// keys: a cluster's.
#pragma once

#include "cuda/arch/arch.h"
#include "cuda/mla/mla.h"

namespace jaxkern::cuda::kernels {

constexpr int key_block = 64;  // keys

struct MlaSizes {
  Global<const int32_t> seq_lens;
  int batch, rows, row_groups;  // rows of a request, and how many 64s they are
  int splits;                   // num_splits
  int together, stretches;      // blocks that take the same stretch, each every so many-th group of rows
  int longest;                  // keys that the table has room for
};

DEVICE int length_of(const MlaSizes& m, int request) {
  int length = load_global<int32_t>(m.seq_lens, request);
  return length < 0 ? 0 : length < m.longest ? length : m.longest;
}

// At least one, so that a request without keys is somebody's too.
DEVICE int key_blocks_of(int length) { return length <= key_block ? 1 : static_cast<int>(ceil_div(length, key_block)); }

DEVICE int key_blocks_of(const MlaSizes& m, int request) { return key_blocks_of(length_of(m, request)); }

// ---- pieces ----

struct Piece {
  int request, group, length;
  int first, last;  // blocks of keys
  int slot;         // of its partial result
  bool whole;       // all keys of its rows: no partial result
};

// The slot of a partial result: those of one group of one request are row_groups apart.
DEVICE int slot_of(const MlaSizes& m, int run, int group) { return run * m.row_groups + group; }

// A block's stretch of the line, or, of dealt requests, a line of its own.
struct MlaStretch {
  static constexpr int most_dealt = 64;
  Shared<int32_t> index;                        // among the stretches; here, as registers are scarce in a walk
  Shared<int32_t> place, first;                 // the request that it begins in, and that one's block of keys
  Shared<int32_t> length;                       // in blocks of keys
  Shared<int32_t> is_dealt, dealt[most_dealt];  // then place counts these, else all requests
};

// The pieces of one block of threads, in order.
struct MlaWalk {
  const MlaSizes& m;
  const MlaStretch& s;
  int place;               // as MlaStretch counts them; with num_splits the number of the piece
  int first, left, group;  // left of the stretch

  DEVICE MlaWalk(const MlaSizes& m, const MlaStretch& s) : m(m), s(s) {
    if (m.splits > 0)
      place = block_index();
    else
      restart(block_index() % m.together);
  }

  // To the stretch's first request, for this group of rows.
  DEVICE void restart(int of) {
    group = of;
    place = load(s.place);
    first = load(s.first);
    left = load(s.length);
  }

  DEVICE bool next(Piece& piece) {
    if (m.splits > 0) {
      if (place >= m.batch * m.splits * m.row_groups) return false;
      int run = place / m.row_groups, split = run % m.splits;
      piece.request = run / m.splits;
      piece.group = place % m.row_groups;
      piece.length = length_of(m, piece.request);
      int blocks = key_blocks_of(piece.length), share = static_cast<int>(ceil_div(blocks, m.splits));
      piece.first = split * share < blocks ? split * share : blocks;
      piece.last = piece.first + share < blocks ? piece.first + share : blocks;
      piece.slot = slot_of(m, run, piece.group);
      piece.whole = m.splits == 1;
      place += grid_size();
      return true;
    }
    if (left == 0) {
      if (group + m.together >= m.row_groups) return false;
      restart(group + m.together);
      if (left == 0) return false;
    }
    piece.request = load(s.is_dealt) ? load(s.dealt[place]) : place;
    piece.group = group;
    piece.length = length_of(m, piece.request);
    int blocks = key_blocks_of(piece.length);
    piece.first = first;
    piece.last = blocks - first < left ? blocks : first + left;
    // A stretch's next piece is of the next request, the next stretch's first of the same or the next: no two share
    // one.
    piece.slot = slot_of(m, place + load(s.index), group);
    piece.whole = piece.first == 0 && piece.last == blocks;
    left -= piece.last - first;
    first = 0;
    ++place;
    return true;
  }
};

// ---- stretches ----

// Finds the stretch of a block of `threads`, by all of them. If requests are cut, block 0 fills `starts`, for who
// merges: where each begins on the line, where the last ends, and how long a stretch is; else that is 0.
template <int threads>
struct MlaSchedule {
  static constexpr int warps = threads / warp_size;
  static constexpr int most_requests = 1024;         // to be dealt: every thread compares its own with all
  static constexpr int most_blocks = (1 << 21) - 1;  // that dealing tells apart
  static_assert(most_mla_parts <= threads);

  struct alignas(16) Smem {
    Shared<int32_t> order[most_requests];      // numbers to sort requests by
    Shared<int32_t> sorted[most_requests];     // their blocks, from the most to the fewest
    Shared<int32_t> cuts[most_mla_parts + 1];  // where each stretch of whole requests begins, and the last ends
    Shared<int32_t> of_warp[warps];
  };

  const MlaSizes& m;
  MlaStretch& s;
  Smem& smem;
  Global<int32_t> starts;
  int own = block_index() / m.together;  // stretch; there may be blocks that have none

  DEVICE void run() {
    if (thread_index() == 0) {  // for those who find nothing else, or no request
      store(s.place, 0);
      store(s.first, 0);
    }
    int all = for_requests([](int, int, int) {});
    if (share_whole(all)) return;
    if (m.stretches < m.batch && m.batch <= most_requests && m.batch <= m.stretches * MlaStretch::most_dealt &&
        deal(all))
      return;
    cut(all);
  }

  // Whole requests, each to the equal stretch that its middle lies in; false if one is too long then.
  DEVICE bool share_whole(int all) {
    auto stretch_of = [&](int start, int blocks) {
      return static_cast<int>((2 * int64_t(start) + blocks) * m.stretches / (2 * int64_t(all)));
    };
    for_requests([&](int request, int start, int blocks) {
      int before = request > 0 ? key_blocks_of(m, request - 1) : 0, last = stretch_of(start, blocks);
      for (int i = request > 0 ? stretch_of(start - before, before) + 1 : 0; i <= last; ++i) {
        store(smem.cuts[i], start);
        if (i == own) store(s.place, request);
      }
      for (int i = last + 1; request == m.batch - 1 && i <= m.stretches; ++i) store(smem.cuts[i], all);
    });
    bar_sync(0, threads);
    if (is_any_long(all, [&](int i) { return load(smem.cuts[i + 1]) - load(smem.cuts[i]); })) return false;
    finish(own < m.stretches ? load(smem.cuts[own + 1]) - load(smem.cuts[own]) : 0, false, 0);
    return true;
  }

  // Requests from the longest to the shortest, to one stretch after the other, back and forth.
  DEVICE bool deal(int all) {
    int padded = round_up(m.batch, 4);
    auto order_of = [&](int request, int blocks) {  // no two have the same
      return (blocks < most_blocks ? blocks : most_blocks) * most_requests + most_requests - 1 - request;
    };
    for (int request = thread_index(); request < padded; request += threads)
      store(smem.order[request], request < m.batch ? order_of(request, key_blocks_of(m, request)) : 0);
    bar_sync(0, threads);
    for (int request = thread_index(); request < m.batch; request += threads) {
      int blocks = key_blocks_of(m, request), order = order_of(request, blocks), rank = 0;
#pragma unroll 4
      for (int i = 0; i < padded; i += 4) {
        auto others = load_pack<4>(smem.order[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) rank += others.item[j] > order;
      }
      store(smem.sorted[rank], blocks);
      int round = rank / m.stretches;
      if (place_of(round, own) == rank) store(s.dealt[round], request);
    }
    bar_sync(0, threads);
    auto blocks_of = [&](int stretch) {
      int sum = 0;
      for (int round = 0; round * m.stretches < m.batch; ++round) {
        int place = place_of(round, stretch);
        if (place < m.batch) sum += load(smem.sorted[place]);
      }
      return sum;
    };
    if (is_any_long(all, blocks_of)) return false;
    finish(own < m.stretches ? blocks_of(own) : 0, true, 0);
    if (thread_index() == 0) store(s.place, 0);
    return true;
  }

  // Of the request that a stretch gets in a round, among those from the longest to the shortest.
  DEVICE int place_of(int round, int stretch) const {
    return round * m.stretches + (round % 2 == 0 ? stretch : m.stretches - 1 - stretch);
  }

  // Equal stretches.
  DEVICE void cut(int all) {
    int share = static_cast<int>(ceil_div(all, m.stretches));
    int begin = static_cast<int>(int64_t(own) * share < all ? own * share : all);
    finish(all - begin < share ? all - begin : share, false, share);
    for_requests([&](int request, int start, int blocks) {
      if (start <= begin && begin < start + blocks) {
        store(s.place, request);
        store(s.first, begin - start);
      }
      if (block_index() == 0) store_global(starts, request, start);
    });
    if (block_index() == 0 && thread_index() == 0) store_global(starts, m.batch, all);
  }

  DEVICE void finish(int length, bool is_dealt, int share) {
    if (thread_index() != 0) return;
    store(s.index, own);
    store(s.length, length);
    store(s.is_dealt, static_cast<int32_t>(is_dealt));
    if (block_index() == 0) store_global(starts, m.batch + 1, share);
  }

  // Whether a stretch is longer than an equal one by more than it costs to write, read and merge partial results: about
  // as much as a block of keys for every 6 groups of rows whose keys would be cut; and a sixteenth is not worth it.
  template <typename F>
  DEVICE bool is_any_long(int all, F&& blocks_of) {
    int share = static_cast<int>(ceil_div(all, m.stretches)), stretch = thread_index();
    int cut_groups = (m.batch < m.stretches ? m.batch : m.stretches) * m.together;
    bool is_long = stretch < m.stretches && blocks_of(stretch) - share > share / 16 + cut_groups / 6;
    uint32_t long_lanes = ballot(is_long);
    bar_sync(0, threads);  // of_warp has been read
    if (lane_index() == 0) store(smem.of_warp[thread_index() / warp_size], static_cast<int32_t>(long_lanes));
    bar_sync(0, threads);
    bool any = false;
    for (int i = 0; i < warps; ++i) any |= load(smem.of_warp[i]) != 0;
    return any;
  }

  // Calls f(request, start, blocks) for each request, by one thread, with where on the line it begins and its blocks of
  // keys; where the line ends.
  template <typename F>
  DEVICE int for_requests(F&& f) {
    int lane = lane_index(), warp = thread_index() / warp_size, all = 0;
    for (int first = 0; first < m.batch; first += threads) {
      int request = first + thread_index(), blocks = request < m.batch ? key_blocks_of(m, request) : 0;
      int sum = sum_up_to(blocks);
      bar_sync(0, threads);  // of_warp has been read
      if (lane == warp_size - 1) store(smem.of_warp[warp], sum);
      bar_sync(0, threads);
      int start = all + sum - blocks;
      for (int i = 0; i < warps; ++i) {
        int of_warp = load(smem.of_warp[i]);
        all += of_warp;
        if (i < warp) start += of_warp;
      }
      if (request < m.batch) f(request, start, blocks);
    }
    return all;
  }
};

}  // namespace jaxkern::cuda::kernels
