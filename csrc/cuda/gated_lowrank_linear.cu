#include "inherit_kernels/cuda/gated_lowrank_linear.h"

#include "inherit_kernels/cuda/decode_launch.h"

namespace inherit_kernels {
namespace cuda {

size_t gated_lowrank_linear_decode_workspace(const LinearCall& call) {
  return decode_workspace(call, true);
}

int gated_lowrank_linear_decode(const LinearCall& call, void* stream) {
  return launch_decode_any<true>(call, stream);
}

}  // namespace cuda
}  // namespace inherit_kernels
