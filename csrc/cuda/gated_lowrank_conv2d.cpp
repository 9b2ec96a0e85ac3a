#include "inherit_kernels/cuda/gated_lowrank_conv2d.h"

#include <tuple>

#include "tensors.h"

namespace inherit_kernels::cuda {
namespace {

Tensor empty_channels_last(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  int64_t sizes[4] = {x.size(0), channels, height, width};
  int64_t strides[4] = {height * width * channels, 1, width * channels, channels};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cuda(), x.get_device(), &handle));
  return Tensor(handle);
}

// The data of [.., channels, height, width] whose channels lie side by side, on a 16-byte boundary.
const void* channels_last(Tensor& tensor, const char* name) {
  int64_t expected = 1;
  for (int64_t k : {1, 3, 2, 0}) {
    bool right = tensor.size(k) <= 1 || tensor.stride(k) == expected;
    STD_TORCH_CHECK(right, name, ": the CUDA kernel takes dense channels-last tensors");
    expected *= tensor.size(k);
  }
  if (!aligned16(tensor)) tensor = torch::stable::clone(tensor);  // which keeps the strides of a dense tensor
  return tensor.data_ptr();
}

std::tuple<Tensor, OptionalTensor> forward(Tensor x, Tensor down, Tensor up, Tensor gate_weight,
                                           OptionalTensor gate_bias, OptionalTensor bias, OptionalTensor residual,
                                           const Geometry& g, int64_t activation, bool saving) {
  check_dims(x, "x", 4);
  check_dims(down, "down", 4);
  check_dims(up, "up", 3);
  Context context(x);
  int64_t heads = up.size(0), out = up.size(1), rank = down.size(0);
  int64_t height = output_size(x.size(2), down.size(2), g, 0), width = output_size(x.size(3), down.size(3), g, 1);
  check_elements({x.size(0), std::max(out, rank), height, width}, "output");
  check(down, "down", {rank, x.size(1), down.size(2), down.size(3)}, x);
  check(up, "up", {heads, out, rank}, x);
  check(gate_weight, "gate_weight", {heads, rank}, x);
  check(gate_bias, "gate_bias", {heads}, x);
  check(bias, "bias", {heads, out}, x);
  check(residual, "residual", {x.size(0), out, height, width}, x);
  Tensor y = empty_channels_last(x, out, height, width);
  OptionalTensor t = saving ? OptionalTensor(empty_channels_last(x, rank, height, width)) : std::nullopt;

  GatedLowrankConv2dCall call{};
  call.x = channels_last(x, "x");
  call.down = channels_last(down, "down");
  call.up = dense(up);
  call.gate_weight = dense(gate_weight);
  call.gate_bias = dense(gate_bias);
  call.bias = dense(bias);
  call.residual = residual ? channels_last(*residual, "residual") : nullptr;
  call.y = y.data_ptr();
  call.t = t ? t->data_ptr() : nullptr;
  call.batch = x.size(0);
  call.channels = x.size(1);
  call.rank = rank;
  call.out = out;
  call.heads = heads;
  call.height = static_cast<int>(x.size(2));
  call.width = static_cast<int>(x.size(3));
  call.out_height = static_cast<int>(check_size(height, "output", 0));
  call.out_width = static_cast<int>(check_size(width, "output", 0));
  call.kernel_height = static_cast<int>(down.size(2));
  call.kernel_width = static_cast<int>(down.size(3));
  call.stride_height = static_cast<int>(g.stride[0]);
  call.stride_width = static_cast<int>(g.stride[1]);
  call.padding_height = static_cast<int>(g.padding[0]);
  call.padding_width = static_cast<int>(g.padding[1]);
  call.dilation_height = static_cast<int>(g.dilation[0]);
  call.dilation_width = static_cast<int>(g.dilation[1]);
  call.dtype = dtype_code(x, "x");
  call.activation = activation_code(activation);
  call.multiprocessors = context.limits.multiprocessors;
  call.shared_bytes = context.limits.shared_bytes;
  if (call.batch == 0) return {y, t};
  call.stream = context.stream;
#ifdef INHERIT_KERNELS_SM90
  if (context.limits.capability / 10 == 9 && !gated_lowrank_conv2d_sm90_declines(call)) {
    check_launch(gated_lowrank_conv2d_sm90(call));
    return {y, t};
  }
#endif
  const char* sentence = gated_lowrank_conv2d_declines(call);
  STD_TORCH_CHECK(!sentence, "no CUDA kernel takes this convolution: ", sentence);
  check_launch(gated_lowrank_conv2d(call));
  return {y, t};
}

Tensor output(Tensor x, Tensor down, Tensor up, Tensor gate_weight, OptionalTensor gate_bias, OptionalTensor bias,
              OptionalTensor residual, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
              int64_t dilation_h, int64_t dilation_w, int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  return std::get<0>(forward(x, down, up, gate_weight, gate_bias, bias, residual, geometry, activation, false));
}

std::tuple<Tensor, Tensor> output_and_t(Tensor x, Tensor down, Tensor up, Tensor gate_weight, OptionalTensor gate_bias,
                                        OptionalTensor bias, OptionalTensor residual, int64_t stride_h,
                                        int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                        int64_t dilation_w, int64_t activation) {
  Geometry geometry{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}};
  auto [y, t] = forward(x, down, up, gate_weight, gate_bias, bias, residual, geometry, activation, true);
  return {y, *t};
}

}  // namespace
}  // namespace inherit_kernels::cuda

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CUDA, m) {
  m.impl("gated_lowrank_conv2d", TORCH_BOX(&inherit_kernels::cuda::output));
  m.impl("gated_lowrank_conv2d_saving", TORCH_BOX(&inherit_kernels::cuda::output_and_t));
}
