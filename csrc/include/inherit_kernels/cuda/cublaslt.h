// The part of cuBLASLt's C interface that fused_product.h calls, as the library documents it. Declared here because
// torch brings the library to every machine with a GPU, and its header to none: no CUDA toolkit is needed to build
// this.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace inherit_kernels::cuda::cublaslt {

using Handle = void*;
using Description = void*;  // of a product
using Layout = void*;       // of a matrix in column-major order
using Preference = void*;   // of the search for an algorithm

struct Algorithm {
  uint64_t data[8];
};

struct Found {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

enum ElementType : int { kTypeFloat32 = 0, kTypeFloat16 = 2, kTypeBFloat16 = 14 };
enum ComputeType : int { kComputeFloat32 = 68, kComputeTF32 = 77 };
enum DescriptionAttribute : int { kTransposeA = 3, kTransposeB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum PreferenceAttribute : int {
  kWorkspaceBytes = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8
};
// Bits of an epilogue but the first. GELU is the tanh form. The sums are those of the columns of B, over the depth.
enum Epilogue : uint32_t { kDefault = 1, kRelu = 2, kBias = 4, kGeluTanh = 32, kSumsOfB = 512 };
enum ReductionScheme : uint32_t { kInPlace = 1, kInComputeType = 2 };  // of split depth, in float32 both

struct Library {
  int (*create)(Handle*);
  int (*description_create)(Description*, int compute_type, int scale_type);
  int (*description_set)(Description, int attribute, const void* value, size_t bytes);
  int (*description_destroy)(Description);
  int (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_destroy)(Layout);
  int (*preference_create)(Preference*);
  int (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  int (*preference_destroy)(Preference);
  int (*search)(Handle, Description, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Found*,
                int* count);
  int (*multiply)(Handle, Description, const void* alpha, const void* a, Layout, const void* b, Layout,
                  const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                  size_t workspace_bytes, void* stream);
};

// Fills `library` from an open library; false where a function is missing.
inline bool look_up(void* opened, Library& library) {
  bool complete = true;
  auto find = [&](auto& function, const char* name) {
    void* address = dlsym(opened, name);
    function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
    complete = complete && address;
  };
  find(library.create, "cublasLtCreate");
  find(library.description_create, "cublasLtMatmulDescCreate");
  find(library.description_set, "cublasLtMatmulDescSetAttribute");
  find(library.description_destroy, "cublasLtMatmulDescDestroy");
  find(library.layout_create, "cublasLtMatrixLayoutCreate");
  find(library.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(library.preference_create, "cublasLtMatmulPreferenceCreate");
  find(library.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(library.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(library.search, "cublasLtMatmulAlgoGetHeuristic");
  find(library.multiply, "cublasLtMatmul");
  return complete;
}

// The library that this process has loaded, whatever its version; null where there is none.
inline const Library* loaded() {
  static const Library* found = []() -> const Library* {
    std::string path;
    auto visit = [](dl_phdr_info* info, size_t, void* out) {
      std::string name = info->dlpi_name ? info->dlpi_name : "";
      if (name.find("libcublasLt.so") == std::string::npos) return 0;
      *static_cast<std::string*>(out) = name;
      return 1;
    };
    dl_iterate_phdr(visit, &path);
    void* opened = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    static Library library;
    return opened && look_up(opened, library) ? &library : nullptr;
  }();
  return found;
}

}  // namespace inherit_kernels::cuda::cublaslt
