#include "worker/backend/cpu/parallel.h"

#include "base/check.h"

namespace nosara::worker {

ParallelFor::ParallelFor(int threads) {
  CHECK(threads >= 1);
  for (int thread = 1; thread < threads; ++thread) {
    threads_.emplace_back([this, thread] { ThreadMain(thread); });
  }
}

ParallelFor::~ParallelFor() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    epoch_hint_.fetch_add(1, std::memory_order_release);
  }
  for (std::thread& thread : threads_) thread.join();
}

void ParallelFor::Work(Loop& loop, int thread) {
  for (;;) {
    const int index = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop.count) return;
    loop.body(index, thread);
  }
}

void ParallelFor::Run(int count, absl::FunctionRef<void(int, int)> body) {
  Loop loop{body, count};
  if (threads_.empty() || count <= 1) {
    Work(loop, 0);
    return;
  }
  {
    absl::MutexLock lock(&mu_);
    loop_ = &loop;
    ++epoch_;
    epoch_hint_.store(epoch_, std::memory_order_release);
  }
  Work(loop, 0);
  absl::MutexLock lock(&mu_);
  loop_ = nullptr;  // a thread that comes now finds nothing to do
  mu_.Await(absl::Condition(
      +[](int* busy) { return *busy == 0; }, &busy_));
}

void ParallelFor::ThreadMain(int thread) {
  // Loops follow each other within microseconds while a step runs: a short spin saves the wake-up.
  constexpr int kSpins = 2000;
  uint64_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (epoch_hint_.load(std::memory_order_acquire) != seen) break;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    Loop* loop = nullptr;
    {
      absl::MutexLock lock(&mu_);
      struct Wake {
        ParallelFor* self;
        uint64_t seen;
      } wake{this, seen};
      mu_.Await(absl::Condition(
          +[](Wake* w) ABSL_NO_THREAD_SAFETY_ANALYSIS {
            return w->self->stopping_ || w->self->epoch_ != w->seen;
          },
          &wake));
      if (stopping_) return;
      seen = epoch_;
      loop = loop_;
      if (loop != nullptr) ++busy_;
    }
    if (loop == nullptr) continue;
    Work(*loop, thread);
    absl::MutexLock lock(&mu_);
    --busy_;
  }
}

}  // namespace nosara::worker
