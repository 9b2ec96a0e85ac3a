// What an op needs from its surroundings: a kernel table, threads, scratch memory. No torch.
#pragma once

#include <algorithm>
#include <atomic>
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

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Below this many floating point operations a region runs where it is: waking a second thread costs about 2 us, in
// which one core does 200,000 of them.
constexpr double kSerialWork = 2e5;

// Shares that `balanced` makes of a thread's part, and the parts it can make.
constexpr int64_t kShares = 4, kMostParts = 64;

template <class F>
void parallel(const Runtime& runtime, int64_t count, double work, const F& body) {
  if (count == 0) return;
  if (count == 1 || runtime.threads == 1 || work < kSerialWork) return body(int64_t{0}, count);
  RangeFunction call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  runtime.parallel_for(count, call, const_cast<F*>(&body));
}

// The same in small shares, a multiple of `multiple` each: a thread takes those of its own part first, so that it meets
// the same weights call after call, then helps with the others'. Two processors of a shared machine seldom run alike
// (1024 rows: 10 % faster). The body sees any ranges: what it sets up for one must cost little.
template <class F>
void balanced(const Runtime& runtime, int64_t count, double work, int64_t multiple, const F& body) {
  int64_t parts = std::min<int64_t>(runtime.threads, kMostParts);
  if (parts == 1 || count <= multiple || work < kSerialWork) return parallel(runtime, count, work, body);
  struct alignas(64) Cursor {
    std::atomic<int64_t> next;
  };
  Cursor cursors[kMostParts];
  int64_t part = ceil_div(count, parts), share = std::min(part, round_up(ceil_div(part, kShares), multiple));
  for (int64_t p = 0; p < parts; ++p) cursors[p].next = p * part;
  parallel(runtime, parts, work, [&](int64_t begin, int64_t) {
    for (int64_t i = 0; i < parts; ++i) {
      int64_t p = (begin + i) % parts, end = std::min(count, (p + 1) * part);
      auto take = [&] { return cursors[p].next.fetch_add(share, std::memory_order_relaxed); };
      for (int64_t first = take(); first < end; first = take()) body(first, std::min(end, first + share));
    }
  });
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
