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

Tensor scale_by_gate(Tensor t, Tensor gate_weight, OptionalTensor gate_bias, int64_t columns) {
  check_dims(t, "t", 2);
  check_dims(gate_weight, "gate_weight", 2);
  int64_t heads = gate_weight.size(0), rank = t.size(1);
  Context context(t);
  check(gate_weight, "gate_weight", {heads, rank}, t);
  check(gate_bias, "gate_bias", {heads}, t);
  Tensor out = torch::stable::new_empty(t, {t.size(0), check_size(columns, "columns", 1)});
  Rows rows = dense_rows(t);
  ScaleByGateCall call{};
  call.t = rows.data;
  call.ld_t = rows.stride;
  call.gate_weight = dense(gate_weight);
  call.gate_bias = dense(gate_bias);
  call.out = out.data_ptr();
  call.rows = t.size(0);
  call.rank = rank;
  call.heads = heads;
  call.columns = columns;
  call.dtype = dtype_code(t, "t");
  check_launch(gated_lowrank_linear_scale(call, context.stream));
  return out;
}

}  // namespace
}  // namespace inherit_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CUDA, m) {
  m.impl("gated_lowrank_linear", TORCH_BOX(&inherit_kernels::cuda::gated_lowrank_linear));
  m.impl("gated_lowrank_linear_saving", TORCH_BOX(&inherit_kernels::cuda::gated_lowrank_linear_saving));
  m.impl("scale_by_gate", TORCH_BOX(&inherit_kernels::cuda::scale_by_gate));
}
