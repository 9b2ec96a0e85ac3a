// What the adapters of the two convolution ops share.
#pragma once

#include "inherit_kernels/conv_backward.h"
#include "inherit_kernels/conv_mix_backward.h"
#include "tensors.h"

namespace inherit_kernels {

// [B, C, H, W] as images; `tensor` is replaced by a contiguous copy where (H, W) is not one run of a single stride.
inline ImagesView images_view(Tensor& tensor, Dtype dtype) {
  std::optional<int64_t> position = merged_stride(tensor, 2, 4);
  if (!position) {
    tensor = torch::stable::contiguous(tensor);
    position = 1;
  }
  return {{tensor.data_ptr(), dtype, *position, tensor.size(1) == 1 ? 1 : tensor.stride(1)}, tensor.stride(0)};
}

inline ImagesView images_view(OptionalTensor& tensor, Dtype dtype) {
  return tensor ? images_view(*tensor, dtype) : ImagesView{{nullptr, dtype, 0, 0}, 0};
}

inline Tensor empty_images(const Sizes& sizes, Dtype dtype, bool channels_last) {
  if (!channels_last) return empty_cpu(sizes, dtype);
  auto extent = [&](int k) { return std::max<int64_t>(sizes[k], 1); };
  int64_t c = extent(1), h = extent(2), w = extent(3);
  return empty_cpu(sizes, dtype, {h * w * c, 1, w * c, c});
}

// Whether the dimensions `order`, innermost first, lie densely.
inline bool is_dense(const Tensor& tensor, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (int d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// torch's rule for the memory format that strides prefer; contiguous where they may be either.
inline bool prefers_channels_last(const Tensor& x) {
  if (x.stride(1) == 0 || (x.size(1) > 1 && is_dense(x, {3, 2, 1, 0}))) return false;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) == 0 || x.stride(d) < least || (d == 0 && least == x.stride(1))) return false;
    least = x.stride(d) * x.size(d);
  }
  return true;
}

// down [R, C, kh, kw]; replaced by a contiguous copy where a row is dense in neither order.
inline DownView down_view(Tensor& down, Dtype dtype) {
  bool taps_inner = is_dense(down, {3, 2, 1});
  if (!taps_inner && !is_dense(down, {1, 3, 2})) {
    down = torch::stable::contiguous(down);
    taps_inner = true;
  }
  return {down.data_ptr(), dtype, down.stride(0), taps_inner};
}

struct GateTensors {
  Tensor weight;  // [H, R]
  OptionalTensor bias;
};

// The weights of a call: down [R, C, kh, kw] and up [N, R] or [H, N, R], or what `pack_conv2d` made of them.
struct ConvWeights {
  Tensor down, up;
  bool packed;
  int64_t rank, out, kernel[2];
};

inline ConvWeights plain_weights(const Tensor& down, const Tensor& up, int64_t up_dims) {
  check_dims(down, "down", 4);
  check_dims(up, "up", up_dims);
  return {down, up, false, down.size(0), up.size(up_dims - 2), {down.size(2), down.size(3)}};
}

inline ConvShape conv_shape(const Tensor& x, const ConvWeights& w, int64_t heads, const Geometry& g) {
  check_dims(x, "x", 4);
  STD_TORCH_CHECK(x.is_cpu(), "x: device must be cpu");
  ConvShape s{};
  s.batch = x.size(0);
  s.channels = x.size(1);
  s.rank = w.rank;
  s.out = w.out;
  s.heads = heads;
  int64_t sizes[2] = {s.height = x.size(2), s.width = x.size(3)}, outputs[2];
  check_size(s.channels, "down: channels", 1);
  check_size(s.rank, "rank", 1);
  check_size(s.heads, "up: heads", 1);
  check_size(s.out, "up: channels out", 0);
  for (int d = 0; d < 2; ++d) {
    s.kernel[d] = w.kernel[d];
    s.stride[d] = g.stride[d];
    s.padding[d] = g.padding[d];
    s.dilation[d] = g.dilation[d];
    outputs[d] = output_size(sizes[d], w.kernel[d], g, d);
  }
  check_elements({s.batch, s.channels, s.height, s.width}, "x");
  check_elements({s.rank, s.channels, s.kernel[0], s.kernel[1]}, "down");
  check_elements({s.heads, s.out, s.rank}, "up");
  check_elements({s.batch, std::max(s.rank, s.out), outputs[0], outputs[1]}, "output");
  s.out_height = outputs[0];
  s.out_width = outputs[1];
  return s;
}

struct ConvResult {
  Tensor y;
  OptionalTensor t;
};

// Both ops: no gate is the plain one, whose up is [N, R] and bias [N].
inline ConvResult conv_call(Tensor x, ConvWeights w, const std::optional<GateTensors>& gate, const OptionalTensor& bias,
                            OptionalTensor residual, const Geometry& geometry, int64_t activation, bool keep_t) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  if (gate) check_dims(gate->weight, "gate_weight", 2);
  int64_t heads = gate ? gate->weight.size(0) : 1;
  ConvForward f{};
  ConvShape& s = f.shape = conv_shape(x, w, heads, geometry);
  const Kernels& k = *runtime.kernels;
  if (w.packed) {
    check(w.down, "panels_down", {down_panels_size(k, s.rank, s.channels, s.taps())}, Dtype::kFloat32);
    check(w.up, "panels_up", {up_panels_size(k, heads, s.out, s.rank)}, Dtype::kFloat32);
    f.down_panels = static_cast<const float*>(w.down.data_ptr());
    f.up_panels = static_cast<const float*>(w.up.data_ptr());
  } else {
    check(w.down, "down", {s.rank, s.channels, s.kernel[0], s.kernel[1]}, dtype);
    check(w.up, "up", gate ? Sizes{heads, s.out, s.rank} : Sizes{s.out, s.rank}, dtype);
    f.down = down_view(w.down, dtype);
    f.up = gate ? heads_view(w.up, dtype) : HeadsView{matrix_view(w.up, dtype), 0};
  }
  if (gate) {
    check(gate->weight, "gate_weight", {heads, s.rank}, dtype);
    check(gate->bias, "gate_bias", {heads}, dtype);
    f.gate_weight = matrix_view(gate->weight, dtype);
    f.gate_bias = vector_view(gate->bias, dtype);
  }
  check(bias, "bias", gate ? Sizes{heads, s.out} : Sizes{s.out}, dtype);
  f.bias = gate ? matrix_view(bias, dtype) : vector_view(bias, dtype);
  Sizes sizes = {s.batch, s.out, s.out_height, s.out_width};
  check(residual, "residual", sizes, dtype);

  f.channels_last = prefers_channels_last(x);
  f.x = images_view(x, dtype);
  f.residual = images_view(residual, dtype);
  f.activation = activation_of(activation);
  f.dtype = dtype;
  ConvResult result{empty_images(sizes, dtype, f.channels_last), std::nullopt};
  f.y = result.y.data_ptr();
  if (keep_t) {
    result.t = empty_images({s.batch, s.rank, s.out_height, s.out_width}, dtype, f.channels_last);
    f.t = result.t->data_ptr();
  }
  conv_forward(runtime, f);
  return result;
}

struct ConvGradients {
  Tensor dx, d_down, d_up, d_gate_weight, d_gate_bias, d_bias;
};

// Both ops; `needs` in the order of ConvGradients. A gradient that is not needed is an empty tensor.
inline ConvGradients conv_backward(Tensor dz, Tensor x, Tensor t, Tensor down, Tensor up,
                                   const std::optional<GateTensors>& gate, const OptionalTensor& bias,
                                   const Geometry& geometry, const bool (&needs)[6]) {
  Runtime runtime = cpu_runtime();
  Dtype dtype = dtype_of(x, "x");
  if (gate) check_dims(gate->weight, "gate_weight", 2);
  int64_t heads = gate ? gate->weight.size(0) : 1;
  ConvShape s = conv_shape(x, plain_weights(down, up, gate ? 3 : 2), heads, geometry);
  check(down, "down", {s.rank, s.channels, s.kernel[0], s.kernel[1]}, dtype);
  check(up, "up", gate ? Sizes{heads, s.out, s.rank} : Sizes{s.out, s.rank}, dtype);
  check(dz, "dz", {s.batch, s.out, s.out_height, s.out_width}, dtype);
  check(t, "t", {s.batch, s.rank, s.out_height, s.out_width}, dtype);
  check(bias, "bias", gate ? Sizes{heads, s.out} : Sizes{s.out}, dtype);
  MixBackward m{};
  m.shape = {s.batch, s.rank, s.out, s.positions(), heads};
  m.dz = images_view(dz, dtype);
  m.t = images_view(t, dtype);
  m.up = gate ? heads_view(up, dtype) : HeadsView{matrix_view(up, dtype), 0};
  if (gate) {
    check(gate->weight, "gate_weight", {heads, s.rank}, dtype);
    check(gate->bias, "gate_bias", {heads}, dtype);
    m.gate_weight = matrix_view(gate->weight, dtype);
    m.gate_bias = vector_view(gate->bias, dtype);
    m.bias = matrix_view(bias, dtype);
  }
  m.dtype = dtype;

  bool channels_last = prefers_channels_last(x), need_dt = needs[0] || needs[1];
  DownView down_rows = down_view(down, dtype);
  ConvGradients g;
  g.dx = needs[0] ? empty_images(sizes_of(x), dtype, channels_last) : empty_cpu({0}, dtype);
  g.d_down = needs[1] ? empty_images(sizes_of(down), dtype, !down_rows.taps_inner) : empty_cpu({0}, dtype);
  g.d_up = empty_if(needs[2], sizes_of(up), dtype);
  g.d_gate_weight = empty_if(needs[3], {heads, s.rank}, dtype);
  g.d_gate_bias = empty_if(needs[4], {heads}, dtype);
  g.d_bias = empty_if(needs[5], gate ? Sizes{heads, s.out} : Sizes{s.out}, dtype);
  auto pointer = [&](bool needed, Tensor& tensor) { return needed ? tensor.data_ptr() : nullptr; };
  int64_t ldt = round_up(s.rank, runtime.kernels->nr);
  Scratch dt(need_dt ? s.batch * s.positions() * ldt : 0);
  m.dt = need_dt ? dt.get() : nullptr;
  m.d_up = pointer(needs[2], g.d_up);
  m.d_gate_weight = pointer(needs[3], g.d_gate_weight);
  m.d_gate_bias = pointer(needs[4], g.d_gate_bias);
  m.d_bias = pointer(needs[5], g.d_bias);
  MixBackwardPass(runtime, m).run();
  DownBackward d{};
  d.shape = s;
  d.x = images_view(x, dtype);
  d.down = down_rows;
  d.dt = dt.get();
  d.ldt = ldt;
  d.dtype = dtype;
  d.channels_last = channels_last;
  d.dx = pointer(needs[0], g.dx);
  d.d_down = pointer(needs[1], g.d_down);
  DownBackwardPass(runtime, d).run();
  return g;
}

}  // namespace inherit_kernels
