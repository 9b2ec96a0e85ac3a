// What adapters in plain C++ ask of the CUDA runtime.
#pragma once

namespace inherit_kernels::cuda {

// Codes of element types in launchers' calls.
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What a cudaError_t means.
const char* error_text(int error);

}  // namespace inherit_kernels::cuda
