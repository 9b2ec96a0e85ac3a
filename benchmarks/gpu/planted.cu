// Two mistakes on purpose: a memory checker that does not report them does not work on this machine, and its silence
// about our kernels would prove nothing. planted memcheck | planted racecheck
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

int main(int count, char** arguments) {
  bool race = count > 1 && std::strcmp(arguments[1], "racecheck") == 0;
  float* p_out = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&p_out), (race ? kThreads : 64) * sizeof(float)) != cudaSuccess) return 2;
  if (race) {
    race_kernel<<<1, kThreads>>>(p_out);
  } else {
    out_of_bounds_kernel<<<1, kThreads>>>(p_out);
  }
  cudaError_t error = cudaDeviceSynchronize();
  cudaFree(p_out);
  return error == cudaSuccess ? 0 : 3;
}
