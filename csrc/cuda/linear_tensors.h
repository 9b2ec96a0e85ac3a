// The adapter that lowrank_linear and gated_lowrank_linear share.
#pragma once

#include <tuple>

#include "inherit_kernels/cuda/linear_call.h"
#include "tensors.h"

namespace inherit_kernels::cuda {

struct LinearTensors {
  Tensor x, down, up;
  OptionalTensor gate_weight, gate_bias, bias, residual;
};

struct LinearLaunchers {
  size_t (*decode_workspace)(const LinearCall&);
  int (*decode)(const LinearCall&, void* stream);
};

inline LinearCall linear_call(LinearTensors& in, int64_t heads, int64_t out, int64_t activation) {
  LinearCall call{};
  Sizes sizes = sizes_of(in.x);
  Rows x = dense_rows(in.x), residual = dense_rows(in.residual);
  call.x = x.data;
  call.ld_x = x.stride;
  call.residual = residual.data;
  call.ld_residual = residual.stride;
  call.down = dense(in.down);
  call.up = dense(in.up);
  call.gate_weight = dense(in.gate_weight);
  call.gate_bias = dense(in.gate_bias);
  call.bias = dense(in.bias);
  call.rows = row_count(sizes);
  call.in = sizes.back();
  call.rank = in.down.size(0);
  call.out = call.ld_y = out;
  call.heads = heads;
  call.dtype = dtype_code(in.x, "x");
  call.activation = activation_code(activation);
  return call;
}

inline void launch_linear(const LinearLaunchers& launchers, LinearCall& call, const Tensor& x, const Context& context) {
  int64_t bytes = static_cast<int64_t>(launchers.decode_workspace(call));
  STD_TORCH_CHECK(bytes > 0, "no CUDA kernel takes this number of rows (", call.rows, "), rank (", call.rank,
                  ") or number of heads (", call.heads, "); use the backend triton or unfused");
  Tensor workspace = torch::stable::new_empty(x, {bytes}, torch::headeronly::ScalarType::Byte);
  call.workspace = workspace.data_ptr();
  check_launch(launchers.decode(call, context.stream));
}

// y, and t where it is asked for.
inline std::tuple<Tensor, OptionalTensor> linear_forward(const LinearLaunchers& launchers, LinearTensors in,
                                                         int64_t heads, int64_t out, int64_t activation, bool saving) {
  STD_TORCH_CHECK(in.x.dim() >= 1, "x: expected at least one dimension");
  STD_TORCH_CHECK(in.down.size(0) >= 1, "rank: must be at least 1");
  Context context(in.x);
  Sizes y_sizes = sizes_of(in.x), t_sizes = y_sizes;
  int64_t depth = y_sizes.back(), rank = in.down.size(0);
  y_sizes.back() = out;
  t_sizes.back() = rank;
  check(in.down, "down", {rank, depth}, in.x);
  check(in.gate_weight, "gate_weight", {heads, rank}, in.x);
  check(in.gate_bias, "gate_bias", {heads}, in.x);
  check(in.residual, "residual", y_sizes, in.x);
  Tensor y = torch::stable::new_empty(in.x, y_sizes);
  OptionalTensor t = saving ? OptionalTensor(torch::stable::new_empty(in.x, t_sizes)) : std::nullopt;
  LinearCall call = linear_call(in, heads, out, activation);
  call.y = y.data_ptr();
  call.t = t ? t->data_ptr() : nullptr;
  if (call.rows > 0) launch_linear(launchers, call, in.x, context);
  return {y, t};
}

}  // namespace inherit_kernels::cuda
