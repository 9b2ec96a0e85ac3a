// Fibers for the scheduler: a hand-written switch on x86-64 (40 ns), ucontext elsewhere.
#pragma once

#include "guarded.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifdef INHERIT_KERNELS_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace inherit_kernels::emulation {

#if defined(__x86_64__)
// Saves the callee-saved registers on the running stack, its pointer in *save, and goes on with another stack.
extern "C" void inherit_kernels_switch(void** save, void* next);
asm(R"(
.text
.hidden inherit_kernels_switch
.globl inherit_kernels_switch
.type inherit_kernels_switch, @function
inherit_kernels_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size inherit_kernels_switch, .-inherit_kernels_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(const Guarded& stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack.end()) - 8;  // six registers, the entry, and a null return address
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { inherit_kernels_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(const Guarded& stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.data();
    context.uc_stack.ss_size = static_cast<size_t>(stack.end() - stack.data());
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// ThreadSanitizer's view: switches order nothing, `acquire` and `release` stand for CUDA's own synchronisation.
#ifdef INHERIT_KERNELS_TSAN
constexpr bool kSanitized = true;
inline void acquire(const void* p) {
  __tsan_acquire(const_cast<void*>(p));
}
inline void release(const void* p) {
  __tsan_release(const_cast<void*>(p));
}
inline void* sanitizer_current() {
  return __tsan_get_current_fiber();
}
inline void* sanitizer_create() {
  return __tsan_create_fiber(0);
}
inline void sanitizer_destroy(void* fiber) {
  __tsan_destroy_fiber(fiber);
}
inline void sanitizer_change(void* fiber) {
  __tsan_switch_to_fiber(fiber, 1);
}
// The scheduler's own containers reach the sanitizer through operator new and delete: not the kernels' doing.
inline void sanitizer_look_away() {
  AnnotateIgnoreWritesBegin("", 0);
}
inline void sanitizer_look_again() {
  AnnotateIgnoreWritesEnd("", 0);
}
#else
constexpr bool kSanitized = false;
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void* sanitizer_current() {
  return nullptr;
}
inline void* sanitizer_create() {
  return nullptr;
}
inline void sanitizer_destroy(void*) {}
inline void sanitizer_change(void*) {}
inline void sanitizer_look_away() {}
inline void sanitizer_look_again() {}
#endif

}  // namespace inherit_kernels::emulation
