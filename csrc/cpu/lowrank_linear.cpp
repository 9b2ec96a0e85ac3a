#include "inherit_kernels/linear_backward.h"
#include "tensors.h"

namespace inherit_kernels {
namespace {

struct Result {
  Tensor y;
  OptionalTensor t;
};

// Plain weights: down [R, K], up [N, R], bias. Packed: their panels, with the rank and N given; the bias is in the
// panels, or there is none.
Result forward(Tensor x, const Tensor& down, const Tensor& up, const OptionalTensor& bias, OptionalTensor residual,
               int64_t activation, bool packed, bool biased, int64_t rank, int64_t out, bool keep_t) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x: expected a cpu tensor of at least one dimension");
  check_size(rank, "rank", 1);
  check_size(out, "out_features", 0);
  check_elements(sizes_of(x), "x");
  Sizes y_sizes = sizes_of(x), t_sizes = y_sizes;
  int64_t in = check_size(y_sizes.back(), "x: its last dimension", 0);
  check_elements({rank, in}, "down");
  check_elements({out, rank + 1}, "up");
  y_sizes.back() = out;
  t_sizes.back() = rank;
  LinearForward f{};
  if (packed) {
    f.down_panels = panels_of(runtime, down, "panels_down", dtype, rank, in);
    f.up_panels = panels_of(runtime, up, "panels_up", dtype, out, rank + biased);
  } else {
    check(down, "down", {rank, in}, dtype);
    check(up, "up", {out, rank}, dtype);
  }
  check(bias, "bias", {out}, dtype);
  check(residual, "residual", y_sizes, dtype);

  Result result{empty_cpu(y_sizes, dtype), std::nullopt};
  if (keep_t) result.t = empty_cpu(t_sizes, dtype);
  f.shape = {row_count(y_sizes), in, rank, out, 1};
  f.x = rows_view(x, dtype);
  f.packed = packed;
  if (!packed) {
    f.down = matrix_view(down, dtype);
    f.up = {matrix_view(up, dtype), 0};
  }
  f.bias = vector_view(bias, dtype);
  f.residual = rows_view(residual, dtype);
  f.activation = activation_of(activation);
  f.dtype = dtype;
  f.y = result.y.data_ptr();
  f.t = keep_t ? result.t->data_ptr() : nullptr;
  linear_forward(runtime, f);
  return result;
}

Tensor lowrank_linear(Tensor x, Tensor down, Tensor up, OptionalTensor bias, OptionalTensor residual,
                      int64_t activation) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 2);
  return forward(x, down, up, bias, residual, activation, false, false, down.size(0), up.size(0), false).y;
}

std::tuple<Tensor, Tensor> lowrank_linear_saving(Tensor x, Tensor down, Tensor up, OptionalTensor bias,
                                                 OptionalTensor residual, int64_t activation) {
  check_dims(down, "down", 2);
  check_dims(up, "up", 2);
  Result r = forward(x, down, up, bias, residual, activation, false, false, down.size(0), up.size(0), true);
  return {r.y, *r.t};
}

Tensor lowrank_linear_packed(Tensor x, Tensor panels_down, Tensor panels_up, int64_t rank, int64_t out_features,
                             bool biased, OptionalTensor residual, int64_t activation) {
  return forward(x, panels_down, panels_up, std::nullopt, residual, activation, true, biased, rank, out_features, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_linear_backward(Tensor dz, Tensor x, Tensor t, Tensor down,
                                                                   Tensor up, bool need_dx, bool need_down,
                                                                   bool need_up, bool need_bias) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_cpu(), "x: expected a cpu tensor of at least one dimension");
  check_dims(down, "down", 2);
  check_dims(up, "up", 2);
  check_size(down.size(0), "rank", 1);
  check_elements(sizes_of(x), "x");
  Sizes x_sizes = sizes_of(x), z_sizes = x_sizes, t_sizes = x_sizes;
  int64_t in = check_size(x_sizes.back(), "x: its last dimension", 0), rank = down.size(0), out = up.size(0);
  z_sizes.back() = out;
  t_sizes.back() = rank;
  check(down, "down", {rank, in}, dtype);
  check(up, "up", {out, rank}, dtype);
  check(dz, "dz", z_sizes, dtype);
  check(t, "t", t_sizes, dtype);

  Tensor dx = empty_if(need_dx, x_sizes, dtype), d_down = empty_if(need_down, {rank, in}, dtype);
  Tensor d_up = empty_if(need_up, {out, rank}, dtype), d_bias = empty_if(need_bias, {out}, dtype);
  LinearBackward b{};
  b.shape = {row_count(x_sizes), in, rank, out, 1};
  b.dz = rows_view(dz, dtype);
  b.x = rows_view(x, dtype);
  b.t = rows_view(t, dtype);
  b.down = matrix_view(down, dtype);
  b.up = {matrix_view(up, dtype), 0};
  b.dtype = dtype;
  b.dx = need_dx ? dx.data_ptr() : nullptr;
  b.d_down = need_down ? d_down.data_ptr() : nullptr;
  b.d_up = need_up ? d_up.data_ptr() : nullptr;
  b.d_bias = need_bias ? d_bias.data_ptr() : nullptr;
  linear_backward(runtime, b);
  return {dx, d_down, d_up, d_bias};
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("lowrank_linear", TORCH_BOX(&inherit_kernels::lowrank_linear));
  m.impl("lowrank_linear_saving", TORCH_BOX(&inherit_kernels::lowrank_linear_saving));
  m.impl("lowrank_linear_packed", TORCH_BOX(&inherit_kernels::lowrank_linear_packed));
  m.impl("lowrank_linear_backward", TORCH_BOX(&inherit_kernels::lowrank_linear_backward));
}
