// What adapters in plain C++ ask of the CUDA runtime.
#pragma once

namespace inherit_kernels::cuda {

// Codes of element types in launchers' calls.
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct DeviceLimits {
  int capability;  // 90 for compute capability 9.0
  int multiprocessors;
  int shared_bytes;  // that a CTA may use
};

// Zeros where the device cannot be asked.
DeviceLimits device_limits(int device);
// What a cudaError_t means.
const char* error_text(int error);

}  // namespace inherit_kernels::cuda
