#include "inherit_kernels/cuda/device.h"
#include "inherit_kernels/device_info.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#ifndef INHERIT_KERNELS_CUDA_ARCHITECTURES
#define INHERIT_KERNELS_CUDA_ARCHITECTURES "unknown"
#endif

namespace inherit_kernels {
namespace {

// p_out [count] <- first + i
__global__ void device_info_fill_kernel(float* p_out, int64_t count, float first) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) p_out[i] = first + static_cast<float>(i);
}

cudaError_t fill_on_device(std::vector<float>& host) {
  int64_t count = static_cast<int64_t>(host.size()), bytes = count * sizeof(float);
  constexpr int kThreads = 128;
  float* p_out = nullptr;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&p_out), bytes);
  if (error != cudaSuccess) return error;
  unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  cudaGetLastError();  // forget an earlier call's
  device_info_fill_kernel<<<blocks, kThreads>>>(p_out, count, 0.5f);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(host.data(), p_out, bytes, cudaMemcpyDeviceToHost);
  cudaFree(p_out);
  return error;
}

}  // namespace

const char* cuda_build_info() {
  static char text[256];
  std::snprintf(text, sizeof text, "CUDA runtime %d.%d, %s", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
                INHERIT_KERNELS_CUDA_ARCHITECTURES);
  return text;
}

const char* cuda_self_test() {
  static thread_local char text[256];
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::snprintf(text, sizeof text, "no CUDA device is usable here: %s",
                  error == cudaSuccess ? "none was found" : cudaGetErrorString(error));
    return text;
  }
  std::vector<float> host(1000, -1.0f);
  error = fill_on_device(host);
  bool right = error == cudaSuccess;
  for (size_t i = 0; right && i < host.size(); ++i) right = host[i] == 0.5f + static_cast<float>(i);
  std::snprintf(text, sizeof text, "%s",
                right                  ? "ok: a kernel ran on the current device"
                : error != cudaSuccess ? cudaGetErrorString(error)
                                       : "a kernel ran on the current device and gave wrong values");
  return text;
}

namespace cuda {

const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace cuda
}  // namespace inherit_kernels
