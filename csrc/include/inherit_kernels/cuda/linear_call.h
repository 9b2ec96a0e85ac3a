// What a linear launcher is called with, in plain C++: the callers see no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace inherit_kernels {
namespace cuda {

// t = x down^T; y = act(sum_h g_h (up_h t + bias_h) + residual), g = softmax(t gate_weight^T + gate_bias) per row, or
// one head without a gate. Device pointers, elements of `dtype`, null where optional and absent. Weights are
// contiguous; rows of x, residual and y lie ld_* elements apart, their elements side by side. y overlaps nothing else.
struct LinearCall {
  const void* x;            // [rows, in]
  const void* down;         // [rank, in]
  const void* up;           // [heads, out, rank]
  const void* gate_weight;  // [heads, rank], gated only
  const void* gate_bias;    // [heads], optional
  const void* bias;         // [heads, out], optional
  const void* residual;     // [rows, out], optional
  void* y;                  // [rows, out]
  void* t;                  // [rows, rank] contiguous, optional: the rank-sized t, rounded to dtype, for a backward
  void* workspace;          // 16-byte aligned; may hold anything before and after
  int64_t rows, in, rank, out, heads;
  int64_t ld_x, ld_residual, ld_y;
  int dtype;       // 0 float32, 1 bfloat16, 2 float16
  int activation;  // 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu
};

}  // namespace cuda
}  // namespace inherit_kernels
