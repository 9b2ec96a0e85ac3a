// What the adapters of every device need of torch tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace inherit_kernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// A view of expected sizes: a vector, or a list in braces, which costs no allocation.
struct Expected {
  Expected(const Sizes& sizes) : data(sizes.data()), count(sizes.size()) {}
  Expected(std::initializer_list<int64_t> sizes) : data(sizes.begin()), count(sizes.size()) {}
  const int64_t* data;
  size_t count;
};

inline void check_shape(const Tensor& tensor, const char* name, Expected expected) {
  auto sizes = tensor.sizes();
  bool equal = sizes.size() == expected.count && std::equal(sizes.begin(), sizes.end(), expected.data);
  STD_TORCH_CHECK(equal, name, ": unexpected shape");
}

inline void check_dims(const Tensor& tensor, const char* name, int64_t dims) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": expected ", dims, " dimensions, got ", tensor.dim());
}

// What the kernels' 64-bit arithmetic is safe with: no size, stride, padding or dilation above kMostSize, no tensor of
// more than kMostElements. An expanded tensor or a packed call's numbers may claim any size without having memory.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 1, kMostElements = int64_t{1} << 48;

inline int64_t check_size(int64_t value, const char* name, int64_t least) {
  STD_TORCH_CHECK(value >= least && value <= kMostSize, name, ": expected ", least, " to ", kMostSize, ", got ", value);
  return value;
}

inline int64_t check_elements(Expected sizes, const char* name) {
  int64_t count = 1;
  for (size_t k = 0; k < sizes.count; ++k) {
    bool overflow = __builtin_mul_overflow(count, std::max<int64_t>(sizes.data[k], 1), &count);
    STD_TORCH_CHECK(!overflow && count <= kMostElements, name, ": more than 2^48 elements");
  }
  return count;
}

struct Geometry {
  int64_t stride[2], padding[2], dilation[2];
};

// The extent of a convolution's output along dimension d, 0 of rows, 1 of columns.
inline int64_t output_size(int64_t size, int64_t kernel, const Geometry& g, int d) {
  check_size(size, "x", 0);
  check_size(kernel, "down", 1);
  check_size(g.stride[d], "stride", 1);
  check_size(g.padding[d], "padding", 0);
  check_size(g.dilation[d], "dilation", 1);
  int64_t room = size + 2 * g.padding[d] - g.dilation[d] * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, "x: smaller than down's kernel");
  return room / g.stride[d] + 1;
}

// The number of rows of [..., cols], also where cols is 0.
inline int64_t row_count(const Sizes& sizes) {
  int64_t rows = 1;
  for (size_t k = 0; k + 1 < sizes.size(); ++k) rows *= sizes[k];
  return rows;
}

// Dimensions [first, last) as one of a single stride, if they can be: the stride.
inline std::optional<int64_t> merged_stride(const Tensor& tensor, int64_t first, int64_t last) {
  auto sizes = tensor.sizes();
  auto strides = tensor.strides();
  int64_t stride = 0, span = 1;  // span: elements of the merged dimension so far
  for (int64_t k = last - 1; k >= first; --k) {
    if (sizes[k] == 1) continue;
    if (span == 1) {
      stride = strides[k];
    } else if (strides[k] != stride * span) {
      return std::nullopt;
    }
    span *= sizes[k];
  }
  return stride;
}

}  // namespace inherit_kernels
