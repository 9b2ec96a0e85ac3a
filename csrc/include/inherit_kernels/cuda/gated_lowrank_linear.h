// The CUDA side of gated_lowrank_linear. Launchers allocate nothing, print nothing and may be captured into a graph.
#pragma once

#include "inherit_kernels/cuda/linear_call.h"

namespace inherit_kernels {
namespace cuda {

// Few rows: 1 <= rank <= 512, rows <= 16, 1 <= heads <= 16, a gate. 0 bytes of workspace mean: not supported.
size_t gated_lowrank_linear_decode_workspace(const LinearCall& call);
// The value of a cudaError_t. `stream` is a cudaStream_t of the current device.
int gated_lowrank_linear_decode(const LinearCall& call, void* stream);

constexpr int kMostScaleHeads = 8;

// out = [g_1 t ... g_H t g 0 ...], g = softmax(t gate_weight^T + gate_bias) per row; columns is heads * rank, or at
// least heads more.
struct ScaleByGateCall {
  const void* t;            // [rows, rank], rows ld_t elements apart
  const void* gate_weight;  // [heads, rank]
  const void* gate_bias;    // [heads], optional
  void* out;                // [rows, columns]
  int64_t rows, rank, heads, columns, ld_t;
  int dtype;
};
int gated_lowrank_linear_scale(const ScaleByGateCall& call, void* stream);

}  // namespace cuda
}  // namespace inherit_kernels
