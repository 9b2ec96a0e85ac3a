#include "inherit_kernels/linear_backward.h"
#include "tensors.h"

namespace inherit_kernels {
namespace {

struct Gate {
  Tensor weight;  // [H, R]
  OptionalTensor gate_bias, bias;
};

struct Result {
  Tensor y;
  OptionalTensor t;
};

void check_gate(const Gate& gate, int64_t heads, int64_t rank, int64_t out, Dtype dtype) {
  STD_TORCH_CHECK(heads >= 1 && rank >= 1, "up: needs at least one head and one rank");
  check(gate.weight, "gate_weight", {heads, rank}, dtype);
  check(gate.gate_bias, "gate_bias", {heads}, dtype);
  check(gate.bias, "bias", {heads, out}, dtype);
}

// Plain weights: down [R, K], up [H, N, R], biases. Packed: their panels, with the rank and N given; the biases are in
// the panels, or there are none.
Result forward(Tensor x, const Tensor& down, const Tensor& up, const Gate& gate, OptionalTensor residual,
               int64_t activation, bool packed, bool biased, int64_t rank, int64_t out, bool keep_t) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x: expected a cpu tensor of at least one dimension");
  check_dims(gate.weight, "gate_weight", 2);
  check_size(rank, "rank", 1);
  check_size(out, "out_features", 0);
  check_elements(sizes_of(x), "x");
  Sizes y_sizes = sizes_of(x), t_sizes = y_sizes;
  int64_t in = check_size(y_sizes.back(), "x: its last dimension", 0);
  int64_t heads = check_size(gate.weight.size(0), "gate_weight: heads", 1);
  check_elements({rank, in}, "down");
  check_elements({heads, out, rank + 1}, "up");
  y_sizes.back() = out;
  t_sizes.back() = rank;
  check_gate(gate, heads, rank, out, dtype);
  LinearForward f{};
  if (packed) {
    f.down_panels = panels_of(runtime, down, "panels_down", dtype, rank, in);
    f.up_panels = panels_of(runtime, up, "panels_up", dtype, out, heads * (rank + biased));
  } else {
    check(down, "down", {rank, in}, dtype);
    check(up, "up", {heads, out, rank}, dtype);
  }
  check(residual, "residual", y_sizes, dtype);

  Result result{empty_cpu(y_sizes, dtype), std::nullopt};
  if (keep_t) result.t = empty_cpu(t_sizes, dtype);
  f.shape = {row_count(y_sizes), in, rank, out, heads};
  f.x = rows_view(x, dtype);
  f.packed = packed;
  if (!packed) {
    f.down = matrix_view(down, dtype);
    f.up = heads_view(up, dtype);
  }
  f.gate_weight = matrix_view(gate.weight, dtype);
  f.gate_bias = vector_view(gate.gate_bias, dtype);
  f.bias = matrix_view(gate.bias, dtype);
  f.residual = rows_view(residual, dtype);
  f.activation = activation_of(activation);
  f.dtype = dtype;
  f.y = result.y.data_ptr();
  f.t = keep_t ? result.t->data_ptr() : nullptr;
  linear_forward(runtime, f);
  return result;
}

Tensor gated_lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor gate_weight, OptionalTensor gate_bias,
                            OptionalTensor bias, OptionalTensor residual, int64_t activation) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 3);
  Gate gate{gate_weight, gate_bias, bias};
  return forward(x, down, up, gate, residual, activation, false, false, down.size(0), up.size(1), false).y;
}

std::tuple<Tensor, Tensor> gated_lowrank_linear_saving(Tensor x, Tensor down, Tensor up, Tensor gate_weight,
                                                       OptionalTensor gate_bias, OptionalTensor bias,
                                                       OptionalTensor residual, int64_t activation) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 3);
  Gate gate{gate_weight, gate_bias, bias};
  Result r = forward(x, down, up, gate, residual, activation, false, false, down.size(0), up.size(1), true);
  return {r.y, *r.t};
}

Tensor gated_lowrank_linear_packed(Tensor x, Tensor panels_down, Tensor panels_up, int64_t rank, int64_t out_features,
                                   Tensor gate_weight, OptionalTensor gate_bias, bool biased, OptionalTensor residual,
                                   int64_t activation) {
  Gate gate{gate_weight, gate_bias, std::nullopt};
  return forward(x, panels_down, panels_up, gate, residual, activation, true, biased, rank, out_features, false).y;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors gated_lowrank_linear_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, Tensor gate_weight,
                                         OptionalTensor gate_bias, OptionalTensor bias, bool need_dx, bool need_down,
                                         bool need_up, bool need_gate_weight, bool need_gate_bias, bool need_bias) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x: expected a cpu tensor of at least one dimension");
  check_dims(down, "down", 2);
  check_dims(up, "up", 3);
  Sizes x_sizes = sizes_of(x), z_sizes = x_sizes, t_sizes = x_sizes;
  int64_t in = check_size(x_sizes.back(), "x: its last dimension", 0);
  int64_t rank = down.size(0), heads = up.size(0), out = up.size(1);
  check_elements(x_sizes, "x");
  z_sizes.back() = out;
  t_sizes.back() = rank;
  check(down, "down", {rank, in}, dtype);
  check(up, "up", {heads, out, rank}, dtype);
  check(dz, "dz", z_sizes, dtype);
  check(t, "t", t_sizes, dtype);
  check_gate({gate_weight, gate_bias, bias}, heads, rank, out, dtype);

  Tensor dx = empty_if(need_dx, x_sizes, dtype), d_down = empty_if(need_down, {rank, in}, dtype);
  Tensor d_up = empty_if(need_up, {heads, out, rank}, dtype);
  Tensor d_gate_weight = empty_if(need_gate_weight, {heads, rank}, dtype);
  Tensor d_gate_bias = empty_if(need_gate_bias, {heads}, dtype), d_bias = empty_if(need_bias, {heads, out}, dtype);
  LinearBackward b{};
  b.shape = {row_count(x_sizes), in, rank, out, heads};
  b.dz = rows_view(dz, dtype);
  b.x = rows_view(x, dtype);
  b.t = rows_view(t, dtype);
  b.down = matrix_view(down, dtype);
  b.up = heads_view(up, dtype);
  b.gate_weight = matrix_view(gate_weight, dtype);
  b.gate_bias = vector_view(gate_bias, dtype);
  b.bias = matrix_view(bias, dtype);
  b.dtype = dtype;
  b.dx = need_dx ? dx.data_ptr() : nullptr;
  b.d_down = need_down ? d_down.data_ptr() : nullptr;
  b.d_up = need_up ? d_up.data_ptr() : nullptr;
  b.d_gate_weight = need_gate_weight ? d_gate_weight.data_ptr() : nullptr;
  b.d_gate_bias = need_gate_bias ? d_gate_bias.data_ptr() : nullptr;
  b.d_bias = need_bias ? d_bias.data_ptr() : nullptr;
  linear_backward(runtime, b);
  return {dx, d_down, d_up, d_gate_weight, d_gate_bias, d_bias};
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("gated_lowrank_linear", TORCH_BOX(&inherit_kernels::gated_lowrank_linear));
  m.impl("gated_lowrank_linear_saving", TORCH_BOX(&inherit_kernels::gated_lowrank_linear_saving));
  m.impl("gated_lowrank_linear_packed", TORCH_BOX(&inherit_kernels::gated_lowrank_linear_packed));
  m.impl("gated_lowrank_linear_backward", TORCH_BOX(&inherit_kernels::gated_lowrank_linear_backward));
}
