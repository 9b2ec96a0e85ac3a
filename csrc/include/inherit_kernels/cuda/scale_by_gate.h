// [g_1 t ... g_H t], g = softmax(t gate_weight^T + gate_bias) per row: what turns heads into one matrix product of
// depth H * rank. A warp a row; t is read twice, the second time from L1.
#pragma once

#include "inherit_kernels/cuda/gated_lowrank_linear.h"
#include "inherit_kernels/cuda/words.h"

namespace inherit_kernels {
namespace cuda {

constexpr int kScaleWarps = 8;

// Elements r ... r + count - 1 of a row, as float.
template <class T, int kCount>
__device__ __forceinline__ void load_elements(float (&values)[kCount], const T* p) {
  if constexpr (kCount > 1) {
    Pack<T> pack = unpack<T>(load16(p));
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = to_float(pack.v[i]);
  } else {
    values[0] = to_float(*p);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_scaled(T* p, const float (&values)[kCount], float scale) {
  if constexpr (kCount > 1) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.v[i] = from_float<T>(scale * values[i]);
    store16(p, bits_of_pack(pack));
  } else {
    *p = from_float<T>(scale * values[0]);
  }
}

// The gates of the row in every lane, in float32.
template <class T, int kCount>
__device__ __forceinline__ void gates_of_row(float (&gates)[kMostScaleHeads], const ScaleByGateCall& c, const T* p_t,
                                             int lane) {
  const T* p_weight = static_cast<const T*>(c.gate_weight);
  const T* p_bias = static_cast<const T*>(c.gate_bias);
  int heads = static_cast<int>(c.heads), rank = static_cast<int>(c.rank);
#pragma unroll
  for (int h = 0; h < kMostScaleHeads; ++h) gates[h] = 0.0f;
  for (int r = lane * kCount; r < rank; r += 32 * kCount) {
    float t[kCount], w[kCount];
    load_elements<T>(t, p_t + r);
#pragma unroll
    for (int h = 0; h < kMostScaleHeads; ++h) {
      if (h >= heads) break;
      load_elements<T>(w, p_weight + static_cast<int64_t>(h) * rank + r);
#pragma unroll
      for (int i = 0; i < kCount; ++i) gates[h] += t[i] * w[i];
    }
  }
  float largest = -INFINITY, total = 0.0f;
#pragma unroll
  for (int h = 0; h < kMostScaleHeads; ++h) {
    if (h >= heads) break;
    gates[h] = warp_sum(gates[h]) + (p_bias ? to_float(p_bias[h]) : 0.0f);
    largest = gates[h] > largest || gates[h] != gates[h] ? gates[h] : largest;  // NaN stays
  }
#pragma unroll
  for (int h = 0; h < kMostScaleHeads; ++h) {
    if (h >= heads) break;
    gates[h] = expf(gates[h] - largest);
    total += gates[h];
  }
  float share = 1.0f / total;
#pragma unroll
  for (int h = 0; h < kMostScaleHeads; ++h) gates[h] = h < heads ? gates[h] * share : 0.0f;
}

// kCount: elements of a 16-byte access, or 1 where ranks or rows do not allow it. Four blocks an SM leave 64 registers:
// without that bound ptxas went for 40 and spilled.
template <class T, int kCount>
__global__ void __launch_bounds__(32 * kScaleWarps, 4) scale_by_gate_kernel(ScaleByGateCall c) {
  int lane = static_cast<int>(threadIdx.x % 32), rank = static_cast<int>(c.rank), heads = static_cast<int>(c.heads);
  int64_t row = static_cast<int64_t>(blockIdx.x) * kScaleWarps + threadIdx.x / 32;
  if (row >= c.rows) return;
  const T* p_t = static_cast<const T*>(c.t) + row * c.ld_t;
  T* p_out = static_cast<T*>(c.out) + row * c.columns;
  float gates[kMostScaleHeads];
  gates_of_row<T, kCount>(gates, c, p_t, lane);
  for (int r = lane * kCount; r < rank; r += 32 * kCount) {
    float t[kCount];
    load_elements<T>(t, p_t + r);
#pragma unroll
    for (int h = 0; h < kMostScaleHeads; ++h) {
      if (h >= heads) break;
      store_scaled<T>(p_out + static_cast<int64_t>(h) * rank + r, t, gates[h]);
    }
  }
  // The gates themselves multiply the biases; zeros fill up the depth.
  int first = heads * rank, rest = static_cast<int>(c.columns) - first;
#pragma unroll
  for (int h = 0; h < kMostScaleHeads; ++h)
    if (h < rest && lane == h) p_out[first + h] = from_float<T>(gates[h]);
  for (int i = kMostScaleHeads + lane; i < rest; i += 32) p_out[first + i] = from_float<T>(0.0f);
}

template <class T>
cudaError_t launch_scale_by_gate(const ScaleByGateCall& c, cudaStream_t stream) {
  constexpr int kWide = Pack<T>::kCount;
  auto wide = [](const void* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % kWide == 0; };
  bool all = c.rank % kWide == 0 && wide(c.t, c.ld_t) && wide(c.gate_weight, c.rank) && wide(c.out, c.columns);
  Shape shape;
  shape.grid = dim3(static_cast<unsigned>((c.rows + kScaleWarps - 1) / kScaleWarps));
  shape.block = dim3(32 * kScaleWarps);
  return launch(shape, stream, all ? scale_by_gate_kernel<T, kWide> : scale_by_gate_kernel<T, 1>, c);
}

}  // namespace cuda
}  // namespace inherit_kernels
