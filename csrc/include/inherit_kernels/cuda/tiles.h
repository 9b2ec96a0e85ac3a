#pragma once

#include <cstdint>

#include "inherit_kernels/cuda/words.h"

// Tiles of 16-bit numbers in shared memory, their products on tensor cores, and the way a product leaves a warp.
namespace inherit_kernels::cuda {

constexpr int kTileDepth = 64;                  // elements of a tile's row: 128 bytes, all 32 banks once
constexpr int kUnit = 8;                        // elements of 16 bytes, the piece in which memory is moved
constexpr int kTileUnits = kTileDepth / kUnit;  // units of a tile's row
constexpr int kTileThreads = 256;               // of every kernel built on tiles
constexpr int kTileWarps = kTileThreads / 32;

template <class N>
__host__ __device__ constexpr N ceil_divide(N value, N by) {
  return (value + by - 1) / by;
}

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Float2 {
  float v[2];
};
template <class T>
struct alignas(16) Unit {
  T v[kUnit];
};

// Unit u of row r lies at u ^ (r & 7): the eight rows that one phase of ldmatrix reads fall into different banks.
template <class T>
__device__ __forceinline__ T* tile_unit(T* p_tile, int row, int unit) {
  return p_tile + row * kTileDepth + ((unit ^ (row & 7)) * kUnit);
}

// What a thread copies of a tile [kRows, 64]: unit threadIdx.x % 8 of rows threadIdx.x / 8 + 32 i, and from where.
template <int kRows, class T>
struct TileCopy {
  static constexpr int kRowStep = kTileThreads / kTileUnits;
  const T* p = nullptr;  // the unit of the first of these rows
  int64_t step = 0;      // elements from one of them to the next
  int valid_rows = 0;    // counted from the first of them, or less than one

  __device__ __forceinline__ static int first_row() { return threadIdx.x / kTileUnits; }
  __device__ __forceinline__ static int unit() { return threadIdx.x % kTileUnits; }

  TileCopy() = default;
  __device__ __forceinline__ TileCopy(const T* p_tile, int64_t stride, int valid_rows)
      : p(p_tile + first_row() * stride + unit() * kUnit),
        step(kRowStep * stride),
        valid_rows(valid_rows - first_row()) {}

  // Invalid units become zero; their addresses, which may lie past the array, are not read.
  __device__ __forceinline__ void start(T* p_tile, bool valid_depth) const {
    T* p_to = tile_unit(p_tile, first_row(), unit());
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i)
      copy16_async(p_to + i * kRowStep * kTileDepth, p + i * step, valid_depth & (i * kRowStep < valid_rows));
  }
};

// acc [kBlocksM * 16, kBlocksN * 8] += a [rows, 16] · b [columns, 16]ᵀ at depth `step` of two tiles.
template <class T, int kBlocksM, int kBlocksN>
__device__ __forceinline__ void multiply_step(Accumulator (&acc)[kBlocksM][kBlocksN], const T* p_a, int a_row,
                                              const T* p_b, int b_row, int step) {
  static_assert(kBlocksN % 2 == 0, "one ldmatrix brings two column blocks");
  const int lane = threadIdx.x % 32;
  FragmentA a[kBlocksM];
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m)
    load_matrix_x4(a[m].r, tile_unit(p_a, a_row + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
  for (int n = 0; n < kBlocksN; n += 2) {
    uint32_t pair[4];
    load_matrix_x4(pair, tile_unit(p_b, b_row + n * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
    const FragmentB left = {{pair[0], pair[1]}}, right = {{pair[2], pair[3]}};
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m) {
      mma16816<T>(acc[m][n], a[m], left);
      mma16816<T>(acc[m][n + 1], a[m], right);
    }
  }
}

template <int kBlocksM, int kBlocksN>
__device__ __forceinline__ void clear(Accumulator (&acc)[kBlocksM][kBlocksN]) {
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
    for (int n = 0; n < kBlocksN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n].r[i] = 0.0f;
}

__device__ __forceinline__ void exchange(float (&v)[4][2], int left, int right, int mask) {
  const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float received = shuffle_xor(upper ? v[left][e] : v[right][e], mask);
    if (upper) {
      v[left][e] = received;
    } else {
      v[right][e] = received;
    }
  }
}

// A lane holds two columns of each of four blocks; after a 4 x 4 transposition among the four lanes of a row it holds
// the eight columns of block lane % 4, 16 bytes of an output row, without a trip through shared memory.
__device__ __forceinline__ void gather_row_unit(float (&z)[kUnit], const Accumulator (&acc)[4], int half) {
  float v[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    v[n][0] = acc[n].r[half * 2];
    v[n][1] = acc[n].r[half * 2 + 1];
  }
  exchange(v, 0, 1, 1);
  exchange(v, 2, 3, 1);
  exchange(v, 0, 2, 2);
  exchange(v, 1, 3, 2);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) z[i] = v[i / 2][i % 2];
}

// 16 bytes where `aligned` promises that whole units are aligned, else one by one; past `count` stands zero.
template <class T>
__device__ __forceinline__ void load_unit(float (&z)[kUnit], const T* p_row, int64_t count, bool aligned) {
  if (aligned && count >= kUnit) {
    const Unit<T> unit = *reinterpret_cast<const Unit<T>*>(p_row);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) z[i] = to_float(unit.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) z[i] = i < count ? to_float(p_row[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_unit(T* p_row, const float (&z)[kUnit], int64_t count, bool aligned) {
  Unit<T> unit;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) unit.v[i] = from_float<T>(z[i]);
  if (aligned && count >= kUnit) {
    *reinterpret_cast<Unit<T>*>(p_row) = unit;
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i)
      if (i < count) p_row[i] = unit.v[i];
  }
}

template <class T>
__device__ __forceinline__ void add_unit(float (&z)[kUnit], float factor, const T* p_row, int64_t count, bool aligned) {
  float value[kUnit];
  load_unit(value, p_row, count, aligned);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) z[i] += factor * value[i];
}

// Codes as in DESIGN: 1 relu, 2 gelu, 3 gelu_tanh, 4 silu. relu keeps NaN.
__device__ __forceinline__ float activate(float z, int activation) {
  switch (activation) {
    case 1:
      return z < 0.0f ? 0.0f : z;
    case 2:
      return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case 3: {  // z * (1 + tanh(u)) / 2 = z * sigmoid(2u), which keeps its digits where tanh is near -1
      const float u = 0.79788456f * (z + 0.044715f * z * z * z);
      return z / (1.0f + expf(-2.0f * u));
    }
    case 4:
      return z / (1.0f + expf(-z));
    default:
      return z;
  }
}

__host__ __device__ inline bool aligned16(const void* p, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kUnit == 0;
}

}  // namespace inherit_kernels::cuda
