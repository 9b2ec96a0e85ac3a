#include "binding.h"
#include "inherit_kernels/cuda/gated_lowrank_conv2d.h"
#include "inherit_kernels/cuda/gated_lowrank_linear_sm90.h"
#include "inherit_kernels/cuda/lowrank_linear_sm90.h"

namespace py = pybind11;

namespace {

using namespace inherit_kernels::cuda;

// Takes a call's fields from a dictionary by name; one that is not given stays zero, one that nobody takes is an error.
class Fields {
 public:
  explicit Fields(const py::dict& values) : values_(values) {}

  template <class V>
  void take(const char* name, V& field) {
    if (!values_.contains(name)) return;
    py::object value = values_[name];
    if constexpr (std::is_pointer_v<V>) {
      field = reinterpret_cast<V>(value.cast<uintptr_t>());
    } else {
      field = value.cast<V>();
    }
    ++taken_;
  }

  ~Fields() noexcept(false) {
    if (taken_ != values_.size()) throw std::runtime_error("a field of the call was misspelt");
  }

 private:
  py::dict values_;
  size_t taken_ = 0;
};

#define TAKE(NAME) fields.take(#NAME, call.NAME)

void take_linear(Fields& fields, LowrankLinearSm90Call& call) {
  TAKE(x), TAKE(down), TAKE(up), TAKE(bias), TAKE(residual), TAKE(y), TAKE(t);
  TAKE(x_stride), TAKE(down_stride), TAKE(up_stride), TAKE(residual_stride), TAKE(y_stride), TAKE(t_stride);
  TAKE(rows), TAKE(in), TAKE(rank), TAKE(out);
  TAKE(dtype), TAKE(activation), TAKE(multiprocessors), TAKE(cluster), TAKE(after_previous);
}

LowrankLinearSm90Call linear_call(const py::dict& values) {
  Fields fields(values);
  LowrankLinearSm90Call call{};
  take_linear(fields, call);
  return call;
}

GatedLowrankLinearSm90Call gated_linear_call(const py::dict& values) {
  Fields fields(values);
  GatedLowrankLinearSm90Call call{};
  take_linear(fields, call);
  TAKE(gate_weight), TAKE(gate_bias), TAKE(up_head_stride), TAKE(heads);
  return call;
}

GatedLowrankConv2dCall conv_call(const py::dict& values) {
  Fields fields(values);
  GatedLowrankConv2dCall call{};
  TAKE(x), TAKE(down), TAKE(up), TAKE(gate_weight), TAKE(gate_bias), TAKE(bias), TAKE(residual), TAKE(y), TAKE(t);
  TAKE(batch), TAKE(channels), TAKE(rank), TAKE(out), TAKE(heads);
  TAKE(height), TAKE(width), TAKE(out_height), TAKE(out_width), TAKE(kernel_height), TAKE(kernel_width);
  TAKE(stride_height), TAKE(stride_width), TAKE(padding_height), TAKE(padding_width);
  TAKE(dilation_height), TAKE(dilation_width), TAKE(shared_bytes);
  TAKE(dtype), TAKE(activation), TAKE(multiprocessors), TAKE(cluster), TAKE(after_previous);
  return call;
}

// Each launcher under its name, and its refusal as <name>_declines.
template <class Call>
void define(py::module_& m, const std::string& name, Call (*call)(const py::dict&), int (*launch)(const Call&),
            const char* (*declines)(const Call&)) {
  m.def(name.c_str(), [=](const py::dict& values) { return launch(call(values)); });
  m.def((name + "_declines").c_str(), [=](const py::dict& values) { return declines(call(values)); });
}

}  // namespace

PYBIND11_MODULE(EMULATION_MODULE, m) {
  inherit_kernels::emulation::bind_emulation(m);
  define(m, "lowrank_linear_sm90", linear_call, lowrank_linear_sm90, lowrank_linear_sm90_declines);
  define(m, "gated_lowrank_linear_sm90", gated_linear_call, gated_lowrank_linear_sm90,
         gated_lowrank_linear_sm90_declines);
  define(m, "gated_lowrank_conv2d", conv_call, gated_lowrank_conv2d, gated_lowrank_conv2d_declines);
  define(m, "gated_lowrank_conv2d_sm90", conv_call, gated_lowrank_conv2d_sm90, gated_lowrank_conv2d_sm90_declines);
}
