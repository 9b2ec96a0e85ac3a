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
