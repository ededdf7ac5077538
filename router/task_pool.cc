#include "router/task_pool.h"

#include <optional>

#include "base/check.h"

namespace nosara::router {

TaskPool::TaskPool(int threads, size_t queue_capacity) : queue_(queue_capacity) {
  CHECK(threads >= 1 && queue_capacity >= 1);
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this] {
      while (std::optional<Task> task = queue_.Pop()) (*task)();
    });
  }
}

void TaskPool::Shutdown() {
  queue_.Close();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace nosara::router
