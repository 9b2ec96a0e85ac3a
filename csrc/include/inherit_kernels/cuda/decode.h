// Linear low-rank layers on at most 16 rows, where reading the weights once is all that counts. Two launches:
//   down: partial sums of t over a part of `in` each, from about one block per SM, all weight loads in flight at once;
//   up:   the partial sums added up in order, the gate, and 32 columns of y per block. It starts while `down` runs
//         (sm_90) and has its first weights in registers before it waits for t.
// Both multiply [16 rows, 8 columns] per warp: the rows are x or t, the columns 8 rows of a weight. A step is 64 bytes
// of depth: lane 4 g + t loads 16 bytes of column g, quarter t, straight into the operand of mma16816, because a sum
// does not mind that the depth of an mma is permuted alike on both sides. float32 multiplies the same 16 bytes by
// itself. One path for 1 to 16 rows: an mma that is mostly padding costs nothing beside its weights, and a row's bits
// never depend on how many rows come with it.
#pragma once

#include "inherit_kernels/cuda/epilogue.h"
#include "inherit_kernels/cuda/linear_call.h"
#include "inherit_kernels/cuda/words.h"

namespace inherit_kernels {
namespace cuda {

constexpr int kMaxRows = 16, kMaxRank = 512, kMaxHeads = 16;
constexpr int kTileColumns = 8;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUpTiles = 4, kUpGroups = kWarps / kUpTiles;
constexpr int kUpColumns = kUpTiles * kTileColumns;
constexpr int kTargetBlocks = 132;  // SMs of an H200; fixed, so that results do not depend on the device

struct DecodeArgs {
  LinearCall call;
  float* p_partials;  // [splits, rows, ld_partials]
  int splits, steps_per_split, ld_partials;
};

template <class T>
constexpr int kStep = 64 / static_cast<int>(sizeof(T));
// 16-byte loads under way per lane: 32 KB a block for 16-bit types. float32 has 12 more sums to keep in registers.
template <class T>
constexpr int kSlots = sizeof(T) == 2 ? 8 : 4;

// `valid` elements at p, at most 16 bytes, zeros behind them. kVector: p is aligned, and all or none are valid.
template <class T, bool kVector, bool kStreaming>
__device__ __forceinline__ uint4 load_pack(const T* p, int64_t valid) {
  if constexpr (kVector) {
    if (valid <= 0) return uint4{0, 0, 0, 0};
    return kStreaming ? load16_streaming(p) : load16(p);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) pack.v[i] = i < valid ? p[i] : from_float<T>(0.0f);
    return bits_of_pack(pack);
  }
}

// One lane's part of 8 columns of a weight [heads, columns, depth].
template <class T, bool kVector>
struct WeightTile {
  const T* p_lane;  // of step 0
  int64_t head_stride;
  int64_t depth_left;  // from p_lane on; none beyond the last column
  int depth_steps, heads;

  __device__ __forceinline__ WeightTile(const void* p, int64_t heads, int64_t columns, int64_t depth, int64_t column0) {
    int lane = static_cast<int>(threadIdx.x % 32);
    int64_t column = column0 + lane / 4, o_lane = lane % 4 * Pack<T>::kCount;
    p_lane = static_cast<const T*>(p) + column * depth + o_lane;
    head_stride = columns * depth;
    depth_left = column < columns ? depth - o_lane : 0;
    depth_steps = static_cast<int>((depth + kStep<T> - 1) / kStep<T>);
    this->heads = static_cast<int>(heads);
  }
  __device__ __forceinline__ int steps() const { return heads * depth_steps; }
  template <bool kHeads>
  __device__ __forceinline__ uint4 load(int step) const {
    int head = kHeads ? step / depth_steps : 0;
    int64_t o_depth = static_cast<int64_t>(step - head * depth_steps) * kStep<T>;
    return load_pack<T, kVector, true>(p_lane + head * head_stride + o_depth, depth_left - o_depth);
  }
};

// Rows that a warp multiplies by. multiply() calls begin() for each slot's first step, and for every step ready(),
// load(), done() with the step that takes the slot next.

// x in global memory, read when needed: for rows that 16-byte copies cannot reach.
template <class T, bool kVector>
struct InputRows {
  const T* p;
  int64_t ld, depth;
  int count;

  __device__ __forceinline__ InputRows(const DecodeArgs& a, char*)
      : p(static_cast<const T*>(a.call.x)), ld(a.call.ld_x), depth(a.call.in), count(static_cast<int>(a.call.rows)) {}
  __device__ __forceinline__ void begin(int, int, bool) const {}
  __device__ __forceinline__ void ready() const {}
  __device__ __forceinline__ uint4 load(int row, int, int step) const {
    int64_t o_depth = static_cast<int64_t>(step) * kStep<T> + threadIdx.x % 4 * Pack<T>::kCount;
    return load_pack<T, false, false>(p + row * ld + o_depth, row < count ? depth - o_depth : 0);
  }
  __device__ __forceinline__ void done(int, int, bool) const {}
};

// x on its way to shared memory, [kSlots, rows, 64 bytes] per warp, as far ahead as the weights: read when needed, each
// step would wait for L2 anew.
template <class T>
struct InputRows<T, true> {
  const T* p;
  T* p_slots;
  int64_t ld, depth;
  int count;

  __device__ __forceinline__ InputRows(const DecodeArgs& a, char* p_shared)
      : p(static_cast<const T*>(a.call.x)), ld(a.call.ld_x), depth(a.call.in), count(static_cast<int>(a.call.rows)) {
    p_slots = reinterpret_cast<T*>(p_shared) + threadIdx.x / 32 * kSlots<T> * count * kStep<T>;
  }
  static size_t bytes(int64_t count) { return static_cast<size_t>(64 * kWarps * kSlots<T> * count); }
  __device__ __forceinline__ T* place(int slot, int row) const {
    return p_slots + (slot * count + row) * kStep<T> + threadIdx.x % 4 * Pack<T>::kCount;
  }
  // One group of copies per slot, empty for a step that does not exist.
  __device__ __forceinline__ void begin(int slot, int step, bool exists) const {
    int64_t o_depth = static_cast<int64_t>(step) * kStep<T> + threadIdx.x % 4 * Pack<T>::kCount;
    for (int row = static_cast<int>(threadIdx.x) % 32 / 4; exists && row < count; row += 8)
      copy16_async(place(slot, row), p + row * ld + o_depth, o_depth < depth);
    commit_copies();
  }
  __device__ __forceinline__ void ready() const {
    wait_copies<kSlots<T> - 1>();
    __syncwarp();
  }
  __device__ __forceinline__ uint4 load(int row, int slot, int) const {
    return row < count ? load16(place(slot, row)) : uint4{0, 0, 0, 0};
  }
  __device__ __forceinline__ void done(int slot, int next, bool exists) const {
    __syncwarp();
    begin(slot, next, exists);
  }
};

// t in shared memory: [16, ld], whole steps, zeros beyond rank and rows.
template <class T>
struct RankRows {
  const T* p;
  int ld, count;

  __device__ __forceinline__ void begin(int, int, bool) const {}
  __device__ __forceinline__ void ready() const {}
  __device__ __forceinline__ uint4 load(int row, int, int depth_step) const {
    return load16(p + row * ld + depth_step * kStep<T> + threadIdx.x % 4 * Pack<T>::kCount);
  }
  __device__ __forceinline__ void done(int, int, bool) const {}
};

// The gates of shared memory, [16, heads]; or one head without.
struct Gates {
  const float* p;
  int heads;
  __device__ __forceinline__ float of(int row, int head) const { return p[row * heads + head]; }
};

// Sums of [16 rows, 8 columns]. 16-bit: in the layout of mma16816's D.
template <class T>
struct TileSums {
  Accumulator sum = {};

  template <bool kGated, class Rows>
  __device__ __forceinline__ void add(uint4 w, const Rows& rows, int slot, int depth_step, const Gates& gates,
                                      int head) {
    int g = static_cast<int>(threadIdx.x % 32) / 4;
    uint4 low = rows.load(g, slot, depth_step), high = {0, 0, 0, 0};
    if (rows.count > 8) high = rows.load(g + 8, slot, depth_step);
    Accumulator fresh = {};
    Accumulator& into = kGated ? fresh : sum;
    mma16816<T>(into, FragmentA{{low.x, high.x, low.y, high.y}}, FragmentB{{w.x, w.y}});
    mma16816<T>(into, FragmentA{{low.z, high.z, low.w, high.w}}, FragmentB{{w.z, w.w}});
    if (!kGated) return;
    float gate_low = gates.of(g, head), gate_high = gates.of(g + 8, head);
    sum.r[0] += gate_low * fresh.r[0];
    sum.r[1] += gate_low * fresh.r[1];
    sum.r[2] += gate_high * fresh.r[2];
    sum.r[3] += gate_high * fresh.r[3];
  }
  // p_tile [16, ld]
  __device__ __forceinline__ void store(float* p_tile, int ld) const {
    int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) p_tile[(lane / 4 + i / 2 * 8) * ld + lane % 4 * 2 + i % 2] = sum.r[i];
  }
};

// float32: every row of column g, over the quarter of the depth that the lane has loaded.
template <>
struct TileSums<float> {
  float sum[kMaxRows] = {};

  template <bool kGated, class Rows>
  __device__ __forceinline__ void add(uint4 w, const Rows& rows, int slot, int depth_step, const Gates& gates,
                                      int head) {
    Pack<float> b_w = unpack<float>(w);
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
      if (row >= rows.count) break;
      Pack<float> b_row = unpack<float>(rows.load(row, slot, depth_step));
      float dot = kGated ? 0.0f : sum[row];
#pragma unroll
      for (int i = 0; i < 4; ++i) dot += b_w.v[i] * b_row.v[i];
      sum[row] = kGated ? sum[row] + gates.of(row, head) * dot : dot;
    }
  }
  __device__ __forceinline__ void store(float* p_tile, int ld) const {
    int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
      float v = sum[row] + shuffle_xor(sum[row], 1);
      v += shuffle_xor(v, 2);
      if (row % 4 == lane % 4) p_tile[row * ld + lane / 4] = v;
    }
  }
};

template <bool kGated, class T, bool kVector, class Rows>
__device__ __forceinline__ void fill_slots(uint4 (&b_slots)[kSlots<T>], const WeightTile<T, kVector>& weights,
                                           const Rows& rows, int first, int last, int stride) {
#pragma unroll
  for (int slot = 0; slot < kSlots<T>; ++slot) {
    int step = first + slot * stride;
    b_slots[slot] = step < last ? weights.template load<kGated>(step) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int slot = 0; slot < kSlots<T>; ++slot) {
    int step = first + slot * stride;
    rows.begin(slot, step, step < last);
  }
}

// Steps first, first + stride, ... before last. fill_slots() has begun the first kSlots; their successors follow as
// each slot becomes free.
template <bool kGated, class T, bool kVector, class Rows>
__device__ __forceinline__ void multiply(TileSums<T>& sums, const WeightTile<T, kVector>& weights,
                                         uint4 (&b_slots)[kSlots<T>], const Rows& rows, const Gates& gates, int first,
                                         int last, int stride) {
  for (int step0 = first; step0 < last; step0 += kSlots<T> * stride) {
#pragma unroll
    for (int slot = 0; slot < kSlots<T>; ++slot) {
      int step = step0 + slot * stride, next = step + kSlots<T> * stride;
      if (step >= last) break;
      uint4 b_w = b_slots[slot];
      if (next < last) b_slots[slot] = weights.template load<kGated>(next);
      int head = kGated ? step / weights.depth_steps : 0;
      rows.ready();
      sums.template add<kGated>(b_w, rows, slot, step - head * weights.depth_steps, gates, head);
      rows.done(slot, next, next < last);
    }
  }
}

// Block (split, tile of 8 ranks): p_partials[split] = x down^T over the split's part of `in`.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) decode_down_kernel(DecodeArgs a) {
  release_next_grid();
  const LinearCall& c = a.call;
  int warp = static_cast<int>(threadIdx.x) / 32, count = static_cast<int>(c.rows);
  int64_t rank0 = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  WeightTile<T, kVector> weights(c.down, 1, c.rank, c.in, rank0);
  int start = static_cast<int>(blockIdx.x) * a.steps_per_split;
  int end = start + a.steps_per_split < weights.steps() ? start + a.steps_per_split : weights.steps();
  char* p_shared = shared_memory<char>();  // sums, then x
  constexpr int kTile = kMaxRows * kTileColumns;
  InputRows<T, kVector> rows(a, p_shared + sizeof(float) * kWarps * kTile);
  uint4 b_slots[kSlots<T>];
  fill_slots<false>(b_slots, weights, rows, start + warp, end, kWarps);
  TileSums<T> sums;
  multiply<false>(sums, weights, b_slots, rows, Gates{}, start + warp, end, kWarps);

  float* p_sums = reinterpret_cast<float*>(p_shared);  // [warps, 16, 8]
  sums.store(p_sums + warp * kTile, kTileColumns);
  __syncthreads();
  int i = static_cast<int>(threadIdx.x), row = i / kTileColumns;
  if (row >= count) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += p_sums[w * kTile + i];
  int64_t o_row = static_cast<int64_t>(blockIdx.x) * count + row;
  a.p_partials[o_row * a.ld_partials + rank0 + i % kTileColumns] = sum;
}

// Shared memory of the second launch, in bytes from its start.
template <class T>
struct UpLayout {
  int ld_t;  // elements
  size_t sums, gates, bias, gate_bias, gate_weight, total;

  __device__ __host__ UpLayout(int rank, int heads) {
    // An odd number of 64-byte steps a row: the eight rows of a 16-byte load then fall on different banks.
    ld_t = ((rank + kStep<T> - 1) / kStep<T> | 1) * kStep<T>;
    sums = sizeof(T) * kMaxRows * ld_t;  // [groups, 16, 32]
    gates = sums + sizeof(float) * kUpGroups * kMaxRows * kUpColumns;
    bias = gates + sizeof(float) * kMaxRows * heads;
    gate_bias = bias + sizeof(float) * heads * kUpColumns;
    gate_weight = gate_bias + sizeof(float) * heads;
    total = (gate_weight + sizeof(T) * heads * rank + 15) / 16 * 16;
  }
};

// t [16, ld_t] in shared memory: partial sums added up in the order of their splits. Zeros, not sums, beyond rank: the
// padding of an infinite x would be NaN.
template <class T>
__device__ __forceinline__ void add_partials(const DecodeArgs& a, T* p_t, int ld_t) {
  int rank = static_cast<int>(a.call.rank), count = static_cast<int>(a.call.rows);
  T* p_out = blockIdx.x == 0 ? static_cast<T*>(a.call.t) : nullptr;
  int64_t o_split = static_cast<int64_t>(count) * a.ld_partials;
  for (int i = static_cast<int>(threadIdx.x); i < kMaxRows * ld_t / 4; i += kThreads) {
    int row = i / (ld_t / 4), column = i % (ld_t / 4) * 4;
    float sum[4] = {};
    if (row < count && column < rank) {
      const float* p = a.p_partials + static_cast<int64_t>(row) * a.ld_partials + column;
#pragma unroll 4
      for (int split = 0; split < a.splits; ++split) {
        Pack<float> part = unpack<float>(load16(p + split * o_split));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += part.v[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T v = from_float<T>(column + j < rank ? sum[j] : 0.0f);
      p_t[row * ld_t + column + j] = v;
      if (p_out && row < count && column + j < rank) p_out[static_cast<int64_t>(row) * rank + column + j] = v;
    }
  }
}

// p_gates [16, heads] = softmax over heads of t gate_weight^T + gate_bias.
template <class T>
__device__ __forceinline__ void make_gates(const T* p_t, int ld_t, const T* p_gate_weight, const float* p_gate_bias,
                                           float* p_gates, int count, int heads, int rank) {
  int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < count * heads; i += kWarps) {
    int row = i / heads, head = i % heads;
    float sum = 0.0f;
    for (int r = lane; r < rank; r += 32)
      sum += to_float(p_t[row * ld_t + r]) * to_float(p_gate_weight[head * rank + r]);
    sum = warp_sum(sum);
    if (lane == 0) p_gates[i] = sum + p_gate_bias[head];
  }
  __syncthreads();
  int row = static_cast<int>(threadIdx.x);
  if (row < kMaxRows) {
    float* p = p_gates + row * heads;
    float largest = row < count ? p[0] : 0.0f, total = 0.0f;
    for (int h = 0; h < heads; ++h) {
      p[h] = row < count ? p[h] : 0.0f;
      largest = fmaxf(largest, p[h]);
    }
    for (int h = 0; h < heads; ++h) total += p[h] = expf(p[h] - largest);
    for (int h = 0; h < heads; ++h) p[h] /= total;
  }
  __syncthreads();
}

// Block: 32 columns of y. 8 warps: 4 tiles of 8 columns, and for each 2 groups that share the steps. 2 blocks per SM
// are asked for so that one fits beside a block of the first launch.
template <class T, bool kGated, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) decode_up_kernel(DecodeArgs a) {
  const LinearCall& c = a.call;
  int thread = static_cast<int>(threadIdx.x), tile = thread / 32 % kUpTiles, group = thread / 32 / kUpTiles;
  int rank = static_cast<int>(c.rank), heads = kGated ? static_cast<int>(c.heads) : 1, count = static_cast<int>(c.rows);
  int64_t column0 = static_cast<int64_t>(blockIdx.x) * kUpColumns;
  UpLayout<T> layout(rank, kGated ? heads : 0);
  char* p_shared = shared_memory<char>();
  T* p_t = reinterpret_cast<T*>(p_shared);
  float* p_sums = reinterpret_cast<float*>(p_shared + layout.sums);
  float* p_gates = reinterpret_cast<float*>(p_shared + layout.gates);
  float* p_bias = reinterpret_cast<float*>(p_shared + layout.bias);
  float* p_gate_bias = reinterpret_cast<float*>(p_shared + layout.gate_bias);
  T* p_gate_weight = reinterpret_cast<T*>(p_shared + layout.gate_weight);

  // All that does not depend on t, before it is waited for.
  WeightTile<T, kVector> weights(c.up, heads, c.out, c.rank, column0 + tile * kTileColumns);
  uint4 b_slots[kSlots<T>];
  RankRows<T> rows = {p_t, layout.ld_t, count};
  fill_slots<kGated>(b_slots, weights, rows, group, weights.steps(), kUpGroups);
  const T* p_c_bias = static_cast<const T*>(c.bias);
  const T* p_residual = static_cast<const T*>(c.residual);
  int column = thread % kUpColumns;
  bool inside = column0 + column < c.out;
  constexpr int kRowsApart = kThreads / kUpColumns, kOutputs = kMaxRows / kRowsApart;  // of one thread
  float b_y[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    int row = thread / kUpColumns + i * kRowsApart;
    bool present = inside && row < count;
    b_y[i] = present && p_residual ? to_float(p_residual[row * c.ld_residual + column0 + column]) : 0.0f;
    if (!kGated && inside && p_c_bias) b_y[i] += to_float(p_c_bias[column0 + column]);
  }
  if (kGated) {
    for (int i = thread; i < heads * kUpColumns; i += kThreads) {
      int64_t o_column = column0 + i % kUpColumns;
      bool present = p_c_bias && o_column < c.out;
      p_bias[i] = present ? to_float(p_c_bias[i / kUpColumns * c.out + o_column]) : 0.0f;
    }
    for (int i = thread; i < heads * rank; i += kThreads) p_gate_weight[i] = static_cast<const T*>(c.gate_weight)[i];
    if (thread < heads) p_gate_bias[thread] = c.gate_bias ? to_float(static_cast<const T*>(c.gate_bias)[thread]) : 0.0f;
  }

  wait_previous_grid();
  add_partials(a, p_t, layout.ld_t);
  __syncthreads();
  if (kGated) make_gates(p_t, layout.ld_t, p_gate_weight, p_gate_bias, p_gates, count, heads, rank);

  Gates gates = {p_gates, heads};
  TileSums<T> sums;
  multiply<kGated>(sums, weights, b_slots, rows, gates, group, weights.steps(), kUpGroups);
  sums.store(p_sums + group * kMaxRows * kUpColumns + tile * kTileColumns, kUpColumns);
  __syncthreads();
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    int row = thread / kUpColumns + i * kRowsApart;
    if (row >= count) return;
    float z = b_y[i];
#pragma unroll
    for (int g = 0; g < kUpGroups; ++g) z += p_sums[(g * kMaxRows + row) * kUpColumns + column];
    if (kGated)
      for (int h = 0; h < heads; ++h) z += gates.of(row, h) * p_bias[h * kUpColumns + column];
    static_cast<T*>(c.y)[row * c.ld_y + column0 + column] = from_float<T>(activate(z, c.activation));
  }
}

}  // namespace cuda
}  // namespace inherit_kernels
