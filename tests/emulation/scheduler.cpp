#include "scheduler.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "state.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace inherit_kernels::emulation {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
// Two mappings each, of the 65,530 that Linux allows; ThreadSanitizer has several more and 1 MB for each.
constexpr size_t kResidentThreads = kSanitized ? 1024 : 8192;
constexpr size_t kKeptStacks = 1024;  // between runs: many modules may be loaded
constexpr size_t kSharedLimit = 227 * 1024;
constexpr int kIdlePolls = 200000;  // polls in a row, with nothing else done, that count as a deadlock

enum class Order { kForward, kReverse, kRandom, kStarveWarp, kStarveBlock };
enum class Copies { kAtOnce, kLate, kEither };

// The sanitizer watches kernels, not the scheduler, whichever fiber it runs on.
struct Unwatched {
  Unwatched() { sanitizer_look_away(); }
  ~Unwatched() { sanitizer_look_again(); }
};

void land(const Copy& copy) {
  if (!copy.land) return;
  sanitizer_look_again();
  copy.land(copy.p_shared, copy.p_global, copy.valid);
  sanitizer_look_away();
}

class Machine {
 public:
  void configure(uint64_t seed, bool overlap) {
    constexpr Order kOrders[] = {Order::kRandom, Order::kStarveWarp, Order::kStarveBlock};
    constexpr Copies kCopies[] = {Copies::kAtOnce, Copies::kLate, Copies::kEither};
    random_.seed(seed);
    order_ = seed == 0 ? Order::kForward : seed == 1 ? Order::kReverse : kOrders[seed % 3];
    copies_ = seed < 2 ? kCopies[seed] : kCopies[seed / 3 % 3];
    overlap_ = overlap;
  }

  void enqueue(const GridShape& shape, std::function<void()> kernel) {
    grids_.emplace_back();
    Grid& grid = grids_.back();
    grid.shape = shape;
    grid.shape.after_previous = shape.after_previous && overlap_ && grids_.size() > 1;
    grid.kernel = std::move(kernel);
    if (grids_.size() > 1) grid.previous = &*std::prev(grids_.end(), 2);
    grid.unreleased = grid.unfinished = volume(shape.grid);
    for (size_t i = grid.unfinished; i > 0; --i) grid.to_start.push_back(static_cast<unsigned>(i - 1));
    if (order_ == Order::kReverse) std::reverse(grid.to_start.begin(), grid.to_start.end());
    if (order_ > Order::kReverse) std::shuffle(grid.to_start.begin(), grid.to_start.end(), random_);
    int count = static_cast<int>(grids_.size()) - 1;
    grid.ordered = grid.shape.after_previous ? grid.previous->ordered : count;
    release(&grid.start);
  }

  void synchronize() {
    struct AtEnd {
      Machine* machine;
      ~AtEnd() { machine->clear(); }
    } at_end{this};
    Signals signals;
    if (sigsetjmp(escape_, 1) == 0) run();
    if (fault_.empty())
      for (Grid& grid : grids_) acquire(&grid.done);
    std::string fault;
    std::swap(fault, fault_);
    if (!fault.empty()) throw std::runtime_error(fault);
  }

  size_t discard() {
    size_t largest = 0;
    for (const Grid& grid : grids_) largest = std::max(largest, grid.shape.shared_bytes);
    clear();
    return largest;
  }

  // Words, called on a fiber.

  void barrier(Scope scope, const char* word, int line) {
    Thread& self = *current_;
    Barrier& barrier = barrier_of(self, scope);
    char* order = &barrier.order[barrier.generation & 1];
    release(order);
    barrier.waiting.push_back(&self);
    open_if_complete(barrier, live_of(self, scope));
    suspend(word, line);
    acquire(order);
  }

  void exchange(const char* word, int line, const void* in, int in_bytes, void* out, int out_bytes, Compute compute,
                int argument) {
    Thread& self = *current_;
    Warp& warp = *self.warp;
    if (warp.live != 32) fail(std::string(word) + " in a warp of which " + std::to_string(warp.live) + " lanes live");
    if (!warp.arrived.empty() && (warp.word != word || warp.line != line))
      fail("divergent warp: this lane is in " + where(word, line) + ", others in " + where(warp.word, warp.line));
    warp.word = word;
    warp.line = line;
    for (int i = 0; i < in_bytes; ++i) warp.in[self.lane][i] = static_cast<const unsigned char*>(in)[i];
    warp.arrived.push_back(&self);
    if (warp.arrived.size() == 32) {
      compute(warp.in, warp.out, argument);
      wake(warp.arrived);
    }
    suspend(word, line);
    for (int i = 0; i < out_bytes; ++i) static_cast<unsigned char*>(out)[i] = warp.out[self.lane][i];
  }

  void begin_copy(const Copy& copy) {
    bool now = copies_ == Copies::kAtOnce || (copies_ == Copies::kEither && random_() % 2);
    if (now) land(copy);
    // One that landed stays on the list without a landing: it too must be waited for.
    current_->copies.back().push_back({copy.p_shared, copy.p_global, copy.valid, now ? nullptr : copy.land});
  }

  void commit_copies() { current_->copies.emplace_back(); }

  void wait_copies(int pending) {
    auto& groups = current_->copies;
    while (static_cast<int>(groups.size()) > pending + 1) {
      for (const Copy& copy : groups.front()) land(copy);
      groups.pop_front();
    }
  }

  void wait_previous_grid(int line) {
    Grid& grid = *current_->block->grid;
    if (!grid.shape.after_previous) return;
    if (!grid.previous->finished()) {
      grid.previous->waiting.push_back(current_);
      suspend("wait_previous_grid", line);
    }
    acquire(&grid.previous->done);
  }

  void release_next_grid() {
    if (!current_->block->released) --current_->block->grid->unreleased;
    current_->block->released = true;
  }

  void poll(int line) {
    if (++polls_ > kIdlePolls) fail("deadlock: only polling loops run\n" + describe_waiting());
    starved_.push_front(current_);  // after everybody else, or it might wait for a thread that never runs
    suspend("poll", line);
  }

  void order_before(void* flag) {
    polls_ = 0;
    release(flag);
  }

  [[noreturn]] void fail(const std::string& what) {
    fault_ = what;
    if (current_) fault_ += "\n  in block " + text(current_->block->index) + ", thread " + text(current_->index);
    leave_to_main();
    __builtin_unreachable();
  }

  Thread& current() { return *current_; }

 private:
  // Touching a guard page becomes a fault with block and thread. ThreadSanitizer keeps its own handlers.
  struct Signals {
    Signals() {
      if (kSanitized) return;
      stack_t own = {};
      own.ss_sp = stack.data();
      own.ss_size = stack.size();
      sigaltstack(&own, &old_stack);
      struct sigaction action = {};
      action.sa_sigaction = &on_signal;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGSEGV, &action, &old_segv);
      sigaction(SIGBUS, &action, &old_bus);
    }
    ~Signals() {
      if (kSanitized) return;
      sigaction(SIGSEGV, &old_segv, nullptr);
      sigaction(SIGBUS, &old_bus, nullptr);
      sigaltstack(&old_stack, nullptr);
    }
    std::vector<char> stack = std::vector<char>(64 * 1024);
    stack_t old_stack = {};
    struct sigaction old_segv = {}, old_bus = {};
  };

  static void on_signal(int number, siginfo_t* info, void*);

  void run() {
    while (!all_finished()) {
      admit();
      Thread* next = pick();
      if (!next) {
        fault_ = "deadlock: every thread waits\n" + describe_waiting();
        return;
      }
      resume(*next);
      if (!fault_.empty()) return;
      ended_.clear();  // blocks that left, now that nobody runs on their stacks
    }
  }

  bool all_finished() const {
    for (const Grid& grid : grids_)
      if (!grid.finished()) return false;
    return true;
  }

  // Starts blocks of every grid whose turn has come.
  void admit() {
    for (Grid& grid : grids_) {
      if (grid.to_start.empty()) continue;
      if (!may_start(grid)) return;
      size_t threads = volume(grid.shape.block);
      while (!grid.to_start.empty() && (resident_ == 0 || resident_ + threads <= kResidentThreads)) {
        unsigned number = grid.to_start.back();
        grid.to_start.pop_back();
        start_block(grid, number);
      }
      if (!grid.to_start.empty()) return;
    }
  }

  static bool may_start(const Grid& grid) {
    if (!grid.previous) return true;
    if (grid.shape.after_previous) return grid.previous->unreleased == 0;
    for (const Grid* g = grid.previous; g; g = g->previous)
      if (!g->finished()) return false;
    return true;
  }

  void start_block(Grid& grid, unsigned number) {
    const GridShape& shape = grid.shape;
    blocks_.emplace_back();
    Block& block = blocks_.back();
    block.grid = &grid;
    block.index = unflatten(number, shape.grid);
    block.live = static_cast<int>(volume(shape.block));
    block.shared = std::make_unique<Guarded>(shape.shared_bytes, 16);
    for (char* p = block.shared->data(); p < block.shared->end(); ++p) *p = static_cast<char>(0xff);  // NaN
    block.warps = std::vector<Warp>((block.live + 31) / 32);
    int starved_warp = order_ == Order::kStarveWarp ? static_cast<int>(random_() % block.warps.size()) : -1;
    bool starved_block = order_ == Order::kStarveBlock && random_() % 4 == 0;
    for (int i = 0; i < block.live; ++i) {
      block.threads.emplace_back();
      Thread& thread = block.threads.back();
      thread.block = &block;
      thread.warp = &block.warps[i / 32];
      thread.warp->live += 1;
      thread.lane = i % 32;
      thread.index = unflatten(i, shape.block);
      thread.starved = starved_block || i / 32 == starved_warp;
      thread.stack = take_stack();
      thread.context.prepare(*thread.stack, &Machine::enter);
      thread.sanitizer = sanitizer_create();
      make_ready(&thread);
    }
    release(&block.grid->start);
    resident_ += block.live;
  }

  std::shared_ptr<Guarded> take_stack() {
    if (stacks_.empty()) return std::make_shared<Guarded>(kStackBytes, 16);
    auto stack = stacks_.back();
    stacks_.pop_back();
    return stack;
  }

  static void enter();

  void thread_main() {
    Grid& grid = *current_->block->grid;
    acquire(&grid.start);
    int number = 0;
    for (Grid& earlier : grids_)
      if (number++ < grid.ordered) acquire(&earlier.done);
    grid.kernel();
    exit_thread(*current_);
    leave_to_main();
  }

  void exit_thread(Thread& self) {
    Unwatched unwatched;
    if (self.copies.size() > 1 || !self.copies.back().empty())
      for (const auto& group : self.copies)
        if (!group.empty()) fail("the thread ended with copies in flight");
    Block& block = *self.block;
    if (!self.warp->arrived.empty())
      fail("divergent warp: this lane has ended, others are in " + where(self.warp->word, self.warp->line));
    release(&block.grid->done);
    polls_ = 0;
    --resident_;
    --self.warp->live;
    --block.live;
    open_if_complete(self.warp->barrier, self.warp->live);
    open_if_complete(block.barrier, block.live);
    if (block.live == 0) exit_block(block);
  }

  void exit_block(Block& block) {
    Grid& grid = *block.grid;
    if (!block.released) --grid.unreleased;
    if (--grid.unfinished == 0) wake(grid.waiting);
    for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
      if (&*it == &block) {
        for (Thread& thread : it->threads) retire(thread);
        ended_.splice(ended_.end(), blocks_, it);
        break;
      }
  }

  void retire(Thread& thread) {
    expired_.push_back(thread.sanitizer);
    if (!kSanitized) stacks_.push_back(thread.stack);  // ThreadSanitizer would remember who used it before
  }

  Barrier& barrier_of(Thread& thread, Scope scope) {
    return scope == Scope::kWarp ? thread.warp->barrier : thread.block->barrier;
  }

  int live_of(const Thread& thread, Scope scope) {
    return scope == Scope::kWarp ? thread.warp->live : thread.block->live;
  }

  void open_if_complete(Barrier& barrier, int live) {
    if (barrier.waiting.empty() || static_cast<int>(barrier.waiting.size()) < live) return;
    ++barrier.generation;
    wake(barrier.waiting);
  }

  void wake(std::vector<Thread*>& threads) {
    polls_ = 0;
    for (Thread* thread : threads) make_ready(thread);
    threads.clear();
  }

  void make_ready(Thread* thread) {
    thread->word = nullptr;
    (thread->starved ? starved_ : ready_).push_back(thread);
  }

  Thread* pick() {
    std::deque<Thread*>& from = ready_.empty() ? starved_ : ready_;
    if (from.empty()) return nullptr;
    if (order_ > Order::kReverse) std::swap(from[random_() % from.size()], from.back());
    Thread* thread = order_ == Order::kForward ? from.front() : from.back();
    if (order_ == Order::kForward) {
      from.pop_front();
    } else {
      from.pop_back();
    }
    return thread;
  }

  // Whoever it waits for calls make_ready(), which may already have happened.
  void suspend(const char* word, int line) {
    current_->word = word;
    current_->line = line;
    leave_to_main();
  }

  void resume(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    blockDim = thread.block->grid->shape.block;
    gridDim = thread.block->grid->shape.grid;
    thread.word = nullptr;
    main_sanitizer_ = sanitizer_current();
    sanitizer_change(thread.sanitizer);
    Context::change(main_, thread.context);
    for (void* fiber : expired_) sanitizer_destroy(fiber);
    expired_.clear();
    current_ = nullptr;
  }

  void leave_to_main() {
    Thread& self = *current_;
    sanitizer_change(main_sanitizer_);
    Context::change(self.context, main_);
  }

  static std::string where(const char* word, int line) {
    return std::string(word) + " (line " + std::to_string(line) + ")";
  }

  std::string describe_waiting() {
    std::map<std::string, std::pair<int, Thread*>> groups;
    for (Block& block : blocks_)
      for (Thread& thread : block.threads)
        if (thread.word) {
          auto& group = groups[where(thread.word, thread.line)];
          if (group.first++ == 0) group.second = &thread;
        }
    std::string result;
    for (auto& [place, group] : groups)
      result += "  " + std::to_string(group.first) + " in " + place + ", the first in block " +
                text(group.second->block->index) + ", thread " + text(group.second->index) + "\n";
    return result;
  }

  std::string describe_address(const char* p) {
    for (Block& block : blocks_)
      if (block.shared->guards(p))
        return "outside the shared memory of block " + text(block.index) + " (at byte " +
               std::to_string(p - block.shared->data()) + " of " + std::to_string(block.grid->shape.shared_bytes) + ")";
    if (current_ && current_->stack->guards(p)) return "past the end of its stack";
    return "outside every array";
  }

  void clear() {
    ready_.clear();
    starved_.clear();
    ended_.clear();
    blocks_.clear();
    grids_.clear();
    stacks_.resize(std::min(stacks_.size(), kKeptStacks));
    resident_ = 0;
    polls_ = 0;
    current_ = nullptr;
  }

  Order order_ = Order::kForward;
  Copies copies_ = Copies::kAtOnce;
  bool overlap_ = true;
  std::mt19937_64 random_;
  std::list<Grid> grids_;
  std::list<Block> blocks_, ended_;
  std::deque<Thread*> ready_, starved_;
  std::vector<std::shared_ptr<Guarded>> stacks_;
  size_t resident_ = 0;
  int polls_ = 0;
  Context main_;
  void* main_sanitizer_ = nullptr;
  std::vector<void*> expired_;  // sanitizer fibers of threads that have ended
  Thread* current_ = nullptr;
  std::string fault_;
  sigjmp_buf escape_;
};

Machine machine;

void Machine::enter() {
  machine.thread_main();
}

void Machine::on_signal(int number, siginfo_t* info, void*) {
  if (!machine.current_) {  // not a kernel's doing: let it happen again without us
    signal(number, SIG_DFL);
    return;
  }
  Thread& self = *machine.current_;
  machine.fault_ = "memory access " + machine.describe_address(static_cast<const char*>(info->si_addr)) +
                   "\n  in block " + text(self.block->index) + ", thread " + text(self.index);
  siglongjmp(machine.escape_, 1);
}

}  // namespace

void configure(uint64_t seed, bool overlap) {
  machine.configure(seed, overlap);
}

void enqueue(const GridShape& shape, std::function<void()> kernel) {
  if (shape.shared_bytes > kSharedLimit) throw std::runtime_error("a block has at most 227 KB of shared memory");
  if (volume(shape.block) > 1024 || volume(shape.block) == 0) throw std::runtime_error("a block has 1 to 1024 threads");
  if (volume(shape.grid) == 0 || shape.grid.y > 65535 || shape.grid.z > 65535)
    throw std::runtime_error("the grid " + text(shape.grid) + " is empty or too large");
  machine.enqueue(shape, std::move(kernel));
}

void synchronize() {
  Unwatched unwatched;
  machine.synchronize();
}
size_t discard() {
  return machine.discard();
}
void barrier(Scope scope, const char* word, int line) {
  Unwatched unwatched;
  machine.barrier(scope, word, line);
}
void exchange(const char* word, int line, const void* in, int in_bytes, void* out, int out_bytes, Compute compute,
              int argument) {
  Unwatched unwatched;
  machine.exchange(word, line, in, in_bytes, out, out_bytes, compute, argument);
}
void begin_copy(void* p_shared, const void* p_global, bool valid, Land land) {
  Unwatched unwatched;
  machine.begin_copy({p_shared, p_global, valid, land});
}
void commit_copies() {
  Unwatched unwatched;
  machine.commit_copies();
}
void wait_copies(int pending) {
  Unwatched unwatched;
  machine.wait_copies(pending);
}
void wait_previous_grid(int line) {
  Unwatched unwatched;
  machine.wait_previous_grid(line);
}
void release_next_grid() {
  machine.release_next_grid();
}
void poll(int line) {
  Unwatched unwatched;
  machine.poll(line);
}
void order_before(void* flag) {
  machine.order_before(flag);
}
void order_after(const void* flag) {
  acquire(flag);
}
void fail(const std::string& what) {
  machine.fail(what);
}

char* shared_base() {
  return machine.current().block->shared->data();
}
}  // namespace inherit_kernels::emulation
