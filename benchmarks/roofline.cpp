// What this machine can do, measured: the rate of a plain register-blocked product from panels that stay in L1, and how
// fast working sets of a given size are read and copied. Torch-free; compiled by roofline.py with -O3 -march=native at
// first use (it is never shipped). Figures are the best of many short bursts: a limit must not be beaten by luck.

#include <time.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kVectors = 2;  // 24 of 32 registers accumulate
#elif defined(__AVX2__) || defined(__AVX__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;  // 12 of 16 registers accumulate
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kVectors = 3;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif
constexpr int kColumns = kVectors * kLanes;
constexpr size_t kPanelBytes = 28 * 1024;  // both panels within the smallest L1 in use, 32 KiB
constexpr int kDepth = kPanelBytes / sizeof(float) / (kRows + kColumns) / 8 * 8;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint64_t Words __attribute__((vector_size(kLanes * sizeof(float))));

double seconds_now(bool processor_time) {
  timespec now;
  clock_gettime(processor_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer allocate(size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  char* memory = static_cast<char*>(std::aligned_alloc(4096, bytes));
  std::memset(memory, 0, bytes);  // pages are touched before they are timed
  return Buffer(memory);
}

// Work a second, all threads together, best round: `make(thread)` gives a thread its `burst() -> work done`. A round
// begins at a barrier and counts as long as its slowest thread.
template <class Make>
double best_rate(int threads, double seconds, bool processor_time, Make make) {
  constexpr int kRounds = 20;
  std::barrier<> start(threads);
  std::vector<double> work(threads * kRounds), took(threads * kRounds);
  std::atomic<int> repeats{1};
  auto body = [&](int thread) {
    auto burst = make(thread);
    burst();
    const double before = seconds_now(processor_time);
    burst();
    const double once = std::max(seconds_now(processor_time) - before, 1e-7);
    if (thread == 0) repeats = std::max(1, static_cast<int>(seconds / kRounds / once));
    for (int round = 0; round < kRounds; ++round) {
      start.arrive_and_wait();
      const double begin = seconds_now(processor_time);
      double done = 0;
      for (int i = repeats; i > 0; --i) done += burst();
      took[round * threads + thread] = seconds_now(processor_time) - begin;
      work[round * threads + thread] = done;
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (auto& other : others) other.join();
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    double total = 0, longest = 0;
    for (int thread = 0; thread < threads; ++thread) {
      total += work[round * threads + thread];
      longest = std::max(longest, took[round * threads + thread]);
    }
    best = std::max(best, total / longest);
  }
  return best;
}

// c[kRows][kColumns] = a·b for panels a [kDepth][kRows] and b [kDepth][kColumns].
void product(const float* a, const float* b, float* c) {
  Vector sums[kRows][kVectors] = {};
  for (int k = 0; k < kDepth; ++k, a += kRows, b += kColumns) {
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = *reinterpret_cast<const Vector*>(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += a[i] * row[j];
    }
  }
  std::memcpy(c, sums, sizeof sums);
}

#if defined(__AVX512BF16__)
// The same in bfloat16: panels hold pairs along the depth, one instruction adds both products of a pair.
constexpr int kPairs = kDepth;  // as many bytes as the float panels

void product_bf16(const float* a, const float* b, float* c) {
  __m512 sums[kRows][kVectors] = {};
  for (int k = 0; k < kPairs; ++k, a += kRows, b += kColumns) {
    __m512bh row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = (__m512bh)_mm512_loadu_ps(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512bh pair = (__m512bh)_mm512_set1_ps(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], pair, row[j]);
    }
  }
  std::memcpy(c, sums, sizeof sums);
}
#endif

template <class Product>
double product_rate(int threads, double seconds, bool processor_time, Product multiply, double flops) {
  return best_rate(threads, seconds, processor_time, [=](int) {
    std::shared_ptr<char> panels(allocate(sizeof(float) * (kDepth + 1) * (kRows + kColumns)).release(), Free());
    return [=] {
      constexpr int kBurst = 64;
      alignas(64) float c[kRows * kColumns];
      const float* b = reinterpret_cast<const float*>(panels.get());
      const float* a = b + kDepth * kColumns;
      for (int i = 0; i < kBurst; ++i) {
        multiply(a, b, c);
        asm volatile("" : : "r"(c) : "memory");
      }
      return kBurst * flops;
    };
  });
}

// Reads `bytes` in `kStreams` places at once: hardware prefetchers follow several streams faster than one.
template <int kStreams>
void read(const char* data, size_t bytes) {
  const size_t count = bytes / sizeof(Words) / kStreams / 2 * 2;
  const Words* words = reinterpret_cast<const Words*>(data);
  Words seen[kStreams][2] = {};
  for (size_t i = 0; i < count; i += 2) {
#pragma GCC unroll 8
    for (int stream = 0; stream < kStreams; ++stream) {
      seen[stream][0] |= words[stream * count + i];
      seen[stream][1] |= words[stream * count + i + 1];
    }
  }
#if defined(__x86_64__)
  for (auto& pair : seen) asm volatile("" : : "x"(pair[0]), "x"(pair[1]));
#else
  for (auto& pair : seen) asm volatile("" : : "w"(pair[0]), "w"(pair[1]));
#endif
}

void copy(char* to, const char* from, size_t bytes) {
  const Words* source = reinterpret_cast<const Words*>(from);
  Words* target = reinterpret_cast<Words*>(to);
#pragma GCC unroll 4
  for (size_t i = 0; i < bytes / sizeof(Words); ++i) {
    target[i] = source[i];
    asm volatile("" : : : "memory");  // stays a loop: the compiler would call memcpy, which is tried beside it
  }
}

}  // namespace

extern "C" {

int roofline_lanes() {
  return kLanes;
}

// FLOP/s of float32 products.
double roofline_float32(int threads, double seconds, int processor_time) {
  return product_rate(threads, seconds, processor_time, product, 2.0 * kRows * kColumns * kDepth);
}

// FLOP/s of bfloat16 products, 0 where the CPU has no instruction for them.
double roofline_bfloat16(int threads, double seconds, int processor_time) {
#if defined(__AVX512BF16__)
  return product_rate(threads, seconds, processor_time, product_bf16, 4.0 * kRows * kColumns * kPairs);
#else
  (void)threads, (void)seconds, (void)processor_time;
  return 0;
#endif
}

// Bytes a second read from a working set of `bytes`, divided among the threads.
double roofline_read(size_t bytes, int threads, double seconds, int processor_time) {
  const size_t share = bytes / threads;
  auto rate = [&](auto reader) {
    return best_rate(threads, seconds / 3, processor_time, [=](int) {
      std::shared_ptr<char> data(allocate(share).release(), Free());
      const int passes = std::max<size_t>(1, (size_t{1} << 18) / share);
      return [=] {
        for (int i = 0; i < passes; ++i) reader(data.get(), share);
        return double(share) * passes;
      };
    });
  };
  return std::max({rate(read<1>), rate(read<2>), rate(read<4>)});
}

// Bytes a second read and written by a copy whose source and target together take `bytes`.
double roofline_copy(size_t bytes, int threads, double seconds, int processor_time) {
  const size_t half = bytes / threads / 2;
  auto rate = [&](auto copier) {
    return best_rate(threads, seconds / 2, processor_time, [=](int) {
      std::shared_ptr<char> data(allocate(2 * half).release(), Free());
      const int passes = std::max<size_t>(1, (size_t{1} << 18) / half);
      return [=] {
        for (int i = 0; i < passes; ++i) copier(data.get() + half, data.get(), half);
        return 2.0 * half * passes;
      };
    });
  };
  return std::max(rate(copy), rate([](char* to, const char* from, size_t size) {
                    std::memcpy(to, from, size);
                    asm volatile("" : : "r"(to) : "memory");
                  }));
}
}
