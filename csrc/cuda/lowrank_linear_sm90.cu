#include "inherit_kernels/cuda/lowrank_linear_sm90.h"

#include "inherit_kernels/cuda/cluster_linear.h"

namespace inherit_kernels::cuda {
namespace {

// One head whose gate nobody reads.
GatedLowrankLinearSm90Call one_head(const LowrankLinearSm90Call& call) {
  GatedLowrankLinearSm90Call gated{};
  static_cast<LowrankLinearSm90Call&>(gated) = call;
  gated.heads = 1;
  return gated;
}

}  // namespace

const char* lowrank_linear_sm90_declines(const LowrankLinearSm90Call& call) {
  return cluster_linear_declines(one_head(call));
}

int lowrank_linear_sm90(const LowrankLinearSm90Call& call) {
  return run_cluster_linear<false>(one_head(call));
}

}  // namespace inherit_kernels::cuda
