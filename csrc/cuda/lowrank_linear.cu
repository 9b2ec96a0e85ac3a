#include "inherit_kernels/cuda/lowrank_linear.h"

#include "inherit_kernels/cuda/decode_launch.h"

namespace inherit_kernels {
namespace cuda {

size_t lowrank_linear_decode_workspace(const LinearCall& call) {
  return decode_workspace(call, false);
}

int lowrank_linear_decode(const LinearCall& call, void* stream) {
  return launch_decode_any<false>(call, stream);
}

}  // namespace cuda
}  // namespace inherit_kernels
