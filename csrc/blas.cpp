// Products with cuBLASLt's epilogues on CUDA tensors. Needs no CUDA toolkit: the library is the one that torch loaded.
#include <mutex>

#include "cuda/tensors.h"
#include "inherit_kernels/cuda/fused_product.h"

namespace inherit_kernels::cuda {
namespace {

// Of the process, and never freed: at its end the library may be gone before.
FusedProducts* products() {
  static FusedProducts* made = cublaslt::loaded() ? new FusedProducts(*cublaslt::loaded()) : nullptr;
  return made;
}

// Runs the product; false where cuBLASLt is not there or has no algorithm for it.
bool run(const Product& p, const Tensor& like, const Context& context) {
  if (!products()) return false;
  static std::mutex one_at_a_time;  // a plan holds the bias of the call that runs
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const Plan& plan = products()->plan_for(p, context.index);
  if (!plan.possible) return false;
  int64_t bytes = static_cast<int64_t>(plan.found.workspace_bytes);
  Tensor workspace = torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
  int status = products()->run(plan, p, context.index, workspace.data_ptr(), context.stream);
  STD_TORCH_CHECK(status == 0, "cuBLASLt could not multiply (status ", status, ")");
  return true;
}

std::tuple<Tensor, bool> linear_with_epilogue(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                              int64_t activation, bool tf32) {
  check_dims(x, "x", 2);
  check_dims(weight, "weight", 2);
  int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  Context context(x);
  check(weight, "weight", {columns, depth}, x);
  check(bias, "bias", {columns}, x);
  check(residual, "residual", {rows, columns}, x);
  STD_TORCH_CHECK(activation == 0 || activation == 1 || activation == 3, "activation: no epilogue for code ",
                  activation);
  Tensor y = torch::stable::new_empty(x, {rows, columns});
  if (rows == 0 || columns == 0 || depth == 0) return {y, false};
  Rows of_x = dense_rows(x), of_weight = dense_rows(weight), of_residual = dense_rows(residual);
  Product p{};
  p.a = of_x.data;
  p.b = of_weight.data;
  p.c = of_residual.data;
  p.bias = dense(bias);
  p.d = y.data_ptr();
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.ld_a = of_x.stride;
  p.ld_b = of_weight.stride;
  p.ld_c = of_residual.stride;
  p.ld_d = columns;
  p.dtype = dtype_code(x, "x");
  p.activation = activation_code(activation);
  p.tf32 = tf32;
  bool found = run(p, x, context);
  return {y, found};
}

std::tuple<Tensor, Tensor, bool> weight_gradient_with_sums(Tensor dz, Tensor t, bool tf32) {
  check_dims(dz, "dz", 2);
  check_dims(t, "t", 2);
  int64_t depth = dz.size(0), rows = dz.size(1), columns = t.size(1);
  Context context(dz);
  check(t, "t", {depth, columns}, dz);
  Tensor d = torch::stable::new_empty(dz, {rows, columns}), sums = torch::stable::new_empty(dz, {rows});
  if (rows == 0 || columns == 0 || depth == 0) return {d, sums, false};
  Rows of_dz = dense_rows(dz), of_t = dense_rows(t);
  Product p{};
  p.a = of_dz.data;
  p.b = of_t.data;
  p.d = d.data_ptr();
  p.sums = sums.data_ptr();
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.ld_a = of_dz.stride;
  p.ld_b = of_t.stride;
  p.ld_d = columns;
  p.dtype = dtype_code(dz, "dz");
  p.by_depth = true;
  p.tf32 = tf32;
  bool found = run(p, dz, context);
  return {d, sums, found};
}

}  // namespace
}  // namespace inherit_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CUDA, m) {
  m.impl("linear_with_epilogue", TORCH_BOX(&inherit_kernels::cuda::linear_with_epilogue));
  m.impl("weight_gradient_with_sums", TORCH_BOX(&inherit_kernels::cuda::weight_gradient_with_sums));
}
