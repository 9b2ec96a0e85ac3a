// The words of inherit_kernels/cuda/words.h on a CPU. Reads and writes of shared and global memory stand here, in
// instrumented code, and go by loops: gcc expands a short memcpy where ThreadSanitizer no longer sees it.
#pragma once

#include <cmath>
#include <cstring>
#include <string>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801;

inline void __syncthreads(int line = __builtin_LINE()) {
  inherit_kernels::emulation::barrier(inherit_kernels::emulation::Scope::kBlock, "__syncthreads", line);
}
inline void __syncwarp(int line = __builtin_LINE()) {
  inherit_kernels::emulation::barrier(inherit_kernels::emulation::Scope::kWarp, "__syncwarp", line);
}

namespace inherit_kernels {
namespace cuda {

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool after_previous = false;
};

template <class To, class From>
To bits_of(From v) {
  To result;
  static_assert(sizeof result == sizeof v, "");
  std::memcpy(&result, &v, sizeof v);
  return result;
}

inline float to_float(float v) {
  return v;
}
inline float to_float(bf16 v) {
  return bits_of<float>(static_cast<uint32_t>(v.bits) << 16);
}
inline float to_float(half16 v) {
  uint32_t sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 0x3ffu;
  float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
               : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                : std::ldexp(static_cast<float>(mantissa | 0x400u), static_cast<int>(exponent) - 25);
  return sign ? -size : size;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  uint32_t bits = bits_of<uint32_t>(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // nearest, ties to even
}
template <>
inline half16 from_float<half16>(float v) {
  uint16_t sign = static_cast<uint16_t>(bits_of<uint32_t>(v) >> 16 & 0x8000);
  float size = std::fabs(v);
  if (v != v) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  exponent = size == 0.0f || exponent < -13 ? -13 : exponent;     // subnormal below 2^-14
  float units = std::nearbyint(std::ldexp(size, 11 - exponent));  // of the last place, ties to even
  uint32_t bits = static_cast<uint32_t>(exponent + 13) << 10;     // the leading one adds the missing exponent
  return {static_cast<uint16_t>(sign | (bits + static_cast<uint32_t>(units)))};
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared_base());
}

inline float shuffle(float v, int lane, int line = __builtin_LINE()) {
  struct {
    float v;
    int32_t lane;
  } in = {v, lane};
  float out;
  emulation::exchange("shuffle", line, &in, 8, &out, 4, emulation::compute_shuffle, 0);
  return out;
}
inline float shuffle_xor(float v, int lane_mask, int line = __builtin_LINE()) {
  unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return shuffle(v, static_cast<int>(thread % 32) ^ lane_mask, line);
}

template <class T>
void mma16816(Accumulator& d, const FragmentA& a, const FragmentB& b, int line = __builtin_LINE()) {
  struct {
    FragmentA a;
    FragmentB b;
    Accumulator d;
  } in = {a, b, d};
  emulation::exchange("mma16816", line, &in, sizeof in, &d, sizeof d, emulation::compute_mma,
                      std::is_same<T, bf16>::value);
}

inline void require_aligned(const void* p, const char* word) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulation::fail(std::string(word) + ": the address is not 16-byte aligned");
}

inline uint4 load16(const void* p) {
  require_aligned(p, "load16");
  const unsigned* words = static_cast<const unsigned*>(p);
  return {words[0], words[1], words[2], words[3]};
}
inline void store16(void* p, uint4 v) {
  require_aligned(p, "store16");
  unsigned *words = static_cast<unsigned*>(p), values[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) words[i] = values[i];
}
inline uint4 load16_streaming(const void* p) {
  return load16(p);
}

inline void land_copy(void* p_shared, const void* p_global, bool valid) {
  store16(p_shared, valid ? load16(p_global) : uint4{0, 0, 0, 0});
}
inline void copy16_async(void* p_shared, const void* p_global, bool valid) {
  require_aligned(p_shared, "copy16_async");
  if (valid) require_aligned(p_global, "copy16_async");
  emulation::begin_copy(p_shared, p_global, valid, land_copy);
}
inline void commit_copies() {
  emulation::commit_copies();
}
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

inline int load_acquire(const int* p, int line = __builtin_LINE()) {
  emulation::poll(line);
  int v = __atomic_load_n(p, __ATOMIC_RELAXED);
  emulation::order_after(p);
  return v;
}
inline void store_release(int* p, int v) {
  emulation::order_before(p);
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
inline int add_release(int* p, int v) {
  emulation::order_before(p);
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

inline void wait_previous_grid(int line = __builtin_LINE()) {
  emulation::wait_previous_grid(line);
}
inline void release_next_grid() {
  emulation::release_next_grid();
}

template <class Args>
cudaError_t launch(const Shape& shape, cudaStream_t, void (*kernel)(Args), const Args& args) {
  emulation::enqueue({shape.grid, shape.block, shape.shared_bytes, shape.after_previous},
                     [kernel, args] { kernel(args); });
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace inherit_kernels
