#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace inherit_kernels {

extern const Kernels kernels_generic;
#ifdef INHERIT_KERNELS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool runs_here;
};

struct Levels {
  Level levels[4];
  int count;
};

// Widest first.
Levels find_levels() {
#ifdef INHERIT_KERNELS_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{{&kernels_avx512_bf16, bf16}, {&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_generic, true}},
          4};
#else
  return {{{&kernels_generic, true}}, 1};
#endif
}

const Kernels& choose() {
  Levels found = find_levels();
  const char* variable = std::getenv("INHERIT_KERNELS_CPU_ISA");
  std::string wanted = variable ? variable : "", available;
  for (int i = 0; i < found.count; ++i) {
    const Level& level = found.levels[i];
    if (!level.runs_here) continue;
    if (wanted.empty() || wanted == level.kernels->name) return *level.kernels;
    available += std::string(available.empty() ? "" : ", ") + level.kernels->name;
  }
  throw std::runtime_error("INHERIT_KERNELS_CPU_ISA is '" + wanted + "', which this machine cannot run; it can run: " +
                           available + ". Unset the variable or name one of these.");
}

}  // namespace

const Kernels& active_kernels() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace inherit_kernels
