// One matrix product whose epilogue adds, activates or sums, by cuBLASLt.
#pragma once

#include <cstring>
#include <unordered_map>

#include "inherit_kernels/cuda/cublaslt.h"
#include "inherit_kernels/cuda/device.h"

namespace inherit_kernels::cuda {

// d = act(a · bᵀ + bias + c) [rows, columns], row-major: rows of every matrix lie ld_* elements apart. a is [rows,
// depth] and b [columns, depth]; or, by_depth, a is [depth, rows], b [depth, columns] and d = aᵀ · b.
struct Product {
  const void *a, *b, *c, *bias;  // c [rows, columns] and bias [columns] optional
  void* d;
  void* sums;  // [rows], optional, by_depth: Σ over depth of a
  int64_t rows, columns, depth, ld_a, ld_b, ld_c, ld_d;
  int dtype;       // a Dtype of device.h, of all matrices; sums are in float32
  int activation;  // 0 none, 1 relu, 3 gelu_tanh
  bool by_depth, tf32;
};

// What cuBLASLt needs to know of a product, found once for all products alike.
struct Plan {
  cublaslt::Description description = nullptr;
  cublaslt::Layout a = nullptr, b = nullptr, c = nullptr, d = nullptr;
  cublaslt::Found found = {};
  bool possible = false;
};

constexpr size_t kMostWorkspace = size_t{32} << 20;  // what torch gives cuBLASLt on Hopper
constexpr size_t kPlansKept = 4096;

inline int element_type(int dtype) {
  return dtype == kFloat32   ? cublaslt::kTypeFloat32
         : dtype == kFloat16 ? cublaslt::kTypeFloat16
                             : cublaslt::kTypeBFloat16;
}

// Column-major, a row-major matrix is its transpose: cuBLASLt computes dᵀ = b · aᵀ, its A is our b, its B our a, and
// its bias runs along our columns.
inline uint32_t epilogue_of(const Product& p) {
  if (p.sums) return cublaslt::kSumsOfB;
  uint32_t bits = 0;
  if (p.bias) bits |= cublaslt::kBias;
  if (p.activation == 1) bits |= cublaslt::kRelu;
  if (p.activation == 3) bits |= cublaslt::kGeluTanh;
  return bits ? bits : cublaslt::kDefault;
}

inline uint32_t alignment_of(const void* p, int64_t leading, int element) {
  uint64_t bits = reinterpret_cast<uint64_t>(p) | static_cast<uint64_t>(leading * element) | 256;
  return static_cast<uint32_t>(bits & -bits);
}

class FusedProducts {
 public:
  explicit FusedProducts(const cublaslt::Library& library) : library_(library) {}

  // The plan of the product on the current device; remembered, also where cuBLASLt has no algorithm.
  const Plan& plan_for(const Product& p, int device) {
    Key key = key_of(p, device);
    auto known = plans_.find(key);
    if (known != plans_.end()) return known->second;
    if (plans_.size() >= kPlansKept) clear();
    return plans_.emplace(key, make_plan(p, key)).first->second;
  }

  // 0, or cuBLASLt's status. `workspace` has the plan's bytes, 256-byte aligned.
  int run(const Plan& plan, const Product& p, int device, void* workspace, void* stream) {
    const void* vector = p.sums ? p.sums : p.bias;
    if (vector) library_.description_set(plan.description, cublaslt::kBiasPointer, &vector, sizeof vector);
    float one = 1.0f, beta = p.c ? 1.0f : 0.0f;
    return library_.multiply(handle(device), plan.description, &one, p.b, plan.a, p.a, plan.b, &beta, p.c ? p.c : p.d,
                             plan.c, p.d, plan.d, &plan.found.algorithm, workspace, plan.found.workspace_bytes, stream);
  }

 private:
  struct Key {
    int64_t sizes[7];
    uint32_t alignments[4];
    int device, compute;
    uint32_t epilogue;
    int dtype, flags;
    int padding = 0;  // every byte has a value: keys are compared as memory
    bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      size_t hash = 1469598103934665603u;
      const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&key);
      for (size_t i = 0; i < sizeof key; ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
      return hash;
    }
  };

  static Key key_of(const Product& p, int device) {
    int element = p.dtype == kFloat32 ? 4 : 2;
    const void* c = p.c ? p.c : p.d;
    int64_t ld_c = p.c ? p.ld_c : p.ld_d;
    Key key;
    std::memset(static_cast<void*>(&key), 0, sizeof key);
    int64_t sizes[] = {p.rows, p.columns, p.depth, p.ld_a, p.ld_b, ld_c, p.ld_d};
    uint32_t alignments[] = {alignment_of(p.b, p.ld_b, element), alignment_of(p.a, p.ld_a, element),
                             alignment_of(c, ld_c, element), alignment_of(p.d, p.ld_d, element)};
    std::memcpy(key.sizes, sizes, sizeof sizes);
    std::memcpy(key.alignments, alignments, sizeof alignments);
    key.device = device;
    key.compute = p.dtype == kFloat32 && p.tf32 ? cublaslt::kComputeTF32 : cublaslt::kComputeFloat32;
    key.epilogue = epilogue_of(p);
    key.dtype = p.dtype;
    key.flags = p.by_depth;
    return key;
  }

  Plan make_plan(const Product& p, const Key& key) {
    Plan plan;
    int type = element_type(p.dtype);
    int32_t transposed = 1, straight = 0;
    uint64_t rows = static_cast<uint64_t>(p.rows), columns = static_cast<uint64_t>(p.columns),
             depth = static_cast<uint64_t>(p.depth);
    auto set = [&](int attribute, const auto& value) {
      return library_.description_set(plan.description, attribute, &value, sizeof value) == 0;
    };
    auto layout = [&](cublaslt::Layout& made, uint64_t r, uint64_t c, int64_t leading) {
      return library_.layout_create(&made, type, r, c, leading) == 0;
    };
    bool made = library_.description_create(&plan.description, key.compute, cublaslt::kTypeFloat32) == 0 &&
                set(cublaslt::kTransposeA, p.by_depth ? straight : transposed) &&
                set(cublaslt::kTransposeB, p.by_depth ? transposed : straight) &&
                set(cublaslt::kEpilogue, key.epilogue);
    const void* vector = p.sums ? p.sums : p.bias;
    if (made && vector) made = set(cublaslt::kBiasPointer, vector);
    made = made && (p.by_depth ? layout(plan.a, columns, depth, p.ld_b) && layout(plan.b, rows, depth, p.ld_a)
                               : layout(plan.a, depth, columns, p.ld_b) && layout(plan.b, depth, rows, p.ld_a));
    made = made && layout(plan.c, columns, rows, p.c ? p.ld_c : p.ld_d) && layout(plan.d, columns, rows, p.ld_d);
    plan.possible = made && search(plan, key);
    return plan;
  }

  bool search(Plan& plan, const Key& key) {
    cublaslt::Preference preference = nullptr;
    if (library_.preference_create(&preference) != 0) return false;
    auto set = [&](int attribute, const auto& value) {
      return library_.preference_set(preference, attribute, &value, sizeof value) == 0;
    };
    size_t most = kMostWorkspace;
    uint32_t schemes = cublaslt::kInPlace | cublaslt::kInComputeType;
    bool ready = set(cublaslt::kWorkspaceBytes, most) && set(cublaslt::kReductionSchemes, schemes) &&
                 set(cublaslt::kAlignmentA, key.alignments[0]) && set(cublaslt::kAlignmentB, key.alignments[1]) &&
                 set(cublaslt::kAlignmentC, key.alignments[2]) && set(cublaslt::kAlignmentD, key.alignments[3]);
    int count = 0;
    bool found = ready && handle(key.device) &&
                 library_.search(handle(key.device), plan.description, plan.a, plan.b, plan.c, plan.d, preference, 1,
                                 &plan.found, &count) == 0;
    library_.preference_destroy(preference);
    return found && count == 1 && plan.found.status == 0;
  }

  // Null where cuBLASLt does not start on the current device.
  cublaslt::Handle handle(int device) {
    cublaslt::Handle& made = handles_[device];
    if (!made && library_.create(&made) != 0) made = nullptr;
    return made;
  }

  void clear() {
    for (auto& [key, plan] : plans_) {
      for (cublaslt::Layout layout : {plan.a, plan.b, plan.c, plan.d})
        if (layout) library_.layout_destroy(layout);
      if (plan.description) library_.description_destroy(plan.description);
    }
    plans_.clear();
  }

  const cublaslt::Library& library_;
  std::unordered_map<Key, Plan, Hash> plans_;
  std::unordered_map<int, cublaslt::Handle> handles_;
};

}  // namespace inherit_kernels::cuda
