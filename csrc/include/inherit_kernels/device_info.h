// The CUDA part seen from C++: plain strings, so that neither side needs the other's headers.
#pragma once

namespace inherit_kernels {

// What was compiled: runtime version and architectures. No device is touched.
const char* cuda_build_info();

// Fills a small buffer on the device and reads it back; a sentence that starts with "ok" or says what is missing.
const char* cuda_self_test();

}  // namespace inherit_kernels
