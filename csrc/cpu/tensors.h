// From torch tensors to the views of the torch-free headers, and back.
#pragma once

#include <torch/csrc/stable/library.h>

#include <utility>

#include "../tensors.h"
#include "inherit_kernels/product.h"
#include "isa.h"

namespace inherit_kernels {

inline Runtime cpu_runtime() {
  auto run = [](int64_t count, RangeFunction function, void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { function(context, begin, end); });
  };
  return {&active_kernels(), static_cast<int64_t>(torch::stable::get_num_threads()), run};
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return Dtype::kFloat32;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_bfloat16(), name, ": dtype must be float32 or bfloat16");
  return Dtype::kBFloat16;
}

inline void check(const Tensor& tensor, const char* name, Expected expected, Dtype dtype) {
  check_shape(tensor, name, expected);
  check_elements(expected, name);
  STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, name, ": dtype differs from x");
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": device must be cpu");
}

inline void check(const OptionalTensor& tensor, const char* name, Expected expected, Dtype dtype) {
  if (tensor) check(*tensor, name, expected, dtype);
}

// Uninitialised, contiguous (or with the given strides), on the CPU.
inline Tensor empty_cpu(const Sizes& sizes, Dtype dtype, Sizes strides = {}) {
  int64_t count = check_elements(sizes, "output");
  if (strides.empty()) {
    strides.resize(sizes.size());
    int64_t stride = 1;
    for (size_t k = sizes.size(); k-- > 0;) {
      strides[k] = stride;
      stride *= sizes[k] > 1 ? sizes[k] : 1;
    }
  }
  AtenTensorHandle handle;
  auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype == Dtype::kFloat32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
                               aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == 0, "not enough memory for ", count, " elements");
  return Tensor(handle);
}

// The panels that pack_panels made of a weight [outputs, depth].
inline Panels panels_of(const Runtime& runtime, const Tensor& panels, const char* name, Dtype dtype, int64_t outputs,
                        int64_t depth) {
  check(panels, name, {panels_elements(*runtime.kernels, dtype, outputs, depth)}, dtype);
  return {panels.data_ptr(), dtype, depth};
}

inline Tensor empty_if(bool needed, const Sizes& sizes, Dtype dtype) {
  return empty_cpu(needed ? sizes : Sizes{0}, dtype);
}

// [..., cols] as a matrix; `tensor` is replaced by a contiguous copy where its strides do not allow it.
inline MatrixView rows_view(Tensor& tensor, Dtype dtype) {
  int64_t last = tensor.dim() - 1;
  std::optional<int64_t> row = merged_stride(tensor, 0, last);
  if (!row) {
    tensor = torch::stable::contiguous(tensor);
    row = tensor.size(last);
  }
  return {tensor.data_ptr(), dtype, *row, tensor.size(last) == 1 ? 1 : tensor.stride(last)};
}

inline MatrixView rows_view(OptionalTensor& tensor, Dtype dtype) {
  return tensor ? rows_view(*tensor, dtype) : MatrixView{nullptr, dtype, 0, 0};
}

inline MatrixView matrix_view(const Tensor& tensor, Dtype dtype) {
  return {tensor.data_ptr(), dtype, tensor.stride(0), tensor.size(1) == 1 ? 1 : tensor.stride(1)};
}

inline MatrixView matrix_view(const OptionalTensor& tensor, Dtype dtype) {
  return tensor ? matrix_view(*tensor, dtype) : MatrixView{nullptr, dtype, 0, 0};
}

// up of a gated op, [heads, out, rank].
inline HeadsView heads_view(const Tensor& up, Dtype dtype) {
  return {{up.data_ptr(), dtype, up.stride(1), up.size(2) == 1 ? 1 : up.stride(2)}, up.stride(0)};
}

// A vector as a matrix of one row.
inline MatrixView vector_view(const OptionalTensor& tensor, Dtype dtype) {
  if (!tensor) return {nullptr, dtype, 0, 0};
  return {tensor->data_ptr(), dtype, 0, tensor->stride(0)};
}

inline Activation activation_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= 4, "activation: unknown code ", value);
  return static_cast<Activation>(value);
}

}  // namespace inherit_kernels
