// Kernels with planted bugs, and what the simulator says of each. Every kernel is right without its bug, under all
// seeds; with it, the report must name the kernel, the place and the fault in at least one of them.
//
// A line that a report may name carries the bug's name after an @. What is printed for each: "ok", the name, the words
// expected, the seeds under which it was caught and a report, between bars.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arch/arch.h"

namespace jaxkern::cuda::bugs {

// ---- a pipeline like the GEMM's ----

constexpr int tile = 64, block_k = 128, k_blocks = 7, tiles = 2, most_rows = 2 * tile * tiles;

struct Pipe {
  TensorMap a, b, out;  // [m, k], [n, k], [m, n]
  Global<const float> scales;
  Global<float> copy;
  int bug;
};

enum PipeBug {
  none,
  no_init_fence,
  no_start_barrier,
  too_few_at_full,
  too_many_at_full,
  no_empty_wait,
  first_parity,
  parity_not_flipped,
  too_few_bytes,
  too_many_bytes,
  no_expect,
  no_copy_of_b,
  misaligned_copy,
  copy_to_other_stage,
  one_copy_more,
  one_stage_less,
  no_scales_arrive,
  scales_arrive_early,
  scales_beyond_end,
  no_full_wait,
  full_wait_twice,
  scales_before_full,
  release_before_wait,
  load_after_release,
  no_release,
  release_by_all_lanes,
  release_without_syncwarp,
  no_wgmma_fence,
  accumulator_read,
  accumulator_written,
  accumulator_not_named,
  no_wgmma_wait,
  no_k_advance,
  wrong_stride,
  wrong_swizzle,
  always_accumulates,
  warp_skips_wgmma,
  warps_disagree,
  no_wait_before_staging,
  no_barrier_after_wait,
  no_barrier_before_store,
  no_proxy_fence,
  no_wait_at_exit,
  wrong_staging_swizzle,
  store_beyond_end,
  no_barrier_at_exit,
  releases_own_block_only,
  other_half,
};

template <int cluster>
struct Pipeline {
  static constexpr int stages = 3, threads = 256;
  using Params = Pipe;
  static std::string name() { return "Pipeline"; }
  struct Smem {
    Tile<tile * block_k> a[stages], b[stages], staging[2];
    Shared<float> scales[stages][tile];
    Barrier full[stages], empty[stages];
  };

  struct At {
    int stage = 0;
    uint32_t phase = 0;
    void advance() {
      if (++stage == stages) stage = 0, phase ^= 1;
    }
  };

  static void run(const Params& p, Smem& s) {
    int warp = warp_index();
    if (warp == 0 && elect()) {
      for (int i = 0; i < stages; ++i) {
        mbarrier_init(s.full[i], p.bug == too_few_at_full ? 32 : p.bug == too_many_at_full ? 34 : 33);
        mbarrier_init(s.empty[i], 4 * cluster);
      }
      if (p.bug != no_init_fence) fence_mbarrier_init();
    }
    if (p.bug != no_start_barrier) meet();
    if (warp < 4) multiply(p, s);
    if (warp == 4 && elect()) copy_tiles(p, s);
    if (warp == 5) copy_scales(p, s);
    syncwarp();
    if (cluster > 1 && p.bug != no_barrier_at_exit) meet();
  }

  static void meet() {
    if constexpr (cluster > 1) {
      barrier_cluster_arrive();
      barrier_cluster_wait();
    } else {
      bar_sync(0, threads);
    }
  }

  static void copy_tiles(const Params& p, Smem& s) {
    At at;
    int bug = p.bug, steps = tiles * k_blocks + (bug == one_copy_more) - (bug == one_stage_less);
    for (int i = 0; i < steps; ++i, at.advance()) {
      int k = i % k_blocks * block_k, row = (block_index() * tiles + i / k_blocks) * tile;
      Barrier &full = s.full[at.stage], &empty = s.empty[at.stage];
      uint32_t parity = bug == first_parity ? at.phase : bug == parity_not_flipped ? 1 : at.phase ^ 1;
      if (bug != no_empty_wait) mbarrier_wait(empty, parity);  // @no_start_barrier @parity_not_flipped
      int bytes = 2 * tile * block_k + (bug == too_many_bytes ? 16 : bug == too_few_bytes ? -16 : 0);
      if (bug == no_expect) mbarrier_arrive(full);
      if (bug != no_expect) mbarrier_arrive_expect_tx(full, bytes);  // @no_init_fence @no_empty_wait
      int to = bug == copy_to_other_stage ? 0 : at.stage, shift = bug == misaligned_copy ? 128 : 0;
      // @no_empty_wait @misaligned_copy @copy_to_other_stage @one_copy_more @release_before_wait @no_wgmma_wait
      cp_async_bulk_tensor<2>(s.a[to].data + shift, p.a, {k, row}, full);
      if (bug == no_copy_of_b) continue;
      if constexpr (cluster == 1) {
        cp_async_bulk_tensor<2>(&s.b[at.stage], p.b, {k, 0}, full);  // @too_few_bytes @one_copy_more
      } else {
        int rank = cluster_rank(), half = bug == other_half ? rank ^ 1 : rank;
        uint8_t* b = s.b[at.stage].data + rank * (tile / 2) * block_k;
        cp_async_bulk_tensor_multicast<2>(b, p.b, {k, half * tile / 2}, full, 3);
      }
    }
  }

  static void copy_scales(const Params& p, Smem& s) {
    At at;
    for (int i = 0; i < tiles * k_blocks; ++i, at.advance()) {
      mbarrier_wait(s.empty[at.stage], at.phase ^ 1);  // @no_start_barrier
      if (p.bug == scales_arrive_early) cp_async_mbarrier_arrive(s.full[at.stage]);
      for (int j = lane_index(); j < tile; j += warp_size) {
        int row = (block_index() * tiles + i / k_blocks) * tile + j, beyond = p.bug == scales_beyond_end ? tile : 0;
        int64_t from = i % k_blocks * most_rows + row + beyond;
        // @scales_beyond_end @release_before_wait @load_after_release @release_without_syncwarp
        cp_async<4>(shared_address(&s.scales[at.stage][j]), p.scales, from, true);
      }
      // @too_few_bytes @no_expect
      if (p.bug != scales_arrive_early && p.bug != no_scales_arrive) cp_async_mbarrier_arrive(s.full[at.stage]);
    }
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }

  static void multiply(const Params& p, Smem& s) {
    At at;
    int bug = p.bug, lane = lane_index(), warp = warp_index();
    int row = warp * 16 + lane / 4;
    float sums[tile / 2] = {}, others[tile / 2];
    for (int t = 0; t < tiles; ++t) {
      float totals[tile / 2] = {};
      for (int i = 0; i < k_blocks; ++i, at.advance()) {
        // @too_few_at_full @scales_arrive_early @scales_before_full @release_before_wait @load_after_release
        auto scale = [&](int half) { return load(s.scales[at.stage][row + 8 * half]); };
        float upper = 0, lower = 0;
        if (bug == scales_before_full) upper = scale(0), lower = scale(1);
        // @no_start_barrier @too_many_at_full @first_parity @too_many_bytes @no_copy_of_b @one_stage_less
        // @no_scales_arrive @no_release @release_by_all_lanes @releases_own_block_only
        if (bug != no_full_wait) mbarrier_wait(s.full[at.stage], at.phase);
        if (bug == full_wait_twice) mbarrier_wait(s.full[at.stage], at.phase);  // @full_wait_twice
        if (bug != no_wgmma_fence) wgmma_fence();
        for (int k = 0; k < (bug == warp_skips_wgmma && warp == 2 ? 3 : 4); ++k) {
          int offset = bug == no_k_advance ? 0 : k * 32, stride = bug == wrong_stride ? 512 : 1024;
          if (bug == warps_disagree && warp == 3 && k == 2) offset = 0;
          Swizzle swizzle = bug == wrong_swizzle ? Swizzle::bytes_64 : Swizzle::bytes_128;
          uint64_t a = matrix_descriptor(shared_address(&s.a[at.stage]) + offset, 0, 1024, Swizzle::bytes_128);
          uint64_t b = matrix_descriptor(shared_address(&s.b[at.stage]) + offset, 0, stride, swizzle);
          // @too_few_at_full @no_expect @no_full_wait @no_wgmma_fence @wrong_swizzle @warp_skips_wgmma @warps_disagree
          wgmma_e4m3<tile>(sums, a, b, k > 0 || bug == always_accumulates);
        }
        wgmma_commit_group();
        if (bug == release_before_wait) release(s.empty[at.stage]);
        if (bug == accumulator_read) store_global(p.copy, 0, sums[0]);  // @accumulator_read
        if (bug == accumulator_written) sums[1] = 0;
        if (bug == load_after_release) wgmma_wait_group<0>(sums), release(s.empty[at.stage]);
        if (bug == accumulator_not_named)
          wgmma_wait_group<0>(others);  // @accumulator_not_named
        else if (bug != no_wgmma_wait)
          wgmma_wait_group<0>(sums);  // @accumulator_written
        if (bug != scales_before_full) upper = scale(0), lower = scale(1);
        for (int j = 0; j < tile / 2; ++j) totals[j] += (j / 2 % 2 ? lower : upper) * sums[j];
        if (bug == release_by_all_lanes) mbarrier_arrive(s.empty[at.stage]);
        if (bug == release_without_syncwarp && lane == 0) arrive(s.empty[at.stage], 0);
        if (bug == releases_own_block_only && lane == 0) mbarrier_arrive(s.empty[at.stage]);
        bool otherwise = bug == release_before_wait || bug == load_after_release || bug == release_without_syncwarp ||
                         bug == releases_own_block_only || bug == release_by_all_lanes;
        if (!otherwise && bug != no_release) release(s.empty[at.stage]);
      }
      store_tile(p, s, (block_index() * tiles + t) * tile, totals);
    }
    if (thread_index() == 0 && bug != no_wait_at_exit) bulk_wait_group<0>();
  }

  static void arrive(Barrier& empty, int rank) {
    if constexpr (cluster == 1)
      mbarrier_arrive(empty);
    else
      mbarrier_arrive_cluster(empty, rank);  // @no_barrier_at_exit
  }

  static void release(Barrier& empty) {
    syncwarp();
    if (lane_index() < cluster) arrive(empty, lane_index());
  }

  static void store_tile(const Params& p, Smem& s, int first_row, float (&totals)[tile / 2]) {
    int bug = p.bug, lane = lane_index();
    if (thread_index() == 0 && bug != no_wait_before_staging) bulk_wait_group_read<0>();
    if (bug != no_barrier_after_wait) bar_sync(1, 128);
    for (int i = 0; i < tile / 2; i += 2) {
      int row = warp_index() * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
      int chunk = column % 32 / 4 ^ (bug == wrong_staging_swizzle ? 0 : row % 8);
      uint32_t to = shared_address(&s.staging[column / 32]) + row * 128 + chunk * 16 + column % 4 * 4;
      // @no_wgmma_wait @no_wait_before_staging @no_barrier_after_wait
      store_shared(to, Pack<float, 2>{totals[i], totals[i + 1]});
      int64_t at = int64_t(first_row + row) * tile + column + (bug == store_beyond_end ? tile : 0);
      store_global(p.copy, at, Pack<float, 2>{totals[i], totals[i + 1]});  // @store_beyond_end
    }
    if (bug != no_proxy_fence) fence_proxy_async();
    if (bug != no_barrier_before_store) bar_sync(1, 128);
    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i)
        // @no_barrier_before_store @no_proxy_fence @no_wait_at_exit
        cp_async_bulk_tensor_store<2>(p.out, {i * 32, first_row}, &s.staging[i]);
      bulk_commit_group();
    }
  }
};

uint8_t code_of(int i) { return (i < 0 ? 0x80 : 0) | (i % 2 ? 0x38 : i ? 0x40 : 0); }  // -2 to 2 as e4m3

// The report, "wrong result", or nothing.
template <int cluster>
std::string pipeline(int bug) {
  constexpr int k = k_blocks * block_k;
  alignas(128) static uint8_t a[most_rows * k], b[tile * k];
  static std::string without[8];  // of each seed, which is run once
  static bool ran[8];
  uint64_t seed = sim::settings().seed;
  if (bug == none && std::exchange(ran[seed], true)) return without[seed];
  alignas(128) static float scales[k_blocks * most_rows], out[most_rows * tile], copy[most_rows * tile];
  static std::vector<float> want;
  auto small = [](int i) { return int(i * 2654435761u >> 20) % 5 - 2; };
  if (want.empty()) {
    want.resize(most_rows * tile);
    for (int i = 0; i < most_rows * k; ++i) a[i] = code_of(small(i));
    for (int i = 0; i < tile * k; ++i) b[i] = code_of(small(i + 7777777));
    for (int i = 0; i < k_blocks * most_rows; ++i) scales[i] = 1 << i % 3;
    for (int r = 0; r < most_rows; ++r)
      for (int c = 0; c < tile; ++c)
        for (int i = 0; i < k; ++i)
          want[r * tile + c] += scales[i / block_k * most_rows + r] * (small(r * k + i) * small(c * k + i + 7777777));
  }
  std::fill_n(out, most_rows * tile, 0.0f);
  std::fill_n(copy, most_rows * tile, 0.0f);
  Pipe p = {};
  p.bug = bug;
  p.scales = {scales, k_blocks * most_rows};
  p.copy = {copy, most_rows * tile};
  for (const Error& error :
       {tensor_map<2>(p.a, a, Element::uint8, {k, most_rows}, {k}, {block_k, tile}, Swizzle::bytes_128),
        tensor_map<2>(p.b, b, Element::uint8, {k, tile}, {k}, {block_k, tile / cluster}, Swizzle::bytes_128),
        tensor_map<2>(p.out, out, Element::float32, {tile, most_rows}, {tile * 4}, {32, tile}, Swizzle::bytes_128),
        launch<Pipeline<cluster>>(2, cluster, p, nullptr)})
    if (!error.empty()) return bug == none ? without[seed] = error : error;
  bool right = std::equal(want.begin(), want.end(), out) && std::equal(want.begin(), want.end(), copy);
  std::string result = right ? "" : "wrong result";
  if (bug == none) without[seed] = result;
  return result;
}

// ---- small kernels ----

// One kernel, and a bug that is there or not.
struct Small {
  Global<const uint32_t> in;  // 256
  Global<uint32_t> out;       // 256
  TensorMap map;              // of in, [4, 64]
  bool bug;
};

template <int count>
struct Of {
  using Params = Small;
  static constexpr int threads = count;
};

#define NAME(text) \
  static std::string name() { return #text; }

struct Room {
  Shared<uint32_t> x[256];
  Tile<4096> tile, other;
  Barrier full, empty;
};

struct UnwrittenShared : Of<32> {
  NAME(UnwrittenShared)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (!p.bug) store(s.x[lane_index()], 1u);
    store_global(p.out, lane_index(), load(s.x[lane_index()]));  // @UnwrittenShared
  }
};

struct OutsideShared : Of<32> {
  NAME(OutsideShared)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    uint32_t end = shared_address(&s) + sizeof(Room);
    store_shared(end - (p.bug ? 0 : 256) + 4 * lane_index(), 1u);  // @OutsideShared
  }
};

struct MisalignedShared : Of<32> {
  NAME(MisalignedShared)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    // @MisalignedShared
    store_shared(shared_address(&s.tile) + 16 * lane_index() + (p.bug ? 4 : 0), Pack<uint32_t, 2>{1, 2});
  }
};

struct LoadBeyondEnd : Of<32> {
  NAME(LoadBeyondEnd)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    uint32_t x = load_global<uint32_t>(p.in, lane_index() + (p.bug ? 225 : 0));  // @LoadBeyondEnd
    store_global(p.out, lane_index(), x);
  }
};

struct StoreBeforeBeginning : Of<32> {
  NAME(StoreBeforeBeginning)
  using Smem = Room;
  static void run(const Params& p, Smem&) { store_global(p.out, lane_index() - p.bug, 1u); }  // @StoreBeforeBeginning
};

struct MisalignedGlobal : Of<32> {
  NAME(MisalignedGlobal)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    using Four = Pack<uint32_t, 4>;
    Four x = load_global<Four>(p.in, 4 * lane_index() + (p.bug ? 2 : 0));  // @MisalignedGlobal
    store_global(p.out, 4 * lane_index(), x);
  }
};

// By one thread, from `offset` on.
template <typename F>
void load_bulk(const Small& p, Room& s, uint32_t bytes, F copy) {
  if (thread_index() == 0) {
    mbarrier_init(s.full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(s.full, bytes);
    copy();
    mbarrier_wait(s.full, 0);
    store_global(p.out, 0, load_shared<uint32_t>(shared_address(&s.tile)));
  }
}

struct OddBulkSize : Of<32> {
  NAME(OddBulkSize)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    int bytes = p.bug ? 72 : 80;
    load_bulk(p, s, bytes, [&] { cp_async_bulk(&s.tile, p.in, 0, bytes, s.full); });  // @OddBulkSize
  }
};

struct OddBulkSource : Of<32> {
  NAME(OddBulkSource)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    load_bulk(p, s, 64, [&] { cp_async_bulk(&s.tile, p.in, p.bug ? 2 : 4, 64, s.full); });  // @OddBulkSource
  }
};

struct BulkBeyondEnd : Of<32> {
  NAME(BulkBeyondEnd)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    load_bulk(p, s, 64, [&] { cp_async_bulk(&s.tile, p.in, p.bug ? 244 : 240, 64, s.full); });  // @BulkBeyondEnd
  }
};

struct WrongRank : Of<32> {
  NAME(WrongRank)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    load_bulk(p, s, 1024, [&] {
      if (p.bug)
        cp_async_bulk_tensor<3>(&s.tile, p.map, {0, 0, 0}, s.full);  // @WrongRank
      else
        cp_async_bulk_tensor<2>(&s.tile, p.map, {0, 0}, s.full);
    });
  }
};

struct NoInit : Of<32> {
  NAME(NoInit)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0 && !p.bug) mbarrier_init(s.full, 32);
    bar_sync(0, 32);
    mbarrier_arrive(s.full);  // @NoInit
    mbarrier_wait(s.full, 0);
  }
};

struct InitTwice : Of<32> {
  NAME(InitTwice)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0)
      for (int i = 0; i < 1 + p.bug; ++i) mbarrier_init(s.full, 32);  // @InitTwice
  }
};

struct BarrierOverwritten : Of<32> {
  NAME(BarrierOverwritten)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() != 0) return;
    mbarrier_init(s.full, 32);
    store_shared(p.bug ? shared_address(&s.full) : shared_address(&s.x[0]), 0u);  // @BarrierOverwritten
  }
};

struct MissingArrive : Of<64> {
  NAME(MissingArrive)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) mbarrier_init(s.full, 32);
    bar_sync(0, 64);
    if (warp_index() == 0 && !(p.bug && lane_index() == 5)) mbarrier_arrive(s.full);
    if (warp_index() == 1) mbarrier_wait(s.full, 0);  // @MissingArrive
  }
};

struct BarCount : Of<96> {
  NAME(BarCount)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (warp_index() < 2) bar_sync(1, p.bug && warp_index() == 0 ? 96 : 64);  // @BarCount
  }
};

struct BarTooFew : Of<96> {
  NAME(BarTooFew)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (!p.bug || warp_index() > 0) bar_sync(1, 96);  // @BarTooFew
  }
};

struct BarLeftOver : Of<64> {
  NAME(BarLeftOver)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (warp_index() == 0) bar_arrive(1, 64);  // @BarLeftOver
    if (warp_index() == 1 && !p.bug) bar_sync(1, 64);
  }
};

struct TooManyArrivals : Of<32> {
  NAME(TooManyArrivals)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) {
      mbarrier_init(s.full, p.bug ? 31 : 32);
      fence_mbarrier_init();
      mbarrier_expect_tx(s.full, 64);
    }
    bar_sync(0, 32);
    mbarrier_arrive(s.full);  // @TooManyArrivals
    syncwarp();
    if (thread_index() == 0) cp_async_bulk(&s.tile, p.in, 0, 64, s.full);
    mbarrier_wait(s.full, 0);
  }
};

struct BarTooMany : Of<96> {
  NAME(BarTooMany)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    int count = p.bug ? 64 : 96;  // three warps come
    bar_arrive(1, count);         // @BarTooMany
    if (warp_index() == 0) bar_sync(2, 32);
  }
};

struct DivergentSyncwarp : Of<32> {
  NAME(DivergentSyncwarp)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (!p.bug || lane_index() < 16)
      syncwarp();
    else
      ballot(true);  // @DivergentSyncwarp
  }
};

struct DivergentShuffle : Of<32> {
  NAME(DivergentShuffle)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (!p.bug || lane_index() != 3) shfl(1, 0);  // @DivergentShuffle
  }
};

struct ExitedLanes : Of<32> {
  NAME(ExitedLanes)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    if (p.bug && lane_index() < 4) return;
    syncwarp();  // @ExitedLanes
  }
};

// Three warpgroups of 168 registers a thread: one takes what another gave, and no more.
template <int bug>
struct RegistersOf : Of<384> {
  static constexpr int registers = 168;
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    bool third = warp_index() >= 8;
    if (third) {
      if (bug == 0 && p.bug)
        setmaxnreg_dec<48>();  // 1024 too few, which is what an SM has over
      else if (bug == 1 && p.bug)
        setmaxnreg_dec<176>();  // @RegistersDecUp
      else if (bug == 2 && p.bug && warp_index() == 9)
        setmaxnreg_dec<32>();
      else
        setmaxnreg_dec<40>();
    } else {
      setmaxnreg_inc<232>();  // @RegistersPool
    }
    syncwarp();  // @RegistersDisagree
  }
};
struct RegistersPool : RegistersOf<0> {
  NAME(RegistersPool)
};
struct RegistersDecUp : RegistersOf<1> {
  NAME(RegistersDecUp)
};
struct RegistersDisagree : RegistersOf<2> {
  NAME(RegistersDisagree)
};

struct ReadAfterWrite : Of<64> {
  NAME(ReadAfterWrite)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    store(s.x[thread_index()], 1u);
    if (!p.bug) bar_sync(0, 64);
    load(s.x[thread_index() ^ 32]);  // @ReadAfterWrite
  }
};

struct NoSyncwarp : Of<32> {
  NAME(NoSyncwarp)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    store(s.x[lane_index()], 1u);
    if (!p.bug) syncwarp();
    load(s.x[lane_index() ^ 1]);  // @NoSyncwarp
  }
};

struct WriteAfterWrite : Of<64> {
  NAME(WriteAfterWrite)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (warp_index() == 0) store(s.x[lane_index()], 1u);  // @WriteAfterWrite
    if (!p.bug) bar_sync(0, 64);
    if (warp_index() == 1) store(s.x[lane_index()], 1u);  // @WriteAfterWrite
  }
};

struct WriteAfterRead : Of<64> {
  NAME(WriteAfterRead)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (warp_index() == 0) store(s.x[lane_index()], 1u);
    bar_sync(0, 64);
    if (warp_index() == 1) load(s.x[lane_index()]);  // @WriteAfterRead
    if (!p.bug) bar_sync(0, 64);
    if (warp_index() == 0) store(s.x[lane_index()], 2u);  // @WriteAfterRead
  }
};

struct AsyncCopyNoWait : Of<32> {
  NAME(AsyncCopyNoWait)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    uint32_t to = shared_address(&s.tile) + 4 * lane_index();
    cp_async<4>(to, p.in, lane_index(), true);
    cp_async_commit_group();
    if (!p.bug) cp_async_wait_group<0>();
    store_global(p.out, lane_index(), load_shared<uint32_t>(to));  // @AsyncCopyNoWait
    cp_async_wait_group<0>();
  }
};

struct AsyncCopyAtExit : Of<32> {
  NAME(AsyncCopyAtExit)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    cp_async<4>(shared_address(&s.tile) + 4 * lane_index(), p.in, lane_index(), true);  // @AsyncCopyAtExit
    cp_async_commit_group();
    if (!p.bug) cp_async_wait_group<0>();
  }
};

struct AsyncCopyMisaligned : Of<32> {
  NAME(AsyncCopyMisaligned)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    cp_async<16>(shared_address(&s.tile) + 16 * lane_index(), p.in, p.bug ? 2 : 4, true);  // @AsyncCopyMisaligned
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }
};

struct AsyncCopyBeyondEnd : Of<32> {
  NAME(AsyncCopyBeyondEnd)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    bool valid = lane_index() < 16;
    int i = valid ? lane_index() * 16 : 1000;
    cp_async<16>(shared_address(&s.tile) + 16 * lane_index(), p.in, i, valid || p.bug);  // @AsyncCopyBeyondEnd
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }
};

struct StoreNotCommitted : Of<32> {
  NAME(StoreNotCommitted)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() != 0) return;
    for (int i = 0; i < 4; ++i) store_shared(shared_address(&s.tile) + 4 * i, 7u);
    fence_proxy_async();
    cp_async_bulk_store(p.out, 0, &s.tile, 16);  // @StoreNotCommitted
    if (!p.bug) bulk_commit_group();
    bulk_wait_group<0>();
  }
};

// Two warpgroups' worth of products, A in registers or B written by the threads.
enum ProductBug {
  fragment_modified,
  no_fence_for_b,
  b_overwritten,
  fence_once,
  uncommitted,
  exit_in_flight,
  cvt_in_flight
};
template <int bug>
struct ProductOf : Of<128> {
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    int t = thread_index();
    for (int i = 0; i < 4; ++i) store_shared(shared_address(&s.tile) + 16 * t + 4 * i, 0x38383838u);
    if (!(p.bug && bug == no_fence_for_b)) fence_proxy_async();
    bar_sync(0, 128);
    float d[8] = {};
    uint32_t a[4] = {0x38383838, 0x38383838, 0x38383838, 0x38383838};
    uint64_t b = matrix_descriptor(shared_address(&s.tile), 0, 1024, Swizzle::bytes_128);
    wgmma_fence();
    wgmma_e4m3<16>(d, a, b, true);  // @NoFenceForB @ExitInFlight
    if (!(p.bug && bug == uncommitted)) wgmma_commit_group();
    if (p.bug && bug == fragment_modified) a[1] = 0;
    if (p.bug && bug == b_overwritten) store_shared(shared_address(&s.tile) + 16 * (t % 8), 0u);  // @OperandOverwritten
    if (p.bug && bug == cvt_in_flight) store_global(p.out, t, cvt_bf16x2(d[0], d[1]));            // @ConvertedInFlight
    if (p.bug && bug == exit_in_flight) return;
    wgmma_wait_group<0>(d);  // @FragmentModified @Uncommitted
    if (bug == fence_once) {
      if (!p.bug) wgmma_fence();
      wgmma_e4m3<16>(d, a, b, true);  // @FenceOnce
      wgmma_commit_group();
      wgmma_wait_group<0>(d);
    }
    store_global(p.out, t, d[0] == (bug == fence_once ? 64.0f : 32.0f) ? 1u : 0u);
  }
};
#define PRODUCT(kernel, bug)       \
  struct kernel : ProductOf<bug> { \
    NAME(kernel)                   \
  };
PRODUCT(FragmentModified, fragment_modified)
PRODUCT(NoFenceForB, no_fence_for_b)
PRODUCT(OperandOverwritten, b_overwritten)
PRODUCT(FenceOnce, fence_once)
PRODUCT(Uncommitted, uncommitted)
PRODUCT(ExitInFlight, exit_in_flight)
PRODUCT(ConvertedInFlight, cvt_in_flight)

struct RemoteArriveAtExit : Of<32> {
  NAME(RemoteArriveAtExit)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) {
      mbarrier_init(s.full, 32);
      fence_mbarrier_init();
    }
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (cluster_rank() == 0) mbarrier_arrive_cluster(s.full, 1);  // @RemoteArriveAtExit
    if (p.bug) return;
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

struct RemoteReadNoBarrier : Of<32> {
  NAME(RemoteReadNoBarrier)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    int t = thread_index();
    store(s.x[2 * t], 1u);
    store(s.x[2 * t + 1], 1u);
    if (!p.bug) {
      barrier_cluster_arrive();
      barrier_cluster_wait();
    }
    load_cluster<2>(s.x[2 * t], cluster_rank() ^ 1);  // @RemoteReadNoBarrier
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

struct ClusterArriveTwice : Of<32> {
  NAME(ClusterArriveTwice)
  using Smem = Room;
  static void run(const Params& p, Smem&) {
    barrier_cluster_arrive();
    if (!p.bug) barrier_cluster_wait();
    barrier_cluster_arrive();  // @ClusterArriveTwice
    barrier_cluster_wait();
  }
};

struct OtherBlocksBarrier : Of<32> {
  NAME(OtherBlocksBarrier)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    if (thread_index() == 0) {
      mbarrier_init(s.full, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(s.full, p.bug ? 8 : 4);
    }
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (thread_index() == 0) {
      st_async(s.x[0], cluster_rank() ^ 1, 1u, s.full);
      mbarrier_wait(s.full, 0);  // @OtherBlocksBarrier
    }
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

struct SentAndOverwritten : Of<32> {
  NAME(SentAndOverwritten)
  using Smem = Room;
  static void run(const Params& p, Smem& s) {
    int t = thread_index(), other = cluster_rank() ^ 1;
    if (t == 0) {
      mbarrier_init(s.full, 1);
      mbarrier_init(s.empty, 1);
      fence_mbarrier_init();
    }
    uint32_t half = shared_address(s.tile.data) + cluster_rank() * 128;
    store_shared(half + t * 4, 1u);
    fence_proxy_async();
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (t == 0) {
      mbarrier_arrive_expect_tx(s.full, 128);
      cp_async_bulk_cluster(half, 128, s.full, other);
    }
    mbarrier_wait(s.full, 0);
    if (t == 0) mbarrier_arrive_cluster(s.empty, other);
    if (!p.bug) mbarrier_wait(s.empty, 0);
    store_shared(half + t * 4, 2u);  // @SentAndOverwritten
    barrier_cluster_arrive();
    barrier_cluster_wait();
  }
};

template <typename K>
std::string small(int bug, int cluster) {
  alignas(128) static uint32_t in[256], out[256];
  for (uint32_t i = 0; i < 256; ++i) in[i] = i;
  Small p = {};
  p.in = {in, 256};
  p.out = {out, 256};
  p.bug = bug;
  Error error = tensor_map<2>(p.map, in, Element::float32, {64, 4}, {256}, {64, 4}, Swizzle::none);
  return error.empty() ? launch<K>(2, cluster, p, nullptr) : error;
}

// ---- the table ----

struct Planted {
  const char* name;     // as at the line of the report
  const char* what;     // for people
  const char* reports;  // what it may say, between " / "
  std::function<std::string(int)> run;
  int bug;
};

#define PIPELINE(cluster, bug, what, reports) \
  {cluster == 1 ? #bug : #bug ", cluster of 2", what, reports, pipeline<cluster>, bug}
#define SMALL(kernel, what, reports) {#kernel, what, reports, [](int bug) { return small<kernel>(bug, 1); }, 1}
#define CLUSTER(kernel, what, reports) {#kernel, what, reports, [](int bug) { return small<kernel>(bug, 2); }, 1}

const Planted planted[] = {
    // clang-format off
    PIPELINE(1, no_init_fence, "no fence.mbarrier_init after the initialisation", "initialised with no fence.mbarrier_init"),
    PIPELINE(1, no_start_barrier, "no block barrier after the initialisation", "no mbarrier was initialised / was initialised with no barrier between"),
    PIPELINE(1, too_few_at_full, "a barrier for fewer arrivals than come", "race: / while the copy from"),
    PIPELINE(1, too_many_at_full, "a barrier for more arrivals than come", "deadlock"),
    PIPELINE(1, no_empty_wait, "a producer that does not wait for an empty stage", "race: / while the copy from / may still read it / more arrivals at the mbarrier"),
    PIPELINE(1, first_parity, "a producer that waits for the parity of the consumer", "deadlock"),
    PIPELINE(1, parity_not_flipped, "a producer that always waits for the same parity", "is waited on twice: the parity was not flipped"),
    PIPELINE(1, too_few_bytes, "fewer bytes expected than copied", "transaction count underflow"),
    PIPELINE(1, too_many_bytes, "more bytes expected than copied", "deadlock"),
    PIPELINE(1, no_expect, "no bytes expected", "race: / while the copy from / transaction count underflow"),
    PIPELINE(1, no_copy_of_b, "one of two copies missing", "deadlock"),
    PIPELINE(1, misaligned_copy, "a copy to where its swizzle cannot start", "is not aligned to 1024 bytes, as its swizzle needs"),
    PIPELINE(1, copy_to_other_stage, "all copies into one stage", "race: / while the copy from / may still read it"),
    PIPELINE(1, one_copy_more, "one copy more than is used", "is in flight when its block exits"),
    PIPELINE(1, one_stage_less, "one copy less than is used", "deadlock"),
    PIPELINE(1, no_scales_arrive, "no arrival for the scales' cp.async", "deadlock"),
    PIPELINE(1, scales_arrive_early, "an arrival before the cp.async that it is for", "race: / while the copy from"),
    PIPELINE(1, scales_beyond_end, "cp.async beyond the end of an array", "of a global array of"),
    PIPELINE(1, no_full_wait, "a consumer that does not wait for a full stage", "race: wgmma reads / while the copy from / which nobody has written"),
    PIPELINE(1, full_wait_twice, "a phase waited on twice", "is waited on twice: the parity was not flipped"),
    PIPELINE(1, scales_before_full, "scales read before their stage is full", "which nobody has written / while the copy from / race: ld.shared reads"),
    PIPELINE(1, release_before_wait, "a stage released while wgmma reads it", "may still read it / race:"),
    PIPELINE(1, load_after_release, "a load from a stage after its release", "race:"),
    PIPELINE(1, no_release, "a stage that is not released", "deadlock"),
    PIPELINE(1, release_by_all_lanes, "a release by each lane, not each warp", "deadlock"),
    PIPELINE(1, release_without_syncwarp, "a release by one lane before others have loaded", "race:"),
    PIPELINE(1, no_wgmma_fence, "no wgmma.fence", "wgmma with no wgmma.fence"),
    PIPELINE(1, accumulator_read, "an accumulator read in flight", "st.global of an accumulator whose wgmma is in flight"),
    PIPELINE(1, accumulator_written, "an accumulator written in flight", "was touched while its wgmma was in flight"),
    PIPELINE(1, accumulator_not_named, "wgmma.wait_group of another accumulator", "does not name an accumulator that it completes"),
    PIPELINE(1, no_wgmma_wait, "no wgmma.wait_group", "of an accumulator whose wgmma is in flight / may still read it"),
    PIPELINE(1, no_k_advance, "a descriptor that stays where k begins", "wrong result"),
    PIPELINE(1, wrong_stride, "a descriptor with another stride", "wrong result"),
    PIPELINE(1, wrong_swizzle, "a descriptor with another swizzle", "of its swizzle"),
    PIPELINE(1, always_accumulates, "sums that do not start from zero", "wrong result"),
    PIPELINE(1, warp_skips_wgmma, "a warp that skips a wgmma", "divergent warpgroup: its warps issue"),
    PIPELINE(1, warps_disagree, "warps with different descriptors", "divergent warpgroup: its warps issue"),
    PIPELINE(1, no_wait_before_staging, "staging overwritten before bulk_wait_group_read", "may still read it"),
    PIPELINE(1, no_barrier_after_wait, "staging overwritten by threads that do not know of that wait", "may still read it / race:"),
    PIPELINE(1, no_barrier_before_store, "a tensor store with no barrier after the threads' writes", "race:"),
    PIPELINE(1, no_proxy_fence, "a tensor store with no fence.proxy.async", "with no fence.proxy.async after it"),
    PIPELINE(1, no_wait_at_exit, "exit before the stores have read", "is in flight when its thread exits"),
    PIPELINE(1, wrong_staging_swizzle, "another swizzle than the tensor map's", "wrong result"),
    PIPELINE(1, store_beyond_end, "st.global beyond the end of an array", "of a global array of"),
    PIPELINE(2, no_start_barrier, "no cluster barrier after the initialisation", "no mbarrier was initialised / was initialised with no barrier between"),
    PIPELINE(2, no_barrier_at_exit, "exit while others of the cluster still arrive", "of the cluster, whose memory is accessed, has exited"),
    PIPELINE(2, releases_own_block_only, "a stage that both blocks write, released to one", "deadlock"),
    PIPELINE(2, release_before_wait, "a stage of the cluster released while wgmma reads it", "may still read it / race:"),
    PIPELINE(2, no_empty_wait, "a multicast into a stage that is not empty", "race: / while the copy from / may still read it / more arrivals at the mbarrier"),
    PIPELINE(2, other_half, "the blocks copy each other's half", "wrong result"),
    SMALL(UnwrittenShared, "shared memory read before it is written", "which nobody has written"),
    SMALL(OutsideShared, "st.shared beyond the block's memory", "outside the block's"),
    SMALL(MisalignedShared, "8 bytes stored at a multiple of 4", "is not aligned to 8 bytes"),
    SMALL(LoadBeyondEnd, "ld.global beyond the end of an array", "of a global array of"),
    SMALL(StoreBeforeBeginning, "st.global before the beginning of an array", "of a global array of"),
    SMALL(MisalignedGlobal, "16 bytes loaded from a multiple of 8", "ld.global is not aligned to 16 bytes"),
    SMALL(OddBulkSize, "cp.async.bulk of an odd size", "no multiple of 16"),
    SMALL(OddBulkSource, "cp.async.bulk from an odd address", "global memory not aligned to 16 bytes"),
    SMALL(BulkBeyondEnd, "cp.async.bulk beyond the end of an array", "of a global array of"),
    SMALL(WrongRank, "a copy of three coordinates with a map of two", "of rank 3 with a tensor map of rank 2"),
    SMALL(NoInit, "an mbarrier that is not initialised", "no mbarrier was initialised"),
    SMALL(InitTwice, "an mbarrier initialised twice", "is initialised twice"),
    SMALL(BarrierOverwritten, "an mbarrier overwritten", "an mbarrier"),
    SMALL(MissingArrive, "a lane that does not arrive", "deadlock"),
    SMALL(BarCount, "bar.sync with different counts", "but others came to it for"),
    SMALL(BarTooFew, "bar.sync that a warp does not come to", "deadlock"),
    SMALL(BarLeftOver, "bar.arrive that nobody waits for", "the block exits with 32 of 64 threads arrived at barrier"),
    SMALL(TooManyArrivals, "more arrivals than an mbarrier is for", "more arrivals at the mbarrier"),
    SMALL(BarTooMany, "more threads at a named barrier than its count", "the block exits with 32 of 64 threads arrived at barrier"),
    SMALL(DivergentSyncwarp, "lanes in different collectives", "divergent warp"),
    SMALL(DivergentShuffle, "a lane that skips a shuffle", "divergent warp"),
    SMALL(ExitedLanes, "a collective after lanes have exited", "needs the whole warp, but lanes of it have exited / exits while others wait"),
    SMALL(RegistersPool, "setmaxnreg.inc to more than others give", "deadlock"),
    SMALL(RegistersDecUp, "setmaxnreg.dec upwards", "setmaxnreg.dec to 176, but the warp has 168"),
    SMALL(RegistersDisagree, "warps of a warpgroup with other registers", "divergent warpgroup: setmaxnreg gave its warps"),
    SMALL(ReadAfterWrite, "a read with no barrier after another warp's write", "race: ld.shared reads / which nobody has written"),
    SMALL(NoSyncwarp, "a read with no barrier after another lane's write", "race: ld.shared reads / which nobody has written"),
    SMALL(WriteAfterWrite, "two writes with no barrier between", "race: st.shared over"),
    SMALL(WriteAfterRead, "a write with no barrier after another warp's read", "race: st.shared over / race: ld.shared reads"),
    SMALL(AsyncCopyNoWait, "cp.async read before cp.async.wait_group", "while the copy from"),
    SMALL(AsyncCopyAtExit, "exit with cp.async in flight", "is in flight when its thread exits"),
    SMALL(AsyncCopyMisaligned, "cp.async of 16 bytes from a multiple of 8", "cp.async is not aligned to 16 bytes"),
    SMALL(AsyncCopyBeyondEnd, "cp.async beyond the end, where it should fill with zeros", "of a global array of"),
    SMALL(StoreNotCommitted, "a bulk store in no group", "is in flight when its thread exits"),
    SMALL(FragmentModified, "A in registers modified in flight", "the operand A in registers"),
    SMALL(NoFenceForB, "wgmma of what threads wrote, with no fence.proxy.async", "with no fence.proxy.async after it"),
    SMALL(OperandOverwritten, "shared memory of B overwritten in flight", "may still read it / race: st.shared over"),
    SMALL(FenceOnce, "no wgmma.fence after the accumulators were used", "wgmma with no wgmma.fence"),
    SMALL(Uncommitted, "a wgmma in no group", "names an accumulator that is still in flight"),
    SMALL(ExitInFlight, "exit with wgmma in flight", "exits with wgmma in flight"),
    SMALL(ConvertedInFlight, "an accumulator converted in flight", "a conversion of an accumulator whose wgmma is in flight"),
    CLUSTER(RemoteArriveAtExit, "an arrival at a block that has exited", "of the cluster, whose memory is accessed, has exited"),
    CLUSTER(RemoteReadNoBarrier, "ld.shared::cluster with no cluster barrier", "race: ld.shared reads / which nobody has written"),
    CLUSTER(ClusterArriveTwice, "barrier.cluster.arrive twice", "barrier.cluster.arrive twice with no wait between"),
    CLUSTER(OtherBlocksBarrier, "st.async for fewer bytes than expected", "deadlock"),
    CLUSTER(SentAndOverwritten, "what a neighbour is sent, overwritten before it has come", "may still read it"),
    // clang-format on
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at != std::string::npos;) {
    size_t next = text.find(" / ", at);
    parts.push_back(text.substr(at, next == std::string::npos ? next : next - at));
    at = next == std::string::npos ? next : next + 3;
  }
  return parts;
}

}  // namespace jaxkern::cuda::bugs

int main() {
  using namespace jaxkern::cuda::bugs;
  namespace sim = jaxkern::cuda::sim;
  int failures = 0;
  for (const Planted& p : planted) {
    std::string caught, report, error;
    std::set<std::string> places;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      sim::configure({.seed = seed});
      std::string without = p.run(0), with = p.run(p.bug);
      if (!without.empty()) error = "without the bug, seed " + std::to_string(seed) + ": " + without;
      if (with.empty()) continue;
      auto words = split(p.reports);
      if (std::none_of(words.begin(), words.end(), [&](auto& w) { return with.find(w) != std::string::npos; }))
        error = "seed " + std::to_string(seed) + ": " + with;
      caught += char('0' + seed);
      if (report.empty()) report = with;
      size_t at = with.find("bugs.cu:");
      if (at != std::string::npos) places.insert(with.substr(at + 8, with.find(':', at + 8) - at - 8));
    }
    if (error.empty() && caught.empty()) error = "not caught";
    std::replace(report.begin(), report.end(), '\n', ';');
    std::replace(error.begin(), error.end(), '\n', ';');
    std::string lines;
    for (auto& place : places) lines += (lines.empty() ? "" : " ") + place;
    printf("%s|%s|%s|%s|%s|%s|%s\n", error.empty() ? "ok" : "FAILED", p.name, p.what, p.reports, caught.c_str(),
           lines.c_str(), error.empty() ? report.c_str() : error.c_str());
    failures += !error.empty();
  }
  return failures > 0;
}
