#include "conv_tensors.h"

namespace inherit_kernels {
namespace {

Tensor gated_lowrank_conv2d(Tensor x, Tensor down, Tensor up, Tensor gate_weight, OptionalTensor gate_bias,
                            OptionalTensor bias, OptionalTensor residual, int64_t stride_h, int64_t stride_w,
                            int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                            int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  GateTensors gate{gate_weight, gate_bias};
  return conv_call(x, plain_weights(down, up, 3), gate, bias, residual, geometry, activation, false).y;
}

std::tuple<Tensor, Tensor> gated_lowrank_conv2d_saving(Tensor x, Tensor down, Tensor up, Tensor gate_weight,
                                                       OptionalTensor gate_bias, OptionalTensor bias,
                                                       OptionalTensor residual, int64_t stride_h, int64_t stride_w,
                                                       int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                                       int64_t dilation_w, int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  GateTensors gate{gate_weight, gate_bias};
  ConvResult r = conv_call(x, plain_weights(down, up, 3), gate, bias, residual, geometry, activation, true);
  return {r.y, *r.t};
}

Tensor gated_lowrank_conv2d_packed(Tensor x, Tensor panels_down, Tensor panels_up, int64_t rank, int64_t out_channels,
                                   int64_t kernel_h, int64_t kernel_w, Tensor gate_weight, OptionalTensor gate_bias,
                                   OptionalTensor bias, OptionalTensor residual, int64_t stride_h, int64_t stride_w,
                                   int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                                   int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  ConvWeights weights{panels_down, panels_up, true, rank, out_channels, {kernel_h, kernel_w}};
  return conv_call(x, weights, GateTensors{gate_weight, gate_bias}, bias, residual, geometry, activation, false).y;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors gated_lowrank_conv2d_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up, Tensor gate_weight,
                                         OptionalTensor gate_bias, OptionalTensor bias, int64_t stride_h,
                                         int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                         int64_t dilation_w, bool need_dx, bool need_down, bool need_up,
                                         bool need_gate_weight, bool need_gate_bias, bool need_bias) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  ConvGradients g = conv_backward(dz, x, t, down, up, GateTensors{gate_weight, gate_bias}, bias, geometry,
                                  {need_dx, need_down, need_up, need_gate_weight, need_gate_bias, need_bias});
  return {g.dx, g.d_down, g.d_up, g.d_gate_weight, g.d_gate_bias, g.d_bias};
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("gated_lowrank_conv2d", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d));
  m.impl("gated_lowrank_conv2d_saving", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_saving));
  m.impl("gated_lowrank_conv2d_packed", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_packed));
  m.impl("gated_lowrank_conv2d_backward", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_backward));
}
