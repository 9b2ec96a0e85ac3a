// The ops that report on the CUDA part; without one they say so.
#include <string>

#include "inherit_kernels/device_info.h"
#include "tensors.h"

namespace inherit_kernels {
namespace {

#ifdef INHERIT_KERNELS_CUDA
std::string build_info() {
  return cuda_build_info();
}
std::string self_test() {
  return cuda_self_test();
}
#else
std::string build_info() {
  return "";
}
std::string self_test() {
  return "the native library was built without CUDA";
}
#endif

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&inherit_kernels::build_info));
  m.impl("cuda_self_test", TORCH_BOX(&inherit_kernels::self_test));
}
