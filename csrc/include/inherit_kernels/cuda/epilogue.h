// What every kernel does with a finished sum.
#pragma once

#include "inherit_kernels/cuda/words.h"

namespace inherit_kernels {
namespace cuda {

// The codes are those of the ops' `activation` argument. relu keeps NaN.
__device__ __forceinline__ float activate(float z, int activation) {
  if (activation == 1) return z < 0.0f ? 0.0f : z;
  if (activation == 2) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  if (activation == 3) return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
  if (activation == 4) return z / (1.0f + expf(-z));
  return z;
}

}  // namespace cuda
}  // namespace inherit_kernels
