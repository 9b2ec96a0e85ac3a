// The host side of decode.h: what is supported, how the work is divided, which instance runs.
#pragma once

#include "inherit_kernels/cuda/decode.h"

namespace inherit_kernels {
namespace cuda {

inline bool decode_supports(const LinearCall& c, bool gated) {
  bool heads = gated ? c.heads >= 1 && c.heads <= kMaxHeads && c.gate_weight : c.heads == 1;
  bool sizes = c.rows >= 0 && c.rows <= kMaxRows && c.in >= 0 && c.in < 1 << 30 && c.rank >= 1 && c.rank <= kMaxRank &&
               c.out >= 0 && c.out < int64_t{1} << 31;
  return heads && sizes && c.dtype >= 0 && c.dtype <= 2 && c.activation >= 0 && c.activation <= 4;
}

// Parts of `in`: about kTargetBlocks blocks in all, each with work for its warps. A function of the layer alone, so
// that a row's sums have one order whatever rows come with it.
inline DecodeArgs decode_args(const LinearCall& c) {
  int element = c.dtype == kFloat32 ? 4 : 2;
  int steps = static_cast<int>((c.in * element + 63) / 64);
  int tiles = static_cast<int>((c.rank + kTileColumns - 1) / kTileColumns);
  int wanted = kTargetBlocks / tiles, useful = (steps + kWarps - 1) / kWarps;
  int splits = wanted < useful ? wanted : useful;
  DecodeArgs a = {c, static_cast<float*>(c.workspace), 1, steps, tiles * kTileColumns};
  if (splits > 1) {
    a.steps_per_split = (steps + splits - 1) / splits;
    a.splits = (steps + a.steps_per_split - 1) / a.steps_per_split;
  }
  return a;
}

inline size_t decode_workspace(const LinearCall& c, bool gated) {
  if (!decode_supports(c, gated)) return 0;
  DecodeArgs a = decode_args(c);
  size_t rows = c.rows ? static_cast<size_t>(c.rows) : 1;
  return sizeof(float) * static_cast<size_t>(a.splits) * rows * static_cast<size_t>(a.ld_partials);
}

inline bool wide_rows(const void* p, int64_t ld, int element) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld * element % 16 == 0;
}

template <class T, bool kGated>
int launch_decode(const LinearCall& c, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  DecodeArgs args = decode_args(c);
  bool wide_x = wide_rows(c.x, c.rows > 1 ? c.ld_x : 0, kElement);
  bool wide_down = wide_rows(c.down, c.in, kElement) && wide_x, wide_up = wide_rows(c.up, c.rank, kElement);
  // decode_up reads weights and residual before it waits for `down`, which is therefore never launched early itself.
  Shape down;
  down.grid = dim3(static_cast<unsigned>(args.splits), static_cast<unsigned>(args.ld_partials / kTileColumns));
  down.block = dim3(kThreads);
  down.shared_bytes = sizeof(float) * kWarps * kMaxRows * kTileColumns;
  if (wide_down) down.shared_bytes += InputRows<T, true>::bytes(c.rows);
  cudaError_t error =
      launch(down, stream, wide_down ? decode_down_kernel<T, true> : decode_down_kernel<T, false>, args);
  if (error != cudaSuccess) return static_cast<int>(error);
  Shape up;
  up.grid = dim3(static_cast<unsigned>((c.out + kUpColumns - 1) / kUpColumns));
  up.block = dim3(kThreads);
  up.shared_bytes = UpLayout<T>(static_cast<int>(c.rank), kGated ? static_cast<int>(c.heads) : 0).total;
  up.after_previous = true;
  error = launch(up, stream, wide_up ? decode_up_kernel<T, kGated, true> : decode_up_kernel<T, kGated, false>, args);
  return static_cast<int>(error);
}

template <bool kGated>
int launch_decode_any(const LinearCall& c, void* stream) {
  if (!decode_supports(c, kGated) || (c.rows && !c.workspace)) return static_cast<int>(cudaErrorInvalidValue);
  if (c.rows == 0 || c.out == 0) return static_cast<int>(cudaSuccess);
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (c.dtype == kFloat32) return launch_decode<float, kGated>(c, queue);
  if (c.dtype == kFloat16) return launch_decode<half16, kGated>(c, queue);
  return launch_decode<bf16, kGated>(c, queue);
}

}  // namespace cuda
}  // namespace inherit_kernels
