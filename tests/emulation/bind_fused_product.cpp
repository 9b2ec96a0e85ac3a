// fused_product.h on the CPU, over a stand-in for cuBLASLt that computes what its documentation says and refuses what
// it says must not be: attributes of another size, leading dimensions below the rows, alignments that the pointers do
// not have, an algorithm of another search, a workspace that is too small.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "binding.h"
#include "inherit_kernels/cuda/fused_product.h"
#include "inherit_kernels/cuda/words.h"

namespace py = pybind11;
using namespace inherit_kernels::cuda;

namespace {

struct FakeDescription {
  int compute = 0, scale = 0;
  int32_t transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = cublaslt::kDefault;
  void* vector = nullptr;
};
struct FakeLayout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct FakePreference {
  uint64_t workspace = 0;
  uint32_t schemes = 7, alignment[4] = {256, 256, 256, 256};
};

constexpr size_t kWorkspace = 512;
int searches = 0;
bool refuse = false;  // as where no algorithm exists

int expect(bool fine) {
  return fine ? 0 : 7;  // CUBLAS_STATUS_INVALID_VALUE
}

template <class T>
int take(T& into, const void* value, size_t bytes) {
  if (bytes != sizeof(T)) return expect(false);
  std::memcpy(&into, value, bytes);
  return 0;
}

int create(cublaslt::Handle* handle) {
  *handle = new int(1);
  return 0;
}
int description_create(cublaslt::Description* made, int compute, int scale) {
  FakeDescription* d = new FakeDescription;
  d->compute = compute;
  d->scale = scale;
  *made = d;
  return expect(compute == 68 || compute == 77);
}
int description_set(cublaslt::Description given, int attribute, const void* value, size_t bytes) {
  FakeDescription& d = *static_cast<FakeDescription*>(given);
  switch (attribute) {
    case 3:
      return take(d.transpose_a, value, bytes);
    case 4:
      return take(d.transpose_b, value, bytes);
    case 7:
      return take(d.epilogue, value, bytes);
    case 8:
      return take(d.vector, value, bytes);
    default:
      return expect(false);
  }
}
int description_destroy(cublaslt::Description d) {
  delete static_cast<FakeDescription*>(d);
  return 0;
}
int layout_create(cublaslt::Layout* made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *made = new FakeLayout{type, rows, columns, leading};
  return expect(leading >= static_cast<int64_t>(rows));
}
int layout_destroy(cublaslt::Layout layout) {
  delete static_cast<FakeLayout*>(layout);
  return 0;
}
int preference_create(cublaslt::Preference* made) {
  *made = new FakePreference;
  return 0;
}
int preference_set(cublaslt::Preference given, int attribute, const void* value, size_t bytes) {
  FakePreference& p = *static_cast<FakePreference*>(given);
  if (attribute == 1) return take(p.workspace, value, bytes);
  if (attribute == 3) return take(p.schemes, value, bytes);
  return attribute >= 5 && attribute <= 8 ? take(p.alignment[attribute - 5], value, bytes) : expect(false);
}
int preference_destroy(cublaslt::Preference p) {
  delete static_cast<FakePreference*>(p);
  return 0;
}

int search(cublaslt::Handle handle, cublaslt::Description d, cublaslt::Layout a, cublaslt::Layout b, cublaslt::Layout c,
           cublaslt::Layout, cublaslt::Preference given, int wanted, cublaslt::Found* found, int* count) {
  ++searches;
  const FakePreference& p = *static_cast<FakePreference*>(given);
  *count = refuse ? 0 : 1;
  uint64_t data[8] = {reinterpret_cast<uint64_t>(d),
                      reinterpret_cast<uint64_t>(a),
                      reinterpret_cast<uint64_t>(b),
                      reinterpret_cast<uint64_t>(c),
                      p.alignment[0],
                      p.alignment[1],
                      p.alignment[2],
                      p.alignment[3]};
  std::memcpy(found->algorithm.data, data, sizeof data);
  found->workspace_bytes = kWorkspace;
  found->status = 0;
  return expect(handle && wanted == 1 && p.workspace >= kWorkspace && p.schemes == 3);
}

double read(const void* p, int type, int64_t i) {
  if (type == cublaslt::kTypeFloat32) return static_cast<const float*>(p)[i];
  if (type == cublaslt::kTypeFloat16) return to_float(static_cast<const half16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}
void write(void* p, int type, int64_t i, double value) {
  float v = static_cast<float>(value);
  if (type == cublaslt::kTypeFloat32) static_cast<float*>(p)[i] = v;
  if (type == cublaslt::kTypeFloat16) static_cast<half16*>(p)[i] = from_float<half16>(v);
  if (type == cublaslt::kTypeBFloat16) static_cast<bf16*>(p)[i] = from_float<bf16>(v);
}

int multiply(cublaslt::Handle handle, cublaslt::Description given, const void* alpha, const void* a,
             cublaslt::Layout of_a, const void* b, cublaslt::Layout of_b, const void* beta, const void* c,
             cublaslt::Layout of_c, void* d, cublaslt::Layout of_d, const cublaslt::Algorithm* algorithm,
             void* workspace, size_t workspace_bytes, void*) {
  const FakeDescription& how = *static_cast<FakeDescription*>(given);
  const FakeLayout &la = *static_cast<FakeLayout*>(of_a), &lb = *static_cast<FakeLayout*>(of_b),
                   &lc = *static_cast<FakeLayout*>(of_c), &ld = *static_cast<FakeLayout*>(of_d);
  const uint64_t* known = algorithm->data;
  bool own = known[0] == reinterpret_cast<uint64_t>(given) && known[1] == reinterpret_cast<uint64_t>(of_a) &&
             known[2] == reinterpret_cast<uint64_t>(of_b) && known[3] == reinterpret_cast<uint64_t>(of_c);
  const void* pointers[] = {a, b, c, d};
  const FakeLayout* layouts[] = {&la, &lb, &lc, &ld};
  int element = la.type == cublaslt::kTypeFloat32 ? 4 : 2;
  for (int i = 0; i < 4; ++i)
    own = own && reinterpret_cast<uint64_t>(pointers[i]) % known[4 + i] == 0 &&
          static_cast<uint64_t>(layouts[i]->leading * element) % known[4 + i] == 0;
  std::memset(workspace, 0xab, workspace_bytes);
  int64_t m = static_cast<int64_t>(ld.rows), n = static_cast<int64_t>(ld.columns);
  int64_t k = static_cast<int64_t>(how.transpose_a ? la.rows : la.columns);
  bool fits = static_cast<int64_t>(how.transpose_a ? la.columns : la.rows) == m &&
              static_cast<int64_t>(how.transpose_b ? lb.columns : lb.rows) == k &&
              static_cast<int64_t>(how.transpose_b ? lb.rows : lb.columns) == n && lc.rows == ld.rows &&
              lc.columns == ld.columns;
  if (!handle || !own || !fits || workspace_bytes != kWorkspace) return expect(false);
  double scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  auto a_at = [&](int64_t i, int64_t x) {
    return read(a, la.type, how.transpose_a ? i * la.leading + x : x * la.leading + i);
  };
  auto b_at = [&](int64_t x, int64_t j) {
    return read(b, lb.type, how.transpose_b ? x * lb.leading + j : j * lb.leading + x);
  };
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t x = 0; x < k; ++x) sum += a_at(i, x) * b_at(x, j);
      sum *= scale;
      if (keep != 0) sum += keep * read(c, lc.type, j * lc.leading + i);
      if (how.epilogue & cublaslt::kBias) sum += read(how.vector, ld.type, i);
      if (how.epilogue & cublaslt::kRelu) sum = sum > 0 ? sum : 0;
      if (how.epilogue & cublaslt::kGeluTanh)
        sum = 0.5 * sum * (1 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
      write(d, ld.type, j * ld.leading + i, sum);
    }
  if (how.epilogue & cublaslt::kSumsOfB)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t x = 0; x < k; ++x) sum += b_at(x, j);
      write(how.vector, ld.type, j, sum);
    }
  return 0;
}

const cublaslt::Library kStandIn = {
    create,         description_create, description_set, description_destroy, layout_create,
    layout_destroy, preference_create,  preference_set,  preference_destroy,  search,
    multiply};

Product product_of(const py::dict& d) {
  auto pointer = [&](const char* name) { return reinterpret_cast<void*>(d[name].cast<uintptr_t>()); };
  auto size = [&](const char* name) { return d[name].cast<int64_t>(); };
  Product p{};
  p.a = pointer("a");
  p.b = pointer("b");
  p.c = pointer("c");
  p.bias = pointer("bias");
  p.d = pointer("d");
  p.sums = pointer("sums");
  p.rows = size("rows");
  p.columns = size("columns");
  p.depth = size("depth");
  p.ld_a = size("ld_a");
  p.ld_b = size("ld_b");
  p.ld_c = size("ld_c");
  p.ld_d = size("ld_d");
  p.dtype = static_cast<int>(size("dtype"));
  p.activation = static_cast<int>(size("activation"));
  p.by_depth = size("by_depth");
  return p;
}

}  // namespace

PYBIND11_MODULE(EMULATION_MODULE, m) {
  inherit_kernels::emulation::bind_emulation(m);
  static FusedProducts products(kStandIn);
  // cuBLASLt's status, or -1 where there is no algorithm.
  m.def("multiply", [](const py::dict& d) {
    Product p = product_of(d);
    const Plan& plan = products.plan_for(p, 0);
    if (!plan.possible) return -1;
    std::vector<char> workspace(plan.found.workspace_bytes + 256);
    return products.run(plan, p, 0, workspace.data(), nullptr);
  });
  m.def("searches", [] { return searches; });
  m.def("refuse", [](bool now) { refuse = now; });
  // The functions and descriptors of a real library; what it says without a GPU.
  m.def("real_library", [](const std::string& path) {
    void* opened = dlopen(path.c_str(), RTLD_LAZY);
    static cublaslt::Library library;
    if (!opened || !cublaslt::look_up(opened, library)) return false;
    FusedProducts real(library);
    float values[64] = {};
    Product p{};
    p.a = p.b = p.c = p.bias = p.d = values;
    p.rows = p.columns = p.depth = p.ld_a = p.ld_b = p.ld_c = p.ld_d = 8;
    const Plan& plan = real.plan_for(p, 0);
    return plan.description && plan.a && plan.b && plan.c && plan.d;
  });
}
