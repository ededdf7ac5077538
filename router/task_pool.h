// Threads for work that is too long for a gRPC callback: parsing and tokenizing prompts.
#pragma once

#include <functional>
#include <thread>
#include <vector>

#include "base/bounded_queue.h"

namespace nosara::router {

/// A fixed number of threads behind one bounded queue. Thread-safe.
///
/// Invariants: (1) a task that was accepted runs exactly once, also during Shutdown; (2) tasks
/// start in the order in which they were accepted.
class TaskPool final {
 public:
  using Task = std::function<void()>;

  /// `threads` and `queue_capacity` are at least 1.
  TaskPool(int threads, size_t queue_capacity);
  ~TaskPool() { Shutdown(); }
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  /// False, and nothing happens, when the queue is full or the pool is shut down. Never blocks.
  [[nodiscard]] bool TrySubmit(Task task) { return queue_.TryPush(std::move(task)); }

  /// Accepts nothing more, runs what was accepted, joins the threads. Idempotent; one caller at a
  /// time, not from a task.
  void Shutdown();

 private:
  BoundedQueue<Task> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace nosara::router
