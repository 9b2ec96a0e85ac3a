// Mistakes on purpose: a checker that does not report them does not work on this machine, and its silence about our
// kernels would prove nothing. planted memcheck | racecheck | synccheck
#include <cuda_runtime.h>

#include <cstring>

constexpr int kThreads = 96;

// Writes past the end of p_out [64].
__global__ void out_of_bounds_kernel(float* p_out) {
  p_out[threadIdx.x] = 1.0f;
}

// Reads what another warp writes, without a barrier between them.
__global__ void race_kernel(float* p_out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  p_out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// Half of a warp waits for the other half, which does not come.
__global__ void divergence_kernel(float* p_out) {
  if (threadIdx.x < 16) __syncthreads();
  p_out[threadIdx.x] = 1.0f;
}

int main(int count, char** arguments) {
  auto asked = [&](const char* name) { return count > 1 && std::strcmp(arguments[1], name) == 0; };
  bool memory = asked("memcheck");
  float* p_out = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&p_out), (memory ? 64 : kThreads) * sizeof(float)) != cudaSuccess) return 2;
  if (asked("racecheck")) race_kernel<<<1, kThreads>>>(p_out);
  if (asked("synccheck")) divergence_kernel<<<1, kThreads>>>(p_out);
  if (memory) out_of_bounds_kernel<<<1, kThreads>>>(p_out);
  cudaError_t error = cudaDeviceSynchronize();
  cudaFree(p_out);
  return error == cudaSuccess ? 0 : 3;
}
