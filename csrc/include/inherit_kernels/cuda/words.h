// The words CUDA kernels here are written in: one per hardware feature, with the device meaning below and a host twin
// under tests/emulation for INHERIT_KERNELS_EMULATED, so that the same source runs on a CPU. A kernel holds no
// `<<<>>>`, no static __shared__, no asm and no cooperative groups. Warp words take all 32 lanes.
#pragma once

#ifndef INHERIT_KERNELS_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace inherit_kernels {
namespace cuda {

// 16-bit floats as they lie in memory.
struct bf16 {
  uint16_t bits;
};
struct half16 {
  uint16_t bits;
};

// Operands of mma16816: lane 4 g + t holds, of A [16, 16], (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8) and the
// element after each; of B [16, 8], (2t, g) (2t + 8, g) and the row after each; of D [16, 8], (g, 2t) (g, 2t + 1) (g +
// 8, ...).
struct FragmentA {
  uint32_t r[4];
};
struct FragmentB {
  uint32_t r[2];
};
struct Accumulator {
  float r[4];
};

}  // namespace cuda
}  // namespace inherit_kernels

#ifdef INHERIT_KERNELS_EMULATED
#include "cuda_twin.h"
#else

namespace inherit_kernels {
namespace cuda {

// One launch. after_previous: may start when every block of the kernel before it has called release_next_grid(); the
// kernel must then call wait_previous_grid() before it touches that kernel's results.
struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool after_previous = false;
};

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ __forceinline__ float to_float(half16 v) {
  return __half2float(__ushort_as_half(v.bits));
}

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ __forceinline__ half16 from_float<half16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

// The dynamic shared memory of the block, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char p_dynamic_shared[];
  return reinterpret_cast<T*>(p_dynamic_shared);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ float shuffle_xor(float v, int lane_mask) {
  return __shfl_xor_sync(~0u, v, lane_mask);
}
__device__ __forceinline__ float shuffle(float v, int lane) {
  return __shfl_sync(~0u, v, lane);
}

// d += a b, float32 sums.
template <class T>
__device__ __forceinline__ void mma16816(Accumulator& d, const FragmentA& a, const FragmentB& b);
#define INHERIT_KERNELS_MMA(TYPE, NAME)                                                                     \
  template <>                                                                                               \
  __device__ __forceinline__ void mma16816<TYPE>(Accumulator & d, const FragmentA& a, const FragmentB& b) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                     \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                             \
                 "{%0,%1,%2,%3};"                                                                           \
                 : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3])                                   \
                 : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));           \
  }
INHERIT_KERNELS_MMA(bf16, "bf16")
INHERIT_KERNELS_MMA(half16, "f16")
#undef INHERIT_KERNELS_MMA

// 16 bytes to shared memory in the background, zeros when !valid (the source is then not read).
__device__ __forceinline__ void copy16_async(void* p_shared, const void* p_global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(p_shared)),
               "l"(__cvta_generic_to_global(p_global)), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of copies begun since the last call.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's copies, but for the kPending newest groups. Other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Weights, read once: 16 aligned bytes that stay out of L1. Volatile: not moved behind wait_previous_grid().
__device__ __forceinline__ uint4 load16_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}
// 16 aligned bytes of any memory.
__device__ __forceinline__ uint4 load16(const void* p) {
  return *static_cast<const uint4*>(p);
}
__device__ __forceinline__ void store16(void* p, uint4 v) {
  *static_cast<uint4*>(p) = v;
}

// Flags between blocks, for the whole device.
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
}
// Adds and returns the value before.
__device__ __forceinline__ int add_release(int* p, int v) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
  return before;
}

// sm_90 words. Below, grids never overlap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void wait_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void release_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#else
__device__ __forceinline__ void wait_previous_grid() {}
__device__ __forceinline__ void release_next_grid() {}
#endif

// A kernel takes one plain struct. Grids may overlap only if this very binary waits for the one before: code of sm_80
// that a driver compiled anew for a later device does not.
template <class Args>
cudaError_t launch(const Shape& shape, cudaStream_t stream, void (*kernel)(Args), const Args& args) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute overlap = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  if (shape.shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  if (shape.after_previous) {
    cudaFuncAttributes compiled;
    cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
    if (error != cudaSuccess) return error;
    if (compiled.ptxVersion >= 90) {
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
      config.numAttrs = 1;
    }
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace cuda
}  // namespace inherit_kernels
#endif

namespace inherit_kernels {
namespace cuda {

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// 16 bytes as the elements they hold, and back; registers on the device.
template <class T>
struct Pack {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));
  T v[kCount];
};
template <class T>
__device__ __forceinline__ Pack<T> unpack(uint4 bits) {
  Pack<T> pack;
  memcpy(&pack, &bits, 16);
  return pack;
}
template <class T>
__device__ __forceinline__ uint4 bits_of_pack(const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, 16);
  return bits;
}

}  // namespace cuda
}  // namespace inherit_kernels
