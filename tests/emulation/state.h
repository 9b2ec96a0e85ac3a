// What the scheduler keeps of grids, blocks, warps and threads.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fibers.h"
#include "scheduler.h"

namespace inherit_kernels::emulation {

struct Block;
struct Grid;
struct Thread;

struct Barrier {
  std::vector<Thread*> waiting;
  unsigned generation = 0;
  char order[2];  // of alternate generations, or a fast thread's next arrival would order a slow thread's wake-up
};

struct Warp {
  Barrier barrier;
  std::vector<Thread*> arrived;  // at an exchange
  const char* word = nullptr;
  int line = 0, live = 0;
  unsigned char in[32][64], out[32][64];
};

struct Copy {
  void* p_shared;
  const void* p_global;
  bool valid;
  Land land;
};

struct Thread {
  Block* block;
  Warp* warp;
  dim3 index;
  int lane;
  Context context;
  std::shared_ptr<Guarded> stack;
  void* sanitizer = nullptr;
  const char* word = nullptr;  // what it waits in
  int line = 0;
  std::deque<std::vector<Copy>> copies{1};  // the last group is open
  bool starved = false;
};

struct Block {
  Grid* grid;
  dim3 index;
  std::unique_ptr<Guarded> shared;
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  int live = 0;
  bool released = false;
};

struct Grid {
  GridShape shape;
  std::function<void()> kernel;
  Grid* previous = nullptr;
  std::vector<unsigned> to_start;  // blocks, the next one last
  size_t unreleased = 0, unfinished = 0;
  std::vector<Thread*> waiting;  // in wait_previous_grid() of the next grid
  int ordered = 0;               // grids before this one whose results its first instruction may use
  char start = 0, done = 0;      // ordering points
  bool finished() const { return unfinished == 0; }
};

inline std::string text(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

inline size_t volume(dim3 v) {
  return size_t{v.x} * v.y * v.z;
}

inline dim3 unflatten(size_t i, dim3 size) {
  return dim3(static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
              static_cast<unsigned>(i / size.x / size.y));
}

}  // namespace inherit_kernels::emulation
