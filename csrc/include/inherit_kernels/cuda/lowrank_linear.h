// The CUDA side of lowrank_linear. Launchers allocate nothing, print nothing and may be captured into a graph.
#pragma once

#include "inherit_kernels/cuda/linear_call.h"

namespace inherit_kernels {
namespace cuda {

// Few rows: 1 <= rank <= 512, rows <= 16, one head. 0 bytes of workspace mean: not supported.
size_t lowrank_linear_decode_workspace(const LinearCall& call);
// The value of a cudaError_t. `stream` is a cudaStream_t of the current device.
int lowrank_linear_decode(const LinearCall& call, void* stream);

}  // namespace cuda
}  // namespace inherit_kernels
