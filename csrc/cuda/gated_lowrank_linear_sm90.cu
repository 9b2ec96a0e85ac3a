#include "inherit_kernels/cuda/gated_lowrank_linear_sm90.h"

#include "inherit_kernels/cuda/cluster_linear.h"

namespace inherit_kernels::cuda {

const char* gated_lowrank_linear_sm90_declines(const GatedLowrankLinearSm90Call& call) {
  return cluster_linear_declines(call);
}

int gated_lowrank_linear_sm90(const GatedLowrankLinearSm90Call& call) {
  return run_cluster_linear<true>(call);
}

}  // namespace inherit_kernels::cuda
