// Memory that ends at a guard page.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

namespace inherit_kernels::emulation {

// Memory whose last byte (rounded up to `alignment`) lies before a page that may not be touched, and whose first page
// is preceded by another. Fresh pages every time: ThreadSanitizer forgets what happened in them.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    size_t used = (bytes + alignment - 1) / alignment * alignment;
    size_t pages = (used + page_ - 1) / page_ + 2;
    length_ = pages * page_;
    void* p = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<char*>(p);
    if (mprotect(first_, page_, PROT_NONE) || mprotect(first_ + length_ - page_, page_, PROT_NONE)) {
      munmap(first_, length_);
      throw std::bad_alloc();
    }
    data_ = first_ + length_ - page_ - used;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(first_, length_); }

  char* data() const { return data_; }
  char* end() const { return first_ + length_ - page_; }
  bool guards(const void* p) const { return p >= first_ && p < first_ + length_; }

 private:
  char *first_, *data_;
  size_t length_, page_;
};

}  // namespace inherit_kernels::emulation
