#pragma once

#include "inherit_kernels/cuda/lowrank_linear_sm90.h"

// y [rows, out] = act(Σ_h g_h (t · up_hᵀ + bias_h) + residual), t [rows, rank] = x · downᵀ,
// g = softmax(t · gate_weightᵀ + gate_bias) row by row; as lowrank_linear_sm90.h otherwise.
namespace inherit_kernels::cuda {

// up is [heads, out, rank] and bias [heads, out] here.
struct GatedLowrankLinearSm90Call : LowrankLinearSm90Call {
  const void* gate_weight;  // [heads, rank]
  const void* gate_bias;    // [heads] or null
  int64_t up_head_stride;
  int64_t heads;
};

const char* gated_lowrank_linear_sm90_declines(const GatedLowrankLinearSm90Call& call);
int gated_lowrank_linear_sm90(const GatedLowrankLinearSm90Call& call);

}  // namespace inherit_kernels::cuda
