#include "conv_tensors.h"

namespace inherit_kernels {
namespace {

Tensor lowrank_conv2d(Tensor x, Tensor down, Tensor up, OptionalTensor bias, OptionalTensor residual, int64_t stride_h,
                      int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                      int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  return conv_call(x, plain_weights(down, up, 2), std::nullopt, bias, residual, geometry, activation, false).y;
}

std::tuple<Tensor, Tensor> lowrank_conv2d_saving(Tensor x, Tensor down, Tensor up, OptionalTensor bias,
                                                 OptionalTensor residual, int64_t stride_h, int64_t stride_w,
                                                 int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                                 int64_t dilation_w, int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  ConvResult r = conv_call(x, plain_weights(down, up, 2), std::nullopt, bias, residual, geometry, activation, true);
  return {r.y, *r.t};
}

Tensor lowrank_conv2d_packed(Tensor x, Tensor panels_down, Tensor panels_up, int64_t rank, int64_t out_channels,
                             int64_t kernel_h, int64_t kernel_w, OptionalTensor bias, OptionalTensor residual,
                             int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
                             int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  ConvWeights weights{panels_down, panels_up, true, rank, out_channels, {kernel_h, kernel_w}};
  return conv_call(x, weights, std::nullopt, bias, residual, geometry, activation, false).y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lowrank_conv2d_backward(Tensor dz, Tensor x, Tensor t, Tensor down,
                                                                   Tensor up, int64_t stride_h, int64_t stride_w,
                                                                   int64_t padding_h, int64_t padding_w,
                                                                   int64_t dilation_h, int64_t dilation_w, bool need_dx,
                                                                   bool need_down, bool need_up, bool need_bias) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  ConvGradients g = conv_backward(dz, x, t, down, up, std::nullopt, std::nullopt, geometry,
                                  {need_dx, need_down, need_up, false, false, need_bias});
  return {g.dx, g.d_down, g.d_up, g.d_bias};
}

// up [N, R], or [H, N, R] of the gated op.
std::tuple<Tensor, Tensor> pack_conv2d(Tensor down, Tensor up) {
  Runtime runtime = cpu_runtime();
  const Kernels& k = *runtime.kernels;
  Dtype dtype = dtype_of(down, "down");
  bool gated = up.dim() == 3;
  ConvWeights w = plain_weights(down, up, gated ? 3 : 2);
  check(down, "down", sizes_of(down), dtype);  // before sizes are multiplied
  int64_t heads = gated ? up.size(0) : 1, channels = down.size(1), taps = w.kernel[0] * w.kernel[1];
  check(up, "up", gated ? Sizes{heads, w.out, w.rank} : Sizes{w.out, w.rank}, dtype);
  Tensor panels_down = empty_cpu({down_panels_size(k, w.rank, channels, taps)}, Dtype::kFloat32);
  Tensor panels_up = empty_cpu({up_panels_size(k, heads, w.out, w.rank)}, Dtype::kFloat32);
  pack_down(runtime, down_view(down, dtype), w.rank, channels, taps, static_cast<float*>(panels_down.data_ptr()));
  HeadsView view = gated ? heads_view(up, dtype) : HeadsView{matrix_view(up, dtype), 0};
  pack_up(runtime, view, heads, w.out, w.rank, static_cast<float*>(panels_up.data_ptr()));
  return {panels_down, panels_up};
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("lowrank_conv2d", TORCH_BOX(&inherit_kernels::lowrank_conv2d));
  m.impl("lowrank_conv2d_saving", TORCH_BOX(&inherit_kernels::lowrank_conv2d_saving));
  m.impl("lowrank_conv2d_packed", TORCH_BOX(&inherit_kernels::lowrank_conv2d_packed));
  m.impl("lowrank_conv2d_backward", TORCH_BOX(&inherit_kernels::lowrank_conv2d_backward));
  m.impl("pack_conv2d", TORCH_BOX(&inherit_kernels::pack_conv2d));
}
