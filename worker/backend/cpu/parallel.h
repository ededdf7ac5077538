// Threads for the loops of the CPU backend.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"

namespace nosara::worker {

/// Runs loops on a fixed set of threads, the caller's included.
///
/// Run() may be called by one thread at a time. Which thread runs which index is not fixed; so
/// results must not depend on it.
class ParallelFor final {
 public:
  /// `threads` >= 1.
  explicit ParallelFor(int threads);
  ~ParallelFor();
  ParallelFor(const ParallelFor&) = delete;
  ParallelFor& operator=(const ParallelFor&) = delete;

  int threads() const { return static_cast<int>(threads_.size()) + 1; }

  /// Calls body(index, thread) once for each index in [0, count), thread in [0, threads()).
  /// Returns when all calls have.
  void Run(int count, absl::FunctionRef<void(int index, int thread)> body);

 private:
  struct Loop {
    absl::FunctionRef<void(int, int)> body;
    const int count;
    // Relaxed: only hands out indices; mu_ orders the data.
    std::atomic<int> next{0};
  };

  void ThreadMain(int thread);
  static void Work(Loop& loop, int thread);

  absl::Mutex mu_;
  Loop* loop_ ABSL_GUARDED_BY(mu_) = nullptr;
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;
  int busy_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  // Mirrors epoch_ for the short spin before sleeping; release/acquire only as a hint, the loop
  // itself is read under mu_.
  std::atomic<uint64_t> epoch_hint_{0};
  std::vector<std::thread> threads_;
};

}  // namespace nosara::worker
