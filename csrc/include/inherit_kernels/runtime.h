// What an op needs from its surroundings: a kernel table, threads, scratch memory. No torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>

#include "inherit_kernels/kernels.h"

namespace inherit_kernels {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

struct Runtime {
  const Kernels* kernels;
  int64_t threads;
  // Calls function(context, begin, end) on ranges that cover [0, count).
  void (*parallel_for)(int64_t count, RangeFunction function, void* context);
};

// Below this many floating point operations a region runs where it is: waking a second thread costs about 2 us, in
// which one core does 200,000 of them.
constexpr double kSerialWork = 2e5;

template <class F>
void parallel(const Runtime& runtime, int64_t count, double work, const F& body) {
  if (count == 0) return;
  if (count == 1 || runtime.threads == 1 || work < kSerialWork) return body(int64_t{0}, count);
  RangeFunction call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  runtime.parallel_for(count, call, const_cast<F*>(&body));
}

// Uninitialised floats on a cache line boundary. malloc rather than aligned_alloc, which skips the thread's cache (80
// ns each, ten a call). A build with INHERIT_KERNELS_POISON fills them with NaN, so that a test sees every element that
// is read before it is written.
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count == 0) return;
    memory_ = std::malloc(static_cast<size_t>(count) * sizeof(float) + 63);
    if (!memory_) throw std::bad_alloc();
    data_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
#ifdef INHERIT_KERNELS_POISON
    for (int64_t k = 0; k < count; ++k) data_[k] = std::numeric_limits<float>::quiet_NaN();
#endif
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  void* memory_ = nullptr;
  float* data_ = nullptr;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

inline const void* element(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}

inline void* element(void* data, Dtype dtype, int64_t index) {
  return static_cast<char*>(data) + index * element_size(dtype);
}

inline MatrixView shifted(MatrixView view, int64_t row, int64_t col) {
  if (view.data) view.data = element(view.data, view.dtype, row * view.row_stride + col * view.col_stride);
  return view;
}

inline MatrixView transposed(MatrixView view) {
  return {view.data, view.dtype, view.col_stride, view.row_stride};
}

}  // namespace inherit_kernels
