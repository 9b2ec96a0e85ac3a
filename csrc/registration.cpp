// Every native op. Letters: M rows, K in, N out, R rank, H heads; B, C images and channels. activation: 0 none,
// 1 relu, 2 gelu (erf), 3 gelu_tanh, 4 silu. float32 or bfloat16 throughout, sums in float32. A backward takes dz, the
// gradient at the pre-activation, and returns an empty tensor for a gradient that is not needed.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(inherit_kernels_C, m) {
  // x [..., K], down [R, K], up [N, R], bias [N], residual and y [..., N], t [..., R]
  m.def("lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual, int activation) -> Tensor");
  m.def(
      "lowrank_linear_saving(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual, int activation)"
      " -> (Tensor y, Tensor t)");
  m.def(
      "lowrank_linear_packed(Tensor x, Tensor panels_down, Tensor panels_up, int rank, int out_features,"
      " bool biased, Tensor? residual, int activation) -> Tensor");
  m.def(
      "lowrank_linear_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, bool need_dx, bool need_down,"
      " bool need_up, bool need_bias) -> (Tensor dx, Tensor d_down, Tensor d_up, Tensor d_bias)");

  // up [H, N, R], gate_weight [H, R], gate_bias [H], bias [H, N]
  m.def(
      "gated_lowrank_linear(Tensor x, Tensor down, Tensor up, Tensor gate_weight, Tensor? gate_bias, Tensor? bias,"
      " Tensor? residual, int activation) -> Tensor");
  m.def(
      "gated_lowrank_linear_saving(Tensor x, Tensor down, Tensor up, Tensor gate_weight, Tensor? gate_bias,"
      " Tensor? bias, Tensor? residual, int activation) -> (Tensor y, Tensor t)");
  m.def(
      "gated_lowrank_linear_packed(Tensor x, Tensor panels_down, Tensor panels_up, int rank, int out_features,"
      " Tensor gate_weight, Tensor? gate_bias, bool biased, Tensor? residual, int activation) -> Tensor");
  m.def(
      "gated_lowrank_linear_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, Tensor gate_weight,"
      " Tensor? gate_bias, Tensor? bias, bool need_dx, bool need_down, bool need_up, bool need_gate_weight,"
      " bool need_gate_bias, bool need_bias) -> (Tensor dx, Tensor d_down, Tensor d_up, Tensor d_gate_weight,"
      " Tensor d_gate_bias, Tensor d_bias)");

  // x [B, C, Hi, Wi], down [R, C, kh, kw], up [N, R], bias [N], residual and y [B, N, Ho, Wo], t [B, R, Ho, Wo]; y and
  // t in the memory format that the strides of x prefer
  m.def(
      "lowrank_conv2d(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual, int stride_h, int stride_w, "
      "int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> Tensor");
  m.def(
      "lowrank_conv2d_saving(Tensor x, Tensor down, Tensor up, Tensor? bias, Tensor? residual, int stride_h, int "
      "stride_w, int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> (Tensor y, Tensor t)");
  m.def(
      "lowrank_conv2d_packed(Tensor x, Tensor panels_down, Tensor panels_up, int rank, int out_channels, int kernel_h,"
      " int kernel_w, Tensor? bias, Tensor? residual, int stride_h, int stride_w, int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> Tensor");
  // up [H, N, R], gate_weight [H, R], gate_bias [H], bias [H, N]
  m.def(
      "gated_lowrank_conv2d(Tensor x, Tensor down, Tensor up, Tensor gate_weight, Tensor? gate_bias, Tensor? bias,"
      " Tensor? residual, int stride_h, int stride_w, int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> Tensor");
  m.def(
      "gated_lowrank_conv2d_saving(Tensor x, Tensor down, Tensor up, Tensor gate_weight, Tensor? gate_bias,"
      " Tensor? bias, Tensor? residual, int stride_h, int stride_w, int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> (Tensor y, Tensor t)");
  m.def(
      "gated_lowrank_conv2d_packed(Tensor x, Tensor panels_down, Tensor panels_up, int rank, int out_channels,"
      " int kernel_h, int kernel_w, Tensor gate_weight, Tensor? gate_bias, Tensor? bias, Tensor? residual,"
      " int stride_h, int stride_w, int padding_h, int padding_w,"
      " int dilation_h, int dilation_w, int activation) -> Tensor");
  // The panels of down, tap by tap, and of every head of up, in float32.
  m.def("pack_conv2d(Tensor down, Tensor up) -> (Tensor panels_down, Tensor panels_up)");
  // dz [B, N, Ho, Wo]; dx in the memory format that the strides of x prefer, d_down laid out as down
  m.def(
      "lowrank_conv2d_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, int stride_h, int stride_w,"
      " int padding_h, int padding_w, int dilation_h, int dilation_w, bool need_dx, bool need_down, bool need_up,"
      " bool need_bias) -> (Tensor dx, Tensor d_down, Tensor d_up, Tensor d_bias)");
  m.def(
      "gated_lowrank_conv2d_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, Tensor gate_weight,"
      " Tensor? gate_bias, Tensor? bias, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h,"
      " int dilation_w, bool need_dx, bool need_down, bool need_up, bool need_gate_weight, bool need_gate_bias,"
      " bool need_bias) -> (Tensor dx, Tensor d_down, Tensor d_up, Tensor d_gate_weight, Tensor d_gate_bias,"
      " Tensor d_bias)");

  // On a GPU: [g_1 t ... g_H t], then, if there are more columns, g and zeros; t [M, R], gate_weight [H, R] -> [M,
  // columns]
  m.def("scale_by_gate(Tensor t, Tensor gate_weight, Tensor? gate_bias, int columns) -> Tensor");

  // By cuBLASLt, on a GPU; the last value is whether it has an algorithm, else nothing was computed. x [M, R],
  // weight [N, R], bias [N], residual and y [M, N]: y = act(x weight^T + bias + residual), act none, relu or gelu_tanh
  m.def(
      "linear_with_epilogue(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, bool tf32)"
      " -> (Tensor y, bool found)");
  // dz [M, N], t [M, R]: dz^T t [N, R], and the sums of dz over M [N]
  m.def("weight_gradient_with_sums(Tensor dz, Tensor t, bool tf32) -> (Tensor d_up, Tensor d_bias, bool found)");

  // A weight [J, D] as panels for the active instruction set, in its dtype, a bias [J] as one more depth. The weights
  // of heads [H, J, D] lie side by side as [J, H * D], their biases [H, J] after them.
  m.def("pack_panels(Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("cpu_isa() -> str");
  // One sentence: what the CUDA part was built for, and whether it runs here. Empty: built without CUDA.
  m.def("cuda_build_info() -> str");
  m.def("cuda_self_test() -> str");
}
