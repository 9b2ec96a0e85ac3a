#include "inherit_kernels/cuda/lowrank_linear.h"

#include "linear_tensors.h"

namespace inherit_kernels::cuda {
namespace {

constexpr LinearLaunchers kLaunchers = {lowrank_linear_decode_workspace, lowrank_linear_decode};

std::tuple<Tensor, OptionalTensor> forward(Tensor x, Tensor down, Tensor up, OptionalTensor bias,
                                           OptionalTensor residual, int64_t activation, bool saving) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 2);
  check(up, "up", {up.size(0), down.size(0)}, x);
  check(bias, "bias", {up.size(0)}, x);
  LinearTensors in = {x, down, up, std::nullopt, std::nullopt, bias, residual};
  return linear_forward(kLaunchers, in, 1, up.size(0), activation, saving);
}

Tensor lowrank_linear(Tensor x, Tensor down, Tensor up, OptionalTensor bias, OptionalTensor residual,
                      int64_t activation) {
  return std::get<0>(forward(x, down, up, bias, residual, activation, false));
}

std::tuple<Tensor, Tensor> lowrank_linear_saving(Tensor x, Tensor down, Tensor up, OptionalTensor bias,
                                                 OptionalTensor residual, int64_t activation) {
  auto [y, t] = forward(x, down, up, bias, residual, activation, true);
  return {y, *t};
}

}  // namespace
}  // namespace inherit_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CUDA, m) {
  m.impl("lowrank_linear", TORCH_BOX(&inherit_kernels::cuda::lowrank_linear));
  m.impl("lowrank_linear_saving", TORCH_BOX(&inherit_kernels::cuda::lowrank_linear_saving));
}
