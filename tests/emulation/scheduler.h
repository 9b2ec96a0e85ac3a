// What the host twin of the CUDA words asks of the scheduler. Everything runs in one OS thread: each GPU thread is a
// fiber that gives way only where a word makes it wait, and a seed decides who goes on. scheduler.cpp is never
// instrumented by ThreadSanitizer, so that its own bookkeeping neither orders nor races with the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's builtins; the scheduler sets them whenever a fiber goes on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace inherit_kernels::emulation {

struct GridShape {
  dim3 grid, block;
  size_t shared_bytes;
  bool after_previous;
};

// Seed 0: threads in order, copies land at once; seed 1: reverse order, copies as late as waits allow; others: random
// order, every third starving a warp and every third a block, copies at once, late or either.
// overlap = false: grids never overlap, as below sm_90.
void configure(uint64_t seed, bool overlap);
void enqueue(const GridShape& shape, std::function<void()> kernel);
// Runs what was enqueued. Throws std::runtime_error with block and thread for every fault, and forgets the rest.
void synchronize();
// Forgets what was enqueued; the largest shared memory that a block of it would have had.
size_t discard();

// Called from kernels. `line` is where the word stands: lanes that meet at different lines diverged.
enum class Scope { kWarp, kBlock };
void barrier(Scope scope, const char* word, int line);
// Every lane gives in_bytes (at most 64) and gets out_bytes of what `compute` makes of all 32 at the last arrival.
using Compute = void (*)(const unsigned char (*in)[64], unsigned char (*out)[64], int argument);
void exchange(const char* word, int line, const void* in, int in_bytes, void* out, int out_bytes, Compute compute,
              int argument);
using Land = void (*)(void* p_shared, const void* p_global, bool valid);
void begin_copy(void* p_shared, const void* p_global, bool valid, Land land);
void commit_copies();
void wait_copies(int pending);
char* shared_base();
void wait_previous_grid(int line);
void release_next_grid();
void poll(int line);  // gives way: a polling loop must not keep the thread it waits for from running
void order_before(void* flag);
void order_after(const void* flag);
[[noreturn]] void fail(const std::string& what);

// Compute functions of the warp words, not instrumented.
void compute_shuffle(const unsigned char (*in)[64], unsigned char (*out)[64], int lane_mask_is_xor);
void compute_mma(const unsigned char (*in)[64], unsigned char (*out)[64], int is_bf16);

}  // namespace inherit_kernels::emulation
