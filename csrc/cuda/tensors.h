// From torch tensors on a CUDA device to the launchers' calls.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "inherit_kernels/cuda/device.h"

namespace inherit_kernels::cuda {

// The stream that torch's own kernels go to. libtorch_cuda exports it, but this library must load beside a torch
// without CUDA too, and a weak symbol is not found: Python loads libtorch_cuda outside the global scope.
inline void* current_stream(int32_t device) {
  using Query = int32_t (*)(int32_t, void**);
  static const Query query = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Query>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(query, "x: a CUDA tensor, but this process has no libtorch_cuda.so");
  void* stream = nullptr;
  STD_TORCH_CHECK(query(device, &stream) == 0, "torch could not say which CUDA stream is current");
  return stream;
}

// The device of x made current while this lives, and its stream.
struct Context {
  explicit Context(const Tensor& x) : index(x.get_device()), guard(index), stream(current_stream(index)) {}
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
};

inline int dtype_code(const Tensor& tensor, const char* name) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), name, ": dtype must be float32, bfloat16 or float16");
  return kFloat16;
}

inline void check(const Tensor& tensor, const char* name, Expected expected, const Tensor& x) {
  check_shape(tensor, name, expected);
  STD_TORCH_CHECK(dtype_code(tensor, name) == dtype_code(x, "x"), name, ": dtype differs from x");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device() == x.get_device(), name, ": device differs from x");
}

inline void check(const OptionalTensor& tensor, const char* name, Expected expected, const Tensor& x) {
  if (tensor) check(*tensor, name, expected, x);
}

inline bool aligned16(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

// Contiguous and on a 16-byte boundary, as allocations are and views need not be.
inline const void* dense(Tensor& tensor) {
  tensor = torch::stable::contiguous(tensor);
  if (!aligned16(tensor)) tensor = torch::stable::clone(tensor);
  return tensor.data_ptr();
}

inline const void* dense(OptionalTensor& tensor) {
  return tensor ? dense(*tensor) : nullptr;
}

struct Rows {
  const void* data;
  int64_t stride;
};

// [..., cols] as rows of one stride with their elements side by side, on 16-byte boundaries where cols allows it;
// copied where it is not laid out so.
inline Rows dense_rows(Tensor& tensor) {
  int64_t last = tensor.dim() - 1, cols = tensor.size(last), element = dtype_code(tensor, "x") == kFloat32 ? 4 : 2;
  std::optional<int64_t> row = merged_stride(tensor, 0, last);
  bool side_by_side = row && (cols == 1 || tensor.stride(last) == 1);
  bool wide = side_by_side && aligned16(tensor) && *row * element % 16 == 0;
  if (!side_by_side || (cols * element % 16 == 0 && !wide)) {
    dense(tensor);
    row = cols;
  }
  return {tensor.data_ptr(), *row};
}

inline Rows dense_rows(OptionalTensor& tensor) {
  return tensor ? dense_rows(*tensor) : Rows{nullptr, 0};
}

inline int activation_code(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= 4, "activation: unknown code ", value);
  return static_cast<int>(value);
}

inline void check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "a CUDA kernel could not be started: ", error_text(error));
}

}  // namespace inherit_kernels::cuda
