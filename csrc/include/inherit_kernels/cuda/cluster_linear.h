#pragma once

#include <cmath>

#include "inherit_kernels/cuda/gated_lowrank_linear_sm90.h"
#include "inherit_kernels/cuda/rank_stage.h"

// The kernel behind lowrank_linear_sm90 and gated_lowrank_linear_sm90.
namespace inherit_kernels::cuda {

constexpr int kOutputColumns = 128;  // of one tile of the second stage: 2 x 4 warps of 32 x 32

template <int kRank>
struct ClusterLinearLayout : RankLayout<kRank> {
  using Base = RankLayout<kRank>;
  static constexpr int kStages = kRank == 256 ? 3 : 4;
  static constexpr int kTile = kStageRows * kTileDepth;  // 16-bit elements of 64 columns of t
  static_assert(kOutputColumns * kTileDepth <= Base::kSlotSize, "a tile of up fits a stage");
  static constexpr size_t kSlotBytes = size_t(2) * kStages * Base::kSlotSize;
  static constexpr size_t kTBytes = size_t(2) * Base::kChunks * kTile;
  static constexpr size_t kPartialBytes = sizeof(float) * Base::kPartialSize;
  static constexpr size_t kGateBytes = sizeof(float) * kStageRows * kMaxHeads;
  static constexpr size_t kSharedBytes = kSlotBytes + kTBytes + kPartialBytes + kGateBytes;
  static_assert(kSharedBytes <= 227 * 1024, "what a CTA of sm_90 may use");
};

// Which 64-deep chunk is copied next: first this CTA's share of x and down, then its tiles of up, head by head.
template <class T, int kRank>
struct LinearCopies {
  using Layout = ClusterLinearLayout<kRank>;
  using UpCopy = TileCopy<kOutputColumns, T>;
  const GatedLowrankLinearSm90Call& call;
  T* p_slots;
  int chunks;               // of the first stage, still to be copied
  int column, column_step;  // of the second stage
  TileCopy<kStageRows, T> x;
  TileCopy<kRank, T> down;
  UpCopy up;
  int inputs;  // of the depth, from this thread's unit on
  int depth = 0, head = 0, slot = 0;

  __device__ __forceinline__ LinearCopies(const GatedLowrankLinearSm90Call& call, T* p_slots, int64_t first_row,
                                          Share share, int column, int column_step)
      : call(call), p_slots(p_slots), chunks(share.end - share.begin), column(column), column_step(column_step) {
    const int64_t k = static_cast<int64_t>(share.begin) * kTileDepth, rows = call.rows - first_row;
    x = {static_cast<const T*>(call.x) + first_row * call.x_stride + k, call.x_stride,
         static_cast<int>(rows < kStageRows ? rows : kStageRows)};
    down = {static_cast<const T*>(call.down) + k, call.down_stride, static_cast<int>(call.rank)};
    inputs = static_cast<int>(call.in - k) - UpCopy::unit() * kUnit;
    place_up();
  }

  __device__ __forceinline__ void place_up() {
    const T* p_up = static_cast<const T*>(call.up) + head * call.up_head_stride + column * call.up_stride;
    up = {p_up, call.up_stride, static_cast<int>(call.out) - column};
  }

  __device__ __forceinline__ void copy_x() const { x.start(p_slots + slot * Layout::kSlotSize, inputs > 0); }

  __device__ __forceinline__ void copy_weights() const {
    T* p_slot = p_slots + slot * Layout::kSlotSize;
    if (chunks > 0) {
      down.start(p_slot + kStageRows * kTileDepth, inputs > 0);
    } else if (column < call.out) {
      up.start(p_slot, depth + UpCopy::unit() * kUnit < call.rank);
    }
  }

  __device__ __forceinline__ void advance() {
    slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
    if (chunks > 0) {
      --chunks;
      x.p += kTileDepth;
      down.p += kTileDepth;
      inputs -= kTileDepth;
      return;
    }
    depth += kTileDepth;
    up.p += kTileDepth;
    if (depth < call.rank) return;
    depth = 0;
    if (++head == call.heads) {
      head = 0;
      column += column_step;
    }
    place_up();
  }

  __device__ __forceinline__ void next() {
    if (chunks > 0) copy_x();
    copy_weights();
    commit_copies();
    advance();
  }

  // Fills all stages but one; the weights' copies start before the previous kernel of the stream has ended.
  __device__ __forceinline__ void start() {
    LinearCopies ahead = *this;
#pragma unroll 1
    for (int i = 0; i < Layout::kStages - 1; ++i) {
      ahead.copy_weights();
      ahead.advance();
    }
    wait_previous_grid();
#pragma unroll 1
    for (int i = 0; i < Layout::kStages - 1; ++i) {
      if (chunks > 0) copy_x();
      commit_copies();
      advance();
    }
  }
};

// Logits of one row by the kRank / 8 lanes that hold its t, then the softmax; lane h of them returns g_h.
template <class T, int kRank>
__device__ __forceinline__ float gate_of_row(const GatedLowrankLinearSm90Call& call, const float (&t)[kUnit],
                                             int unit) {
  constexpr int kLanes = RankLayout<kRank>::kRowUnits;
  const T* p_weight = static_cast<const T*>(call.gate_weight) + unit * kUnit;
  const T* p_bias = static_cast<const T*>(call.gate_bias);
  constexpr int kAtOnce = 4;  // heads, so that their loads and shuffles overlap
  float logit = -INFINITY;
  for (int first = 0; first < call.heads; first += kAtOnce) {
    float sum[kAtOnce] = {}, weight[kUnit];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= call.heads || unit * kUnit >= call.rank) continue;
      load_unit(weight, p_weight + (first + n) * call.rank, kUnit, true);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum[n] += t[i] * weight[i];
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2)
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) sum[n] += shuffle_xor(sum[n], mask);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (unit == first + n) logit = sum[n];
  }
  if (unit >= call.heads) logit = -INFINITY;
  if (p_bias && unit < call.heads) logit += to_float(p_bias[unit]);
  float largest = logit;
#pragma unroll
  for (int mask = kMaxHeads / 2; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
  const float weight = unit < call.heads ? expf(logit - largest) : 0.0f;
  float total = weight;
#pragma unroll
  for (int mask = kMaxHeads / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  return weight / total;
}

// Adds up the rows that this CTA owns and hands t, and the gates, to the whole cluster.
template <class T, int kRank, bool kGated>
__device__ __forceinline__ void share_t(const GatedLowrankLinearSm90Call& call, const Group<true>& cluster, int rank,
                                        int64_t first_row, float* p_partial, T* p_t, float* p_gates) {
  using Layout = ClusterLinearLayout<kRank>;
  const int rows = kStageRows / cluster.count;
  for (int i = threadIdx.x; i < rows * Layout::kRowUnits; i += kTileThreads) {
    const int row = rank * rows + i / Layout::kRowUnits, unit = i % Layout::kRowUnits;
    float t[kUnit];
    sum_partials<kRank>(t, cluster, p_partial, row, unit, static_cast<int>(call.rank));
    const bool wanted = call.t != nullptr && first_row + row < call.rows && unit * kUnit < call.rank;
    T* p_global = wanted ? static_cast<T*>(call.t) + (first_row + row) * call.t_stride + unit * kUnit : nullptr;
    publish_unit(cluster, tile_unit(p_t + unit / kTileUnits * Layout::kTile, row, unit % kTileUnits), p_global, t);
    if constexpr (kGated) {
      const float gate = gate_of_row<T, kRank>(call, t, unit);
      if (unit < kMaxHeads)
        for (int peer = 0; peer < cluster.count; ++peer) cluster.of(p_gates + row * kMaxHeads + unit, peer)[0] = gate;
    }
  }
}

// acc [32, 32] of this warp = t · up_tileᵀ for one head and 128 columns.
template <class T, int kRank>
__device__ __forceinline__ void multiply_up(Accumulator (&acc)[2][4], LinearCopies<T, kRank>& copies, int& slot,
                                            const T* p_t) {
  using Layout = ClusterLinearLayout<kRank>;
  const int warp = threadIdx.x / 32;
  clear(acc);
  for (int depth = 0; depth < copies.call.rank; depth += kTileDepth) {
    wait_copies<Layout::kStages - 2>();
    __syncthreads();
    copies.next();
    const T* p_t_tile = p_t + depth / kTileDepth * Layout::kTile;
#pragma unroll
    for (int step = 0; step < kTileDepth / 16; ++step)
      multiply_step(acc, p_t_tile, warp % 2 * 32, copies.p_slots + slot * Layout::kSlotSize, warp / 2 * 32, step);
    slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
  }
}

// y = act(acc + bias + residual) for this warp's 32 x 32 outputs; the loads of its four rows go out together.
template <class T, bool kGated>
__device__ __forceinline__ void store_outputs(const GatedLowrankLinearSm90Call& call, const Accumulator (&acc)[2][4],
                                              int64_t first_row, int64_t first_column, const float* p_gates) {
  constexpr int kRows = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % 2 * 32 + lane / 4;
  const int64_t column = first_column + warp / 2 * 32 + lane % 4 * kUnit, count = call.out - column;
  const T *p_bias = static_cast<const T*>(call.bias), *p_residual = static_cast<const T*>(call.residual);
  const bool bias_aligned = aligned16(p_bias, call.out), y_aligned = aligned16(call.y, call.y_stride);
  const bool residual_aligned = aligned16(p_residual, call.residual_stride);
  float z[kRows][kUnit];
#pragma unroll
  for (int i = 0; i < kRows; ++i) gather_row_unit(z[i], acc[i / 2], i % 2);
  if (count <= 0) return;
  if (p_bias) {
    for (int head = 0; head < call.heads; ++head) {
      float bias[kUnit];
      load_unit(bias, p_bias + head * call.out + column, count, bias_aligned);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float gate = kGated ? p_gates[(warp_row + i * 8) * kMaxHeads + head] : 1.0f;
#pragma unroll
        for (int k = 0; k < kUnit; ++k) z[i][k] += gate * bias[k];
      }
    }
  }
  if (p_residual) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first_row + warp_row + i * 8;
      add_unit(z[i], 1.0f, p_residual + row * call.residual_stride + column, row < call.rows ? count : 0,
               residual_aligned);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first_row + warp_row + i * 8;
    if (row >= call.rows) continue;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) z[i][k] = activate(z[i][k], call.activation);
    store_unit(static_cast<T*>(call.y) + row * call.y_stride + column, z[i], count, y_aligned);
  }
}

// total += gate of the row * acc
__device__ __forceinline__ void add_head(Accumulator (&total)[2][4], const Accumulator (&acc)[2][4],
                                         const float* p_gates, int head) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 2 * 32 + lane / 4;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float gate = p_gates[(first_row + m * 16 + half * 8) * kMaxHeads + head];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        total[m][n].r[half * 2] += gate * acc[m][n].r[half * 2];
        total[m][n].r[half * 2 + 1] += gate * acc[m][n].r[half * 2 + 1];
      }
    }
}

template <class T, int kRank, bool kGated>
__global__ void __launch_bounds__(kTileThreads, 1) cluster_linear_kernel(const GatedLowrankLinearSm90Call call) {
  using Layout = ClusterLinearLayout<kRank>;
  char* p_memory = shared_memory<char>();
  T* p_slots = reinterpret_cast<T*>(p_memory);
  T* p_t = reinterpret_cast<T*>(p_memory + Layout::kSlotBytes);
  float* p_partial = reinterpret_cast<float*>(p_memory + Layout::kSlotBytes + Layout::kTBytes);
  float* p_gates = p_partial + Layout::kPartialSize;

  const Group<true> cluster{0, cluster_size()};
  const int rank = cluster_rank();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / cluster.count) * kStageRows;
  const Share chunks = share_of(ceil_divide(static_cast<int>(call.in), kTileDepth), rank, cluster.count);
  const int first_column = rank * kOutputColumns, column_step = cluster.count * kOutputColumns;
  LinearCopies<T, kRank> copies(call, p_slots, first_row, chunks, first_column, column_step);
  copies.start();

  int slot = 0;
  {
    typename Layout::Sums sums;
    clear(sums);
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      wait_copies<Layout::kStages - 2>();
      __syncthreads();
      copies.next();
      multiply_chunk<kRank>(sums, p_slots + slot * Layout::kSlotSize);
      slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
    }
    store_partial<kRank>(p_partial, sums);
  }
  release_next_grid();
  cluster_sync();
  share_t<T, kRank, kGated>(call, cluster, rank, first_row, p_partial, p_t, p_gates);
  cluster_sync();  // also: no CTA leaves while another still reads its partial

  for (int column = first_column; column < call.out; column += column_step) {
    Accumulator total[2][4];
    if constexpr (kGated) {
      clear(total);
      for (int head = 0; head < call.heads; ++head) {
        Accumulator acc[2][4];
        multiply_up<T, kRank>(acc, copies, slot, p_t);
        add_head(total, acc, p_gates, head);
      }
    } else {
      multiply_up<T, kRank>(total, copies, slot, p_t);
    }
    store_outputs<T, kGated>(call, total, first_row, column, p_gates);
  }
}

// The largest cluster with which all CTAs still run at once.
inline int choose_cluster(int64_t tiles, int multiprocessors) {
  int cluster = 8;
  while (cluster > 2 && !run_at_once(tiles, cluster, multiprocessors)) cluster /= 2;
  return cluster;
}

inline const char* cluster_linear_declines(const GatedLowrankLinearSm90Call& call) {
  if (call.dtype != kFloat16 && call.dtype != kBFloat16)
    return "only float16 and bfloat16 are computed on tensor cores here";
  if (call.rank < 8 || call.rank > 256) return "the rank must lie between 8 and 256";
  if (call.rank % kUnit != 0 || call.in % kUnit != 0 || call.in == 0)
    return "the rank and the number of inputs must be multiples of 8";
  if (!aligned16(call.x, call.x_stride) || !aligned16(call.down, call.down_stride) ||
      !aligned16(call.up, call.up_stride) || !aligned16(call.t, call.t_stride) || call.up_head_stride % kUnit != 0 ||
      !aligned16(call.gate_weight))
    return "rows of x, down, up, gate_weight and t must be aligned to 16 bytes";
  if (call.in > kMaxSize || call.out > kMaxSize) return "in and out must be below 2^30";
  if (call.heads < 1 || call.heads > kMaxHeads) return "the number of heads must lie between 1 and 8";
  if (call.cluster != 0 && call.cluster != 2 && call.cluster != 4 && call.cluster != 8)
    return "a cluster has 2, 4 or 8 CTAs";
  return nullptr;
}

template <class T, int kRank, bool kGated>
int launch_cluster_linear(const GatedLowrankLinearSm90Call& call) {
  const int64_t tiles = ceil_divide<int64_t>(call.rows, kStageRows);
  Shape shape;
  shape.cluster = call.cluster != 0 ? call.cluster : choose_cluster(tiles, call.multiprocessors);
  if (tiles * shape.cluster > INT32_MAX) return static_cast<int>(cudaErrorNotSupported);
  shape.grid = dim3(static_cast<unsigned>(tiles * shape.cluster));
  shape.block = dim3(kTileThreads);
  shape.shared_bytes = ClusterLinearLayout<kRank>::kSharedBytes;
  shape.after_previous = call.after_previous;
  return static_cast<int>(
      launch(shape, static_cast<cudaStream_t>(call.stream), cluster_linear_kernel<T, kRank, kGated>, call));
}

template <class T, bool kGated>
int launch_for_rank(const GatedLowrankLinearSm90Call& call) {
  if (call.rank <= 64) return launch_cluster_linear<T, 64, kGated>(call);
  if (call.rank <= 128) return launch_cluster_linear<T, 128, kGated>(call);
  return launch_cluster_linear<T, 256, kGated>(call);
}

template <bool kGated>
int run_cluster_linear(const GatedLowrankLinearSm90Call& call) {
  if (cluster_linear_declines(call) != nullptr) return static_cast<int>(cudaErrorNotSupported);
  if (call.rows == 0 || call.out == 0) return cudaSuccess;
  return call.dtype == kFloat16 ? launch_for_rank<half16, kGated>(call) : launch_for_rank<bf16, kGated>(call);
}

}  // namespace inherit_kernels::cuda
