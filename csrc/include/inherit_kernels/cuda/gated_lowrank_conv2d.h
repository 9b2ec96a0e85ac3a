#pragma once

#include <cstdint>

#include "inherit_kernels/cuda/device.h"

// y = act(Σ_h g_h (up_h t + bias_h) + residual), t = conv2d(x, down), g = softmax(mean(t) · gate_weightᵀ + gate_bias)
// per sample, in one launch for maps of at most 256 positions: a sample belongs to one CTA (any device from sm_80 on)
// or to one cluster of CTAs (sm_90).
namespace inherit_kernels::cuda {

// All tensors dense and channels last; P = output positions of a sample.
struct GatedLowrankConv2dCall {
  const void* x;            // [batch, height, width, channels]
  const void* down;         // [rank, kernel_height, kernel_width, channels]
  const void* up;           // [heads, out, rank]
  const void* gate_weight;  // [heads, rank]
  const void* gate_bias;    // [heads] or null
  const void* bias;         // [heads, out] or null
  const void* residual;     // [batch, P, out] or null
  void* y;                  // [batch, P, out]
  void* t;                  // [batch, P, rank] or null: not wanted
  int64_t batch, channels, rank, out, heads;
  int height, width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width;
  int padding_height, padding_width, dilation_height, dilation_width;
  int dtype;            // kFloat16 or kBFloat16 of device.h, of all tensors
  int activation;       // 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu
  int multiprocessors;  // of the device; decides the cluster's size
  int shared_bytes;     // that a CTA of the device may use
  int cluster;          // of gated_lowrank_conv2d_sm90: CTAs a sample, 1, 2, 4, 8, or 0: chosen
  // Programmatic dependent launch: weights are read before the previous kernel of the stream has ended, so it must not
  // write them.
  bool after_previous;
  void* stream;  // a cudaStream_t of the current device
};

// Null, or one sentence why the kernel cannot compute the call; the launcher then returns cudaErrorNotSupported, the
// value of a cudaError_t.
const char* gated_lowrank_conv2d_declines(const GatedLowrankConv2dCall& call);
int gated_lowrank_conv2d(const GatedLowrankConv2dCall& call);

const char* gated_lowrank_conv2d_sm90_declines(const GatedLowrankConv2dCall& call);
int gated_lowrank_conv2d_sm90(const GatedLowrankConv2dCall& call);

}  // namespace inherit_kernels::cuda
