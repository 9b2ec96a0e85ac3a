#include "inherit_kernels/cuda/gated_lowrank_linear.h"

#include "linear_tensors.h"

namespace inherit_kernels::cuda {
namespace {

constexpr LinearLaunchers kLaunchers = {gated_lowrank_linear_decode_workspace, gated_lowrank_linear_decode};

std::tuple<Tensor, OptionalTensor> forward(Tensor x, Tensor down, Tensor up, Tensor gate_weight,
                                           OptionalTensor gate_bias, OptionalTensor bias, OptionalTensor residual,
                                           int64_t activation, bool saving) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 3);
  int64_t heads = up.size(0), out = up.size(1);
  check(up, "up", {heads, out, down.size(0)}, x);
  check(bias, "bias", {heads, out}, x);
  LinearTensors in = {x, down, up, gate_weight, gate_bias, bias, residual};
  return linear_forward(kLaunchers, in, heads, out, activation, saving);
}

Tensor gated_lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor gate_weight, OptionalTensor gate_bias,
                            OptionalTensor bias, OptionalTensor residual, int64_t activation) {
  return std::get<0>(forward(x, down, up, gate_weight, gate_bias, bias, residual, activation, false));
}

std::tuple<Tensor, Tensor> gated_lowrank_linear_saving(Tensor x, Tensor down, Tensor up, Tensor gate_weight,
                                                       OptionalTensor gate_bias, OptionalTensor bias,
                                                       OptionalTensor residual, int64_t activation) {
  auto [y, t] = forward(x, down, up, gate_weight, gate_bias, bias, residual, activation, true);
  return {y, *t};
}

}  // namespace
}  // namespace inherit_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CUDA, m) {
  m.impl("gated_lowrank_linear", TORCH_BOX(&inherit_kernels::cuda::gated_lowrank_linear));
  m.impl("gated_lowrank_linear_saving", TORCH_BOX(&inherit_kernels::cuda::gated_lowrank_linear_saving));
}
