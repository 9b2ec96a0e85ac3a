// The kernel table of this machine.
#pragma once

#include "inherit_kernels/kernels.h"

namespace inherit_kernels {

// The widest instruction set that was compiled and that this CPU runs, or the one INHERIT_KERNELS_CPU_ISA names;
// throws std::runtime_error if that one is unknown or not available here.
const Kernels& active_kernels();

}  // namespace inherit_kernels
