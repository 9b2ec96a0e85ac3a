// One small kernel per word: what each does, in a form that the emulation and a GPU can both run.
#include "micro_kernels.h"

#include "inherit_kernels/cuda/words.h"

namespace inherit_kernels {
namespace cuda {
namespace {

constexpr int kBlockThreads = 64;

// out[b, i] = in[b, n - 1 - i], through shared memory.
__global__ void micro_reverse_kernel(MicroArgs a) {
  float* p_shared = shared_memory<float>();
  int64_t o_block = static_cast<int64_t>(blockIdx.x) * blockDim.x;
  p_shared[threadIdx.x] = a.p_in[o_block + threadIdx.x];
  __syncthreads();
  a.p_out[o_block + threadIdx.x] = p_shared[blockDim.x - 1 - threadIdx.x];
}

// out = sum, the value of lane 5 and that of the neighbour, of each warp.
__global__ void micro_warp_kernel(MicroArgs a) {
  float v = a.p_in[threadIdx.x];
  float results[3] = {warp_sum(v), shuffle(v, 5), shuffle_xor(v, 1)};
  for (int i = 0; i < 3; ++i) a.p_out[i * blockDim.x + threadIdx.x] = results[i];
}

template <class T>
__device__ uint32_t pair_of(const T* p) {
  return p[0].bits | static_cast<uint32_t>(p[1].bits) << 16;
}

// out [16, 8] = A [16, 16] B [16, 8] + 1, A and B [8 columns, 16] as 16-bit values in p_bits.
template <class T>
__global__ void micro_mma_kernel(MicroArgs a) {
  T* p_a = shared_memory<T>();
  T* p_b = p_a + 16 * 16;
  const T* p_bits = static_cast<const T*>(a.p_bits);
  int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) p_a[i] = p_bits[i];
  for (int i = lane; i < 8 * 16; i += 32) p_b[i] = p_bits[16 * 16 + i];
  __syncwarp();
  int g = lane / 4, t = lane % 4;
  FragmentA b_a;
  for (int i = 0; i < 4; ++i) b_a.r[i] = pair_of(p_a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
  FragmentB b_b;
  for (int i = 0; i < 2; ++i) b_b.r[i] = pair_of(p_b + g * 16 + 2 * t + i * 8);
  Accumulator sum = {{1.0f, 1.0f, 1.0f, 1.0f}};
  mma16816<T>(sum, b_a, b_b);
  for (int i = 0; i < 4; ++i) a.p_out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum.r[i];
}

// out[i] = in[i ^ 4] for i < count and 0 beyond, copied in two stages of 4 floats a thread.
__global__ void micro_copy_kernel(MicroArgs a) {
  float* p_shared = shared_memory<float>();
  int half = 4 * kBlockThreads;
  for (int stage = 0; stage < 2; ++stage) {
    int o = stage * half + 4 * static_cast<int>(threadIdx.x);
    copy16_async(p_shared + o, a.p_in + o, o < a.count);
    commit_copies();
  }
  wait_copies<1>();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kBlockThreads) a.p_out[i] = p_shared[i ^ 4];
  wait_copies<0>();
  __syncthreads();
  for (int i = half + static_cast<int>(threadIdx.x); i < 2 * half; i += kBlockThreads) a.p_out[i] = p_shared[i ^ 4];
}

__global__ void micro_stream_kernel(MicroArgs a) {
  store16(a.p_out + 4 * threadIdx.x, load16_streaming(a.p_in + 4 * threadIdx.x));
}

// The last block to arrive adds up what all left in scratch; p_flags[0] counts, p_flags[1] tells block 0 to go on.
__global__ void micro_flag_kernel(MicroArgs a) {
  if (threadIdx.x != 0) return;
  a.p_scratch[blockIdx.x] = a.p_in[blockIdx.x];
  int before = add_release(a.p_flags, 1);
  if (before == static_cast<int>(gridDim.x) - 1) {
    float sum = load_acquire(a.p_flags) * 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += a.p_scratch[i];
    a.p_out[0] = sum;
    store_release(a.p_flags + 1, 1);
  }
  if (blockIdx.x == 0) {
    while (load_acquire(a.p_flags + 1) == 0) {
    }
    a.p_out[1] = a.p_out[0];
  }
}

// scratch[i] = 2 in[i] ...
__global__ void micro_first_grid_kernel(MicroArgs a) {
  release_next_grid();
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  a.p_scratch[i] = 2.0f * a.p_in[i];
}
// ... out[i] = in[i] + the last of scratch.
__global__ void micro_second_grid_kernel(MicroArgs a) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  float early = a.p_in[i];
  wait_previous_grid();
  a.p_out[i] = early + a.p_scratch[static_cast<int64_t>(gridDim.x) * blockDim.x - 1 - i];
}

// Planted faults.
__global__ void micro_outside_kernel(MicroArgs) {
  shared_memory<float>()[threadIdx.x + 1] = 1.0f;
}
__global__ void micro_deadlock_kernel(MicroArgs) {
  if (threadIdx.x <= 32) __syncthreads();
  if (threadIdx.x > 32) __syncwarp();
}
__global__ void micro_polling_kernel(MicroArgs a) {
  while (load_acquire(a.p_flags) < 1000) {
  }
}
__global__ void micro_divergent_kernel(MicroArgs a) {
  float v = 1.0f;
  if (threadIdx.x % 2 == 0) {
    v = shuffle_xor(v, 2);
  } else {
    v = shuffle_xor(v, 4);
  }
  a.p_out[threadIdx.x] = v;
}
__global__ void micro_in_flight_kernel(MicroArgs a) {
  copy16_async(shared_memory<float>() + 4 * threadIdx.x, a.p_in + 4 * threadIdx.x, true);
}
__global__ void micro_misaligned_kernel(MicroArgs a) {
  store16(a.p_out, load16(a.p_in + 1));
}
struct Entry {
  const char* name;
  void (*kernel)(MicroArgs);
  unsigned blocks, threads;
  size_t shared_bytes;
};

const Entry kEntries[] = {
    {"reverse", micro_reverse_kernel, 3, kBlockThreads, kBlockThreads * 4},
    {"warp", micro_warp_kernel, 1, kBlockThreads, 0},
    {"mma_bf16", micro_mma_kernel<bf16>, 1, 32, 24 * 16 * 2},
    {"mma_half16", micro_mma_kernel<half16>, 1, 32, 24 * 16 * 2},
    {"copy", micro_copy_kernel, 1, kBlockThreads, 8 * kBlockThreads * 4},
    {"stream", micro_stream_kernel, 1, kBlockThreads, 0},
    {"flag", micro_flag_kernel, 6, 32, 0},
    {"outside", micro_outside_kernel, 2, kBlockThreads, kBlockThreads * 4},
    {"deadlock", micro_deadlock_kernel, 1, kBlockThreads, 0},
    {"polling", micro_polling_kernel, 1, 32, 0},
    {"divergent", micro_divergent_kernel, 1, 32, 0},
    {"in_flight", micro_in_flight_kernel, 1, 32, 512},
    {"misaligned", micro_misaligned_kernel, 1, 1, 0},
};

}  // namespace

int micro_launch(const char* name, const MicroArgs& args, void* stream) {
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  Shape shape;
  if (std::string(name) == "grids") {
    shape.grid = dim3(4);
    shape.block = dim3(kBlockThreads);
    cudaError_t error = launch(shape, queue, micro_first_grid_kernel, args);
    if (error != cudaSuccess) return error;
    shape.after_previous = true;
    return launch(shape, queue, micro_second_grid_kernel, args);
  }
  for (const Entry& entry : kEntries) {
    if (std::string(name) != entry.name) continue;
    shape.grid = dim3(entry.blocks);
    shape.block = dim3(entry.threads);
    shape.shared_bytes = entry.shared_bytes;
    return launch(shape, queue, entry.kernel, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace inherit_kernels
