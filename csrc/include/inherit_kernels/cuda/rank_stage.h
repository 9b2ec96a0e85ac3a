#pragma once

#include "inherit_kernels/cuda/tiles.h"

// The first stage, t = x · downᵀ, for 64 rows by a group of CTAs of one cluster that share the depth. Each leaves its
// float32 sums ("partial") in its own shared memory; after a cluster barrier each adds up the rows it owns, always in
// the order of the CTAs' ranks, rounds them to 16 bit and writes them into the t of every CTA of the group.
namespace inherit_kernels::cuda {

constexpr int kStageRows = 64;
constexpr int kMaxHeads = 8;
constexpr int64_t kMaxSize = 1 << 30;  // sizes are counted in 32 bit, offsets between rows in 64

// A cluster lies within a group of 16 or 18 multiprocessors, so of 132 clusters of four or eight reach only 128.
inline bool run_at_once(int64_t clusters, int size, int multiprocessors) {
  return clusters * size <= multiprocessors / 8 * 8;
}

// How 256 threads divide the sums [64, kRank]. At rank 64 two groups of four warps take every other 16 columns of the
// depth, so that each warp keeps 32 x 32 sums and feeds eight mma from four ldmatrix.
template <int kRank>
struct RankLayout {
  static constexpr int kGroups = kRank == 64 ? 2 : 1;
  static constexpr int kWarps = kTileWarps / kGroups;
  static constexpr int kWarpColumns = kRank / (kWarps / 2);
  static constexpr int kBlocks = kWarpColumns / 8;
  static constexpr int kChunks = kRank / kTileDepth;
  static constexpr int kPartialStride = kRank + 8;  // floats; 8 more than a multiple of 32: no bank conflict
  static constexpr int kPartialSize = kGroups * kStageRows * kPartialStride;
  static constexpr int kSlotSize = (kStageRows + kRank) * kTileDepth;  // 16-bit elements of one pipeline stage
  static constexpr int kRowUnits = kRank / kUnit;
  using Sums = Accumulator[2][kBlocks];
};

// What a thread keeps of the sums [64, kRank]: warps stand 2 (rows of 32) x kWarps / 2 (columns), per group.
template <int kRank>
struct WarpPlace {
  using Layout = RankLayout<kRank>;
  int group, row, column;
  __device__ __forceinline__ WarpPlace() {
    const int warp = threadIdx.x / 32;
    group = warp / Layout::kWarps;
    row = warp % 2 * 32;
    column = warp % Layout::kWarps / 2 * Layout::kWarpColumns;
  }
};

struct Share {
  int begin, end;
};
// The part of [0, count) that falls to `index` of `parts`: contiguous, sizes differ by one at most.
__device__ __forceinline__ Share share_of(int count, int index, int parts) {
  const int64_t wide = count;
  return {static_cast<int>(wide * index / parts), static_cast<int>(wide * (index + 1) / parts)};
}

template <int kRank, class T>
__device__ __forceinline__ void multiply_chunk(typename RankLayout<kRank>::Sums& sums, const T* p_slot) {
  using Layout = RankLayout<kRank>;
  const WarpPlace<kRank> place;
  constexpr int kSteps = kTileDepth / 16;
#pragma unroll
  for (int step = 0; step < kSteps; step += Layout::kGroups)
    multiply_step(sums, p_slot, place.row, p_slot + kStageRows * kTileDepth, place.column, step + place.group);
}

template <int kRank>
__device__ __forceinline__ void store_partial(float* p_partial, const typename RankLayout<kRank>::Sums& sums) {
  using Layout = RankLayout<kRank>;
  const WarpPlace<kRank> place;
  const int lane = threadIdx.x % 32;
  const int row = place.group * kStageRows + place.row + lane / 4, column = place.column + lane % 4 * 2;
  float* p_first = p_partial + row * Layout::kPartialStride + column;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < Layout::kBlocks; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Float2 pair = {{sums[m][n].r[half * 2], sums[m][n].r[half * 2 + 1]}};
        *reinterpret_cast<Float2*>(p_first + (m * 16 + half * 8) * Layout::kPartialStride + n * 8) = pair;
      }
}

// sum [8] += one unit of a partial, both groups of it where there are two.
template <int kRank>
__device__ __forceinline__ void add_partial(float (&sum)[kUnit], const float* p_partial, int row, int unit) {
  using Layout = RankLayout<kRank>;
#pragma unroll
  for (int group = 0; group < Layout::kGroups; ++group) {
    const float* p_unit = p_partial + (group * kStageRows + row) * Layout::kPartialStride + unit * kUnit;
    const Float4 low = *reinterpret_cast<const Float4*>(p_unit), high = *reinterpret_cast<const Float4*>(p_unit + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += low.v[i];
      sum[4 + i] += high.v[i];
    }
  }
}

// The CTAs [first, first + count) of the cluster that work on the same 64 rows, seen from one of them.
template <bool kCluster>
struct Group {
  int first, count;

  template <class P>
  __device__ __forceinline__ P* of(P* p_mine, int index) const {
    if constexpr (kCluster) {
      return map_shared(p_mine, first + index);
    } else {
      return p_mine;
    }
  }
};

// One unit of t [64, kRank] in float32: the partials of all CTAs of the group in the order of their ranks. Columns past
// the rank become zero: x may hold infinities, which times the zeros of a filled tile are NaN.
template <int kRank, bool kCluster>
__device__ __forceinline__ void sum_partials(float (&sum)[kUnit], const Group<kCluster>& group, float* p_partial,
                                             int row, int unit, int rank) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) sum[i] = 0.0f;
#pragma unroll 2
  for (int peer = 0; peer < group.count; ++peer) add_partial<kRank>(sum, group.of(p_partial, peer), row, unit);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) sum[i] = unit * kUnit < rank ? sum[i] : 0.0f;
}

// Writes one rounded unit into t of every CTA of the group and, where wanted, into global memory.
template <bool kCluster, class T>
__device__ __forceinline__ void publish_unit(const Group<kCluster>& group, T* p_t, T* p_global,
                                             const float (&sum)[kUnit]) {
  Unit<T> rounded;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) rounded.v[i] = from_float<T>(sum[i]);
  for (int peer = 0; peer < group.count; ++peer) *reinterpret_cast<Unit<T>*>(group.of(p_t, peer)) = rounded;
  if (p_global) *reinterpret_cast<Unit<T>*>(p_global) = rounded;
}

}  // namespace inherit_kernels::cuda
