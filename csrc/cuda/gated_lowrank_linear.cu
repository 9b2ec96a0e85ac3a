#include "inherit_kernels/cuda/gated_lowrank_linear.h"

#include "inherit_kernels/cuda/decode_launch.h"
#include "inherit_kernels/cuda/scale_by_gate.h"

namespace inherit_kernels {
namespace cuda {

size_t gated_lowrank_linear_decode_workspace(const LinearCall& call) {
  return decode_workspace(call, true);
}

int gated_lowrank_linear_decode(const LinearCall& call, void* stream) {
  return launch_decode_any<true>(call, stream);
}

int gated_lowrank_linear_scale(const ScaleByGateCall& c, void* stream) {
  bool sizes = c.heads >= 1 && c.heads <= kMostScaleHeads && c.rank >= 1 && c.rank < 1 << 24 && c.rows >= 0 &&
               c.rows < int64_t{1} << 33 && c.columns < int64_t{1} << 30;
  bool room = c.columns == c.heads * c.rank || c.columns >= c.heads * (c.rank + 1);
  if (!sizes || !room) return static_cast<int>(cudaErrorInvalidValue);
  if (c.rows == 0) return static_cast<int>(cudaSuccess);
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (c.dtype == kFloat32) return static_cast<int>(launch_scale_by_gate<float>(c, queue));
  if (c.dtype == kFloat16) return static_cast<int>(launch_scale_by_gate<half16>(c, queue));
  return static_cast<int>(launch_scale_by_gate<bf16>(c, queue));
}

}  // namespace cuda
}  // namespace inherit_kernels
