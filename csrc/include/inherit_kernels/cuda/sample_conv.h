#pragma once

#include <cmath>

#include "inherit_kernels/cuda/gated_lowrank_conv2d.h"
#include "inherit_kernels/cuda/rank_stage.h"

// The kernel behind gated_lowrank_conv2d (one CTA a sample) and gated_lowrank_conv2d_sm90 (one cluster a sample).
//
// Positions form tiles of 64. With at least as many CTAs as tiles, the CTAs are dealt out evenly to the tiles, those of
// one tile share the depth of the first product and the columns of the second; with fewer, each CTA computes several
// tiles in turn ("rounds"). The sums over positions are taken from the float32 partials, so that the gate is known one
// cluster barrier after the first product, together with t.
namespace inherit_kernels::cuda {

constexpr int kMaxPositions = 256;
constexpr int kMixedColumns = 64;  // columns of the second product for which Σ_h g_h up_h is formed at a time

template <int kRank>
struct SampleConvLayout : RankLayout<kRank> {
  using Base = RankLayout<kRank>;
  static constexpr int kStages = kRank == 64 ? 4 : 3;
  static constexpr int kSumRows = 2 * Base::kGroups;  // rows of warps that each sum their own positions
  static constexpr int kMixedSize = kMixedColumns * kRank;
  static constexpr size_t kSlotBytes = size_t(2) * kStages * Base::kSlotSize;
  static constexpr size_t kPartialBytes = sizeof(float) * Base::kPartialSize;
  // The partial is dead before the first mixed tile; two of these, so that one is read while the other is written.
  static_assert(size_t(2) * 2 * kMixedSize <= kPartialBytes, "mixed tiles take the partial's place");
  static constexpr size_t kSumBytes = sizeof(float) * (kSumRows + 1) * kRank;  // and the mean
  static constexpr size_t kGateBytes = sizeof(float) * kTileWarps * kMaxHeads;
  static constexpr size_t shared_bytes(int t_rows) {
    return kSlotBytes + kPartialBytes + kSumBytes + kGateBytes + size_t(2) * kRank * t_rows;
  }
};

// How a sample's positions and CTAs are matched.
struct SamplePlan {
  int positions, tiles, splits, tile_step, rounds, t_rows;

  __host__ __device__ SamplePlan(int positions, int cluster) : positions(positions) {
    tiles = ceil_divide(positions, kStageRows);
    splits = cluster >= tiles ? cluster / tiles : 1;
    splits = splits >= 8 ? 8 : splits >= 4 ? 4 : splits >= 2 ? 2 : 1;
    tile_step = cluster / splits;
    rounds = ceil_divide(tiles, tile_step);
    const int needed = ceil_divide(positions, 16) * 16;  // the second product goes in steps of 16 rows
    t_rows = tile_step == 1 && needed < rounds * kStageRows ? needed : rounds * kStageRows;
  }
};

struct SampleConvArguments : GatedLowrankConv2dCall {
  int t_rows, window;  // window: channels * kernel_height * kernel_width
};

// Which 64-deep chunk is copied next: this CTA's share of windows of x and of down, round by round, then its tiles of
// up, head by head. A thread always copies the same unit of its rows, so it keeps one place in the window.
template <class T, int kRank>
struct SampleCopies {
  using Layout = SampleConvLayout<kRank>;
  using UpCopy = TileCopy<kMixedColumns, T>;
  static constexpr int kRows = kStageRows / UpCopy::kRowStep;  // of x, that a thread copies: 2
  static constexpr int kOutside = INT32_MIN / 2;               // the top of a window whose position does not exist
  const SampleConvArguments& call;
  const SamplePlan& plan;
  T* p_slots;
  const T* p_sample;
  Share share;
  int tile, column, column_step;
  TileCopy<kRank, T> down;
  UpCopy up;
  int round = 0, chunk = 0, depth = 0, head = 0, slot = 0;
  int top[kRows] = {}, left[kRows] = {};  // of the windows
  int channel = 0, i = 0, j = 0;          // in the window

  __device__ __forceinline__ SampleCopies(const SampleConvArguments& call, const SamplePlan& plan, T* p_slots,
                                          const T* p_sample, Share share, int tile, int column, int column_step)
      : call(call),
        plan(plan),
        p_slots(p_slots),
        p_sample(p_sample),
        share(share),
        tile(tile),
        column(column),
        column_step(column_step) {
    skip_empty();
    place_up();
  }

  __device__ __forceinline__ bool in_first_stage() const { return round < plan.rounds; }

  __device__ __forceinline__ void skip_empty() {
    while (round < plan.rounds && (tile >= plan.tiles || share.begin == share.end)) {
      ++round;
      tile += plan.tile_step;
    }
    if (in_first_stage()) place_windows();
  }

  __device__ __forceinline__ void place_windows() {
    chunk = share.begin;
    const int first = chunk * kTileDepth + UpCopy::unit() * kUnit, channels = static_cast<int>(call.channels);
    const int tap = first / channels;
    channel = first % channels;
    i = tap / call.kernel_width;
    j = tap % call.kernel_width;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int position = tile * kStageRows + UpCopy::first_row() + row * UpCopy::kRowStep;
      const bool exists = position < plan.positions;
      top[row] = exists ? position / call.out_width * call.stride_height - call.padding_height : kOutside;
      left[row] = position % call.out_width * call.stride_width - call.padding_width;
    }
    down = {static_cast<const T*>(call.down) + chunk * kTileDepth, call.window, static_cast<int>(call.rank)};
  }

  __device__ __forceinline__ void place_up() {
    const T* p_up = static_cast<const T*>(call.up) + (head * call.out + column) * call.rank + depth;
    up = {p_up, call.rank, static_cast<int>(call.out) - column};
  }

  __device__ __forceinline__ void copy_x() const {
    T* p_to = tile_unit(p_slots + slot * Layout::kSlotSize, UpCopy::first_row(), UpCopy::unit());
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int y = top[row] + i * call.dilation_height, x = left[row] + j * call.dilation_width;
      const bool valid = (i < call.kernel_height) & (static_cast<unsigned>(y) < static_cast<unsigned>(call.height)) &
                         (static_cast<unsigned>(x) < static_cast<unsigned>(call.width));
      const T* p_x = p_sample + ((y * call.width + x) * static_cast<int>(call.channels) + channel);
      copy16_async(p_to + row * UpCopy::kRowStep * kTileDepth, valid ? p_x : p_sample, valid);
    }
  }

  __device__ __forceinline__ void copy_weights() const {
    T* p_slot = p_slots + slot * Layout::kSlotSize;
    if (in_first_stage()) {
      down.start(p_slot + kStageRows * kTileDepth, i < call.kernel_height);
    } else if (column < call.out) {
      up.start(p_slot, depth + UpCopy::unit() * kUnit < call.rank);
    }
  }

  __device__ __forceinline__ void advance() {
    slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
    if (in_first_stage()) {
      advance_window();
      return;
    }
    if (++head == call.heads) {
      head = 0;
      depth += kTileDepth;
      if (depth >= call.rank) {
        depth = 0;
        column += column_step;
      }
    }
    place_up();
  }

  __device__ __forceinline__ void advance_window() {
    if (++chunk == share.end) {
      ++round;
      tile += plan.tile_step;
      skip_empty();
      return;
    }
    down.p += kTileDepth;
    channel += kTileDepth;
    while (channel >= call.channels) {
      channel -= static_cast<int>(call.channels);
      if (++j == call.kernel_width) {
        j = 0;
        ++i;
      }
    }
  }

  __device__ __forceinline__ void next() {
    if (in_first_stage()) copy_x();
    copy_weights();
    commit_copies();
    advance();
  }

  // Fills all stages but one; the weights' copies start before the previous kernel of the stream has ended.
  __device__ __forceinline__ void start() {
    SampleCopies ahead = *this;
#pragma unroll 1
    for (int n = 0; n < Layout::kStages - 1; ++n) {
      ahead.copy_weights();
      ahead.advance();
    }
    wait_previous_grid();
#pragma unroll 1
    for (int n = 0; n < Layout::kStages - 1; ++n) {
      if (in_first_stage()) copy_x();
      commit_copies();
      advance();
    }
  }
};

// The first product of one tile, this CTA's share of the depth.
template <class T, int kRank>
__device__ __forceinline__ void multiply_windows(typename RankLayout<kRank>::Sums& sums, SampleCopies<T, kRank>& copies,
                                                 int& slot) {
  using Layout = SampleConvLayout<kRank>;
  clear(sums);
  for (int chunk = copies.share.begin; chunk < copies.share.end; ++chunk) {
    wait_copies<Layout::kStages - 2>();
    __syncthreads();
    copies.next();
    multiply_chunk<kRank>(sums, copies.p_slots + slot * Layout::kSlotSize);
    slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
  }
}

// p_sums [kSumRows, kRank] = or += the sums over this tile's positions, each entry by one thread of one warp.
template <int kRank>
__device__ __forceinline__ void sum_positions(float* p_sums, const typename RankLayout<kRank>::Sums& sums,
                                              int positions, bool first) {
  using Layout = SampleConvLayout<kRank>;
  const WarpPlace<kRank> place;
  const int lane = threadIdx.x % 32;
  float* p_row = p_sums + (place.group * 2 + place.row / 32) * kRank + place.column + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Layout::kBlocks; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = 0.0f;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (place.row + m * 16 + half * 8 + lane / 4 < positions) total += sums[m][n].r[half * 2 + e];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
      if (lane < 4) p_row[n * 8 + e] = first ? total : p_row[n * 8 + e] + total;
    }
}

// Adds up the rows of a tile that this CTA owns and hands t to the CTAs of the tile.
template <class T, int kRank, bool kCluster>
__device__ __forceinline__ void share_t(const SampleConvArguments& call, const SamplePlan& plan,
                                        const Group<kCluster>& group, int split, int tile, int round, float* p_partial,
                                        T* p_t) {
  using Layout = SampleConvLayout<kRank>;
  const int rows = kStageRows / group.count;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / (kCluster ? cluster_size() : 1)) * plan.positions;
  for (int n = threadIdx.x; n < rows * Layout::kRowUnits; n += kTileThreads) {
    const int row = split * rows + n / Layout::kRowUnits, unit = n % Layout::kRowUnits;
    const int t_row = round * kStageRows + row, position = tile * kStageRows + row;
    if (t_row >= call.t_rows) continue;
    float t[kUnit];
    sum_partials<kRank>(t, group, p_partial, row, unit, static_cast<int>(call.rank));
    const bool wanted = call.t != nullptr && position < plan.positions && unit * kUnit < call.rank;
    T* p_global = wanted ? static_cast<T*>(call.t) + (first_row + position) * call.rank + unit * kUnit : nullptr;
    T* p_tile = p_t + unit / kTileUnits * call.t_rows * kTileDepth;
    publish_unit(group, tile_unit(p_tile, t_row, unit % kTileUnits), p_global, t);
  }
}

// p_mean [kRank] from the sums of all CTAs of the sample, in the order of their ranks.
template <int kRank, bool kCluster>
__device__ __forceinline__ void take_mean(float* p_mean, float* p_sums, const Group<kCluster>& sample, int positions) {
  using Layout = SampleConvLayout<kRank>;
  for (int column = threadIdx.x; column < kRank; column += kTileThreads) {
    float total = 0.0f;
    for (int peer = 0; peer < sample.count; ++peer) {
      const float* p_peer = sample.of(p_sums, peer);
#pragma unroll
      for (int row = 0; row < Layout::kSumRows; ++row) total += p_peer[row * kRank + column];
    }
    p_mean[column] = total / static_cast<float>(positions);
  }
}

// p_gates [heads] = softmax(mean · gate_weightᵀ + gate_bias), by every warp for itself: no barrier of the block.
template <class T>
__device__ __forceinline__ void take_gates(float* p_gates, const SampleConvArguments& call, const float* p_mean) {
  const int lane = threadIdx.x % 32;
  const T *p_weight = static_cast<const T*>(call.gate_weight), *p_bias = static_cast<const T*>(call.gate_bias);
  constexpr int kAtOnce = 4;  // heads, so that their loads and shuffles overlap
  float logit = -INFINITY;
  for (int first = 0; first < call.heads; first += kAtOnce) {
    float sum[kAtOnce] = {};
    for (int64_t r = lane; r < call.rank; r += 32)
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
        if (first + n < call.heads) sum[n] += p_mean[r] * to_float(p_weight[(first + n) * call.rank + r]);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      sum[n] = warp_sum(sum[n]);
      if (lane == first + n) logit = sum[n];
    }
  }
  if (lane >= call.heads) logit = -INFINITY;
  if (p_bias && lane < call.heads) logit += to_float(p_bias[lane]);
  const float largest = warp_max(logit);
  const float weight = lane < call.heads ? expf(logit - largest) : 0.0f;
  const float total = warp_sum(weight);
  if (lane < call.heads) p_gates[lane] = weight / total;
  __syncwarp();
}

// p_mixed [64, kRank] = Σ_h g_h up_h for 64 columns, rounded once. A thread reads only what it copied itself.
template <class T, int kRank>
__device__ __forceinline__ void mix_heads(T* p_mixed, SampleCopies<T, kRank>& copies, int& slot, const float* p_gates) {
  using Layout = SampleConvLayout<kRank>;
  constexpr int kRows = kMixedColumns * kTileUnits / kTileThreads, kRowStep = kTileThreads / kTileUnits;
  const int first_row = threadIdx.x / kTileUnits, unit = threadIdx.x % kTileUnits;
  for (int depth = 0; depth < copies.call.rank; depth += kTileDepth) {
    float mixed[kRows][kUnit] = {};
    for (int head = 0; head < copies.call.heads; ++head) {
      wait_copies<Layout::kStages - 2>();
      T* p_slot = copies.p_slots + slot * Layout::kSlotSize;
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        add_unit(mixed[row], p_gates[head], tile_unit(p_slot, first_row + row * kRowStep, unit), kUnit, true);
      copies.next();
      slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
    }
    T* p_tile = p_mixed + depth / kTileDepth * kMixedColumns * kTileDepth;
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      store_unit(tile_unit(p_tile, first_row + row * kRowStep, unit), mixed[row], kUnit, true);
  }
}

// y for 16 positions x 32 columns: act(acc + Σ_h g_h bias_h + residual).
template <class T>
__device__ __forceinline__ void store_outputs(const SampleConvArguments& call, const Accumulator (&acc)[1][4],
                                              int64_t first_row, int rows, int64_t first_column, const float* p_gates) {
  constexpr int kRows = 2;
  const int lane = threadIdx.x % 32;
  const int64_t column = first_column + lane % 4 * kUnit, count = call.out - column;
  const T *p_bias = static_cast<const T*>(call.bias), *p_residual = static_cast<const T*>(call.residual);
  const bool bias_aligned = aligned16(p_bias, call.out), y_aligned = aligned16(call.y, call.out);
  const bool residual_aligned = aligned16(p_residual, call.out);
  float z[kRows][kUnit], bias[kUnit] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) gather_row_unit(z[i], acc[0], i);
  if (count <= 0) return;
  if (p_bias)
    for (int head = 0; head < call.heads; ++head)
      add_unit(bias, p_gates[head], p_bias + head * call.out + column, count, bias_aligned);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = i * 8 + lane / 4;
    if (row >= rows) continue;
    const int64_t place = (first_row + row) * call.out + column;
    float residual[kUnit] = {};
    if (p_residual) load_unit(residual, p_residual + place, count, residual_aligned);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) z[i][k] = activate(z[i][k] + bias[k] + residual[k], call.activation);
    store_unit(static_cast<T*>(call.y) + place, z[i], count, y_aligned);
  }
}

// The second product for 64 columns: warps take pieces of 16 positions x 32 columns in turn.
template <class T, int kRank>
__device__ __forceinline__ void multiply_mixed(const SampleConvArguments& call, const SamplePlan& plan, int first_tile,
                                               int64_t sample_row, int64_t column, const T* p_t, const T* p_mixed,
                                               const float* p_gates) {
  const int pieces = call.t_rows / 16 * 2;
  for (int piece = threadIdx.x / 32; piece < pieces; piece += kTileWarps) {
    const int t_row = piece / 2 * 16, warp_column = piece % 2 * 32;
    const int tile = first_tile + t_row / kStageRows * plan.tile_step;
    const int position = tile * kStageRows + t_row % kStageRows;
    if (position >= plan.positions || column + warp_column >= call.out) continue;
    Accumulator acc[1][4];
    clear(acc);
    for (int chunk = 0; chunk * kTileDepth < call.rank; ++chunk)
#pragma unroll
      for (int step = 0; step < kTileDepth / 16; ++step)
        multiply_step(acc, p_t + chunk * call.t_rows * kTileDepth, t_row, p_mixed + chunk * kMixedColumns * kTileDepth,
                      warp_column, step);
    store_outputs<T>(call, acc, sample_row + position, plan.positions - position, column + warp_column, p_gates);
  }
}

template <bool kCluster>
__device__ __forceinline__ void sync_sample() {
  if constexpr (kCluster) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

template <class T, int kRank, bool kCluster>
__global__ void __launch_bounds__(kTileThreads, 1) sample_conv_kernel(const SampleConvArguments call) {
  using Layout = SampleConvLayout<kRank>;
  char* p_memory = shared_memory<char>();
  T* p_slots = reinterpret_cast<T*>(p_memory);
  float* p_partial = reinterpret_cast<float*>(p_memory + Layout::kSlotBytes);
  T* p_mixed = reinterpret_cast<T*>(p_partial);
  float* p_sums = p_partial + Layout::kPartialSize;
  float* p_mean = p_sums + Layout::kSumRows * kRank;
  float* p_gates = p_mean + kRank + threadIdx.x / 32 * kMaxHeads;  // each warp has its own
  T* p_t = reinterpret_cast<T*>(p_mean + kRank + kTileWarps * kMaxHeads);

  int rank = 0, size = 1;
  if constexpr (kCluster) {
    rank = cluster_rank();
    size = cluster_size();
  }
  const SamplePlan plan(call.out_height * call.out_width, size);
  const int split = rank % plan.splits, first_tile = rank / plan.splits;
  const int64_t sample = blockIdx.x / size;
  const T* p_sample = static_cast<const T*>(call.x) + sample * call.height * call.width * call.channels;
  const Share share = share_of(ceil_divide(call.window, kTileDepth), split, plan.splits);
  const Group<kCluster> group{first_tile * plan.splits, plan.splits}, all{0, size};
  // CTAs of a tile that does not exist only take part in the barriers.
  const int first_column = first_tile < plan.tiles ? split * kMixedColumns : static_cast<int>(call.out);
  const int column_step = plan.splits * kMixedColumns;
  SampleCopies<T, kRank> copies(call, plan, p_slots, p_sample, share, first_tile, first_column, column_step);
  copies.start();

  int slot = 0;
  for (int round = 0; round < plan.rounds; ++round) {
    const int tile = first_tile + round * plan.tile_step;
    const bool exists = tile < plan.tiles;
    typename Layout::Sums sums;
    if (exists) {
      multiply_windows(sums, copies, slot);
      store_partial<kRank>(p_partial, sums);
    } else {
      clear(sums);
    }
    if (exists || round == 0) sum_positions<kRank>(p_sums, sums, plan.positions - tile * kStageRows, round == 0);
    sync_sample<kCluster>();
    if (exists) share_t<T, kRank>(call, plan, group, split, tile, round, p_partial, p_t);
  }
  release_next_grid();
  take_mean<kRank>(p_mean, p_sums, all, plan.positions);
  sync_sample<kCluster>();  // also: no CTA leaves, or overwrites its partial, while another still reads it

  take_gates<T>(p_gates, call, p_mean);
  int turn = 0;
  for (int column = first_column; column < call.out; column += column_step, turn ^= 1) {
    T* p_tile = p_mixed + turn * Layout::kMixedSize;
    mix_heads(p_tile, copies, slot, p_gates);
    __syncthreads();
    multiply_mixed<T, kRank>(call, plan, first_tile, sample * plan.positions, column, p_t, p_tile, p_gates);
  }
}

inline const char* sample_conv_declines(const GatedLowrankConv2dCall& call) {
  if (call.dtype != kFloat16 && call.dtype != kBFloat16)
    return "only float16 and bfloat16 are computed on tensor cores here";
  if (call.rank < 8 || call.rank > 256) return "the rank must lie between 8 and 256";
  if (call.rank % kUnit != 0 || call.channels % kUnit != 0 || call.channels == 0)
    return "the rank and the number of channels must be multiples of 8";
  if (!aligned16(call.x) || !aligned16(call.down) || !aligned16(call.up) || !aligned16(call.t))
    return "x, down, up and t must be aligned to 16 bytes";
  if (call.channels * call.height * call.width > kMaxSize || call.out > kMaxSize ||
      call.channels * call.kernel_height * call.kernel_width > kMaxSize)
    return "a sample, a window and out must be below 2^30 elements";
  if (call.heads < 1 || call.heads > kMaxHeads) return "the number of heads must lie between 1 and 8";
  const int64_t positions = static_cast<int64_t>(call.out_height) * call.out_width;
  if (positions < 1 || positions > kMaxPositions) return "a map must have 1 to 256 output positions";
  return nullptr;
}

inline int rank_block(int64_t rank) {
  return rank <= 64 ? 64 : rank <= 128 ? 128 : 256;
}

inline size_t sample_conv_shared_bytes(const GatedLowrankConv2dCall& call, int cluster) {
  const int t_rows = SamplePlan(call.out_height * call.out_width, cluster).t_rows;
  switch (rank_block(call.rank)) {
    case 64:
      return SampleConvLayout<64>::shared_bytes(t_rows);
    case 128:
      return SampleConvLayout<128>::shared_bytes(t_rows);
    default:
      return SampleConvLayout<256>::shared_bytes(t_rows);
  }
}

template <class T, int kRank, bool kCluster>
int launch_sample_conv(const GatedLowrankConv2dCall& call, int cluster) {
  if (call.batch * cluster > INT32_MAX) return static_cast<int>(cudaErrorNotSupported);
  SampleConvArguments arguments{};
  static_cast<GatedLowrankConv2dCall&>(arguments) = call;
  arguments.window = static_cast<int>(call.channels * call.kernel_height * call.kernel_width);
  arguments.t_rows = SamplePlan(call.out_height * call.out_width, cluster).t_rows;
  Shape shape;
  shape.grid = dim3(static_cast<unsigned>(call.batch * cluster));
  shape.block = dim3(kTileThreads);
  shape.cluster = cluster;
  shape.shared_bytes = SampleConvLayout<kRank>::shared_bytes(arguments.t_rows);
  shape.after_previous = call.after_previous;
  return static_cast<int>(
      launch(shape, static_cast<cudaStream_t>(call.stream), sample_conv_kernel<T, kRank, kCluster>, arguments));
}

}  // namespace inherit_kernels::cuda
