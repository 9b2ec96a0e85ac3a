#include "inherit_kernels/cuda/gated_lowrank_conv2d.h"
#include "inherit_kernels/cuda/sample_conv.h"

namespace inherit_kernels::cuda {
namespace {

bool fits(const GatedLowrankConv2dCall& call, int cluster) {
  return sample_conv_shared_bytes(call, cluster) <= static_cast<size_t>(call.shared_bytes);
}

// The largest cluster with which all CTAs still run at once, but large enough for t.
int cluster_of(const GatedLowrankConv2dCall& call) {
  if (call.cluster != 0) return call.cluster;
  int cluster = 8;
  while (cluster > 1 && !run_at_once(call.batch, cluster, call.multiprocessors) && fits(call, cluster / 2))
    cluster /= 2;
  return cluster;
}

template <class T>
int launch_for_rank(const GatedLowrankConv2dCall& call) {
  const int cluster = cluster_of(call);
  switch (rank_block(call.rank)) {
    case 64:
      return launch_sample_conv<T, 64, true>(call, cluster);
    case 128:
      return launch_sample_conv<T, 128, true>(call, cluster);
    default:
      return launch_sample_conv<T, 256, true>(call, cluster);
  }
}

}  // namespace

const char* gated_lowrank_conv2d_sm90_declines(const GatedLowrankConv2dCall& call) {
  if (const char* reason = sample_conv_declines(call)) return reason;
  const int cluster = call.cluster;
  if (cluster != 0 && cluster != 1 && cluster != 2 && cluster != 4 && cluster != 8)
    return "a cluster has 1, 2, 4 or 8 CTAs";
  if (!fits(call, cluster_of(call)))
    return "t of a sample and the tiles in flight exceed the shared memory of its CTAs";
  return nullptr;
}

int gated_lowrank_conv2d_sm90(const GatedLowrankConv2dCall& call) {
  if (gated_lowrank_conv2d_sm90_declines(call) != nullptr) return static_cast<int>(cudaErrorNotSupported);
  if (call.batch == 0 || call.out == 0) return cudaSuccess;
  return call.dtype == kFloat16 ? launch_for_rank<half16>(call) : launch_for_rank<bf16>(call);
}

}  // namespace inherit_kernels::cuda
