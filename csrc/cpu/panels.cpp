// pack_panels and cpu_isa: what a caller needs to hold weights in this machine's own layout.
#include <string>

#include "inherit_kernels/product.h"
#include "tensors.h"

namespace inherit_kernels {
namespace {

// A weight [J, D], or those of heads [H, J, D] side by side as [J, H * D]; then the biases [J] or [H, J].
Tensor pack_panels(Tensor weight, OptionalTensor bias) {
  bool heads = weight.dim() == 3;
  if (!heads) check_dims(weight, "weight", 2);
  Dtype dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(weight.is_cpu(), "weight: device must be cpu");
  Runtime runtime = cpu_runtime();
  PackedSource source{};
  source.heads = heads ? weight.size(0) : 1;
  source.outputs = weight.size(heads);
  source.rank = weight.size(heads + 1);
  check_elements({source.heads, source.outputs, source.rank + 1}, "weight");
  source.up = heads ? heads_view(weight, dtype) : HeadsView{matrix_view(weight, dtype), 0};
  Sizes expected = heads ? Sizes{source.heads, source.outputs} : Sizes{source.outputs};
  check(bias, "bias", expected, dtype);
  source.bias = heads ? matrix_view(bias, dtype) : vector_view(bias, dtype);
  Tensor panels = empty_cpu({panels_elements(*runtime.kernels, dtype, source.outputs, source.depth())}, dtype);
  pack_source(runtime, source, panels.data_ptr());
  return panels;
}

std::string cpu_isa() {
  return active_kernels().name;
}

}  // namespace
}  // namespace inherit_kernels

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CPU, m) {
  m.impl("pack_panels", TORCH_BOX(&inherit_kernels::pack_panels));
}

STABLE_TORCH_LIBRARY_IMPL(inherit_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&inherit_kernels::cpu_isa));
}
