#pragma once

#include <cstdint>

#include "inherit_kernels/cuda/device.h"

// y [rows, out] = act(t · upᵀ + bias + residual), t [rows, rank] = x · downᵀ, in one launch for 32 to about 2048 rows:
// a cluster of CTAs per 64 rows shares the depth of the first product and the columns of the second.
namespace inherit_kernels::cuda {

// Strides in elements from row to row; the last dimension is dense.
struct LowrankLinearSm90Call {
  const void* x;         // [rows, in]
  const void* down;      // [rank, in]
  const void* up;        // [out, rank]
  const void* bias;      // [out] or null
  const void* residual;  // [rows, out] or null
  void* y;               // [rows, out]
  void* t;               // [rows, rank] or null: not wanted
  int64_t x_stride, down_stride, up_stride, residual_stride, y_stride, t_stride;
  int64_t rows, in, rank, out;
  int dtype;            // kFloat16 or kBFloat16 of device.h, of all tensors
  int activation;       // 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu
  int multiprocessors;  // of the device; decides the cluster's size
  int cluster;          // CTAs a cluster: 2, 4, 8, or 0: chosen
  // Programmatic dependent launch: weights are read before the previous kernel of the stream has ended, so it must not
  // write them.
  bool after_previous;
  void* stream;  // a cudaStream_t of the current device
};

// Null, or one sentence why this kernel cannot compute the call.
const char* lowrank_linear_sm90_declines(const LowrankLinearSm90Call& call);
// The value of a cudaError_t; cudaErrorNotSupported where it declines.
int lowrank_linear_sm90(const LowrankLinearSm90Call& call);

}  // namespace inherit_kernels::cuda
