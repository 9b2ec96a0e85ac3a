#include "conv_tensors.h"
#include "inherit_kernels/conv_mix_backward.h"

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

struct Mix {
  Mix(const Tensor& t, const Tensor& up, const Tensor& gate_weight, const OptionalTensor& gate_bias,
      const OptionalTensor& bias)
      : dtype(dtype_of(t, "t")) {
    check_dims(t, "t", 4);
    check_dims(up, "up", 3);
    STD_TORCH_CHECK(t.is_cpu(), "t: device must be cpu");
    y_sizes = sizes_of(t);
    shape = {y_sizes[0], y_sizes[1], up.size(1), y_sizes[2] * y_sizes[3], up.size(0)};
    y_sizes[1] = shape.out;
    STD_TORCH_CHECK(shape.heads >= 1 && shape.rank >= 1, "up: needs at least one head and one rank");
    check(up, "up", {shape.heads, shape.out, shape.rank}, dtype);
    check(gate_weight, "gate_weight", {shape.heads, shape.rank}, dtype);
    check(gate_bias, "gate_bias", {shape.heads}, dtype);
    check(bias, "bias", {shape.heads, shape.out}, dtype);
  }

  Dtype dtype;
  Sizes y_sizes;
  MixShape shape;
};

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors gated_lowrank_conv2d_mix_backward(Tensor dz, Tensor t, Tensor up, Tensor gate_weight,
                                              OptionalTensor gate_bias, OptionalTensor bias, bool need_up,
                                              bool need_gate_weight, bool need_gate_bias, bool need_bias) {
  Runtime runtime = cpu_runtime();
  Mix mix(t, up, gate_weight, gate_bias, bias);
  check(dz, "dz", mix.y_sizes, mix.dtype);
  const MixShape& s = mix.shape;
  MixBackward b{};
  b.shape = s;
  b.dz = images_view(dz, mix.dtype);
  b.t = images_view(t, mix.dtype);
  // dt follows t: channels last where its channels, not its positions, lie side by side.
  b.channels_last = s.rank > 1 && b.t.matrix.col_stride == 1 && (s.positions > 1 && b.t.matrix.row_stride != 1);
  b.up = heads_view(up, mix.dtype);
  b.gate_weight = matrix_view(gate_weight, mix.dtype);
  b.gate_bias = vector_view(gate_bias, mix.dtype);
  b.bias = matrix_view(bias, mix.dtype);
  b.dtype = mix.dtype;
  Tensor dt = empty_images(sizes_of(t), mix.dtype, b.channels_last);
  Tensor d_up = empty_if(need_up, {s.heads, s.out, s.rank}, mix.dtype);
  Tensor d_gate_weight = empty_if(need_gate_weight, {s.heads, s.rank}, mix.dtype);
  Tensor d_gate_bias = empty_if(need_gate_bias, {s.heads}, mix.dtype);
  Tensor d_bias = empty_if(need_bias, {s.heads, s.out}, mix.dtype);
  b.dt = dt.data_ptr();
  b.d_up = need_up ? d_up.data_ptr() : nullptr;
  b.d_gate_weight = need_gate_weight ? d_gate_weight.data_ptr() : nullptr;
  b.d_gate_bias = need_gate_bias ? d_gate_bias.data_ptr() : nullptr;
  b.d_bias = need_bias ? d_bias.data_ptr() : nullptr;
  MixBackwardPass(runtime, b).run();
  return {dt, d_up, d_gate_weight, d_gate_bias, d_bias};
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("gated_lowrank_conv2d", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d));
  m.impl("gated_lowrank_conv2d_saving", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_saving));
  m.impl("gated_lowrank_conv2d_packed", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_packed));
  m.impl("gated_lowrank_conv2d_mix_backward", TORCH_BOX(&inherit_kernels::gated_lowrank_conv2d_mix_backward));
}
