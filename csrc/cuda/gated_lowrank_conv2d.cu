#include "inherit_kernels/cuda/gated_lowrank_conv2d.h"

#include "inherit_kernels/cuda/sample_conv.h"

namespace inherit_kernels::cuda {
namespace {

template <class T>
int launch_for_rank(const GatedLowrankConv2dCall& call) {
  return rank_block(call.rank) == 64 ? launch_sample_conv<T, 64, false>(call, 1)
                                     : launch_sample_conv<T, 128, false>(call, 1);
}

}  // namespace

const char* gated_lowrank_conv2d_declines(const GatedLowrankConv2dCall& call) {
  const char* reason = sample_conv_declines(call);
  if (reason == nullptr && rank_block(call.rank) > 128) return "ranks above 128 take a cluster of CTAs";
  if (reason == nullptr && sample_conv_shared_bytes(call, 1) > static_cast<size_t>(call.shared_bytes))
    return "t of a sample and the tiles in flight exceed the shared memory of a CTA";
  return reason;
}

int gated_lowrank_conv2d(const GatedLowrankConv2dCall& call) {
  if (gated_lowrank_conv2d_declines(call) != nullptr) return static_cast<int>(cudaErrorNotSupported);
  if (call.batch == 0 || call.out == 0) return cudaSuccess;
  return call.dtype == kFloat16 ? launch_for_rank<half16>(call) : launch_for_rank<bf16>(call);
}

}  // namespace inherit_kernels::cuda
