#include "worker/cache/page_pool.h"

#include <cstdlib>
#include <cstring>

#include "base/check.h"

namespace nosara::worker {

struct PagePool::Shared {
  explicit Shared(size_t page_bytes) : page_bytes(page_bytes) {}
  ~Shared() {
    if (owner != nullptr) return;
    for (std::byte* page : free) std::free(page);
  }

  const size_t page_bytes;
  std::shared_ptr<void> owner;  // of the pages; null: each is its own allocation
  absl::Mutex mu;
  std::vector<std::byte*> free ABSL_GUARDED_BY(mu);
  int in_use ABSL_GUARDED_BY(mu) = 0;
};

size_t PagePool::RoundedPage(size_t page_bytes) { return (page_bytes + 4095) / 4096 * 4096; }

PagePool::PagePool(size_t page_bytes, int max_pages)
    : max_pages_(max_pages), shared_(std::make_shared<Shared>(page_bytes)) {
  CHECK(page_bytes > 0);
}

PagePool::PagePool(size_t page_bytes, absl::Span<std::byte> memory, std::shared_ptr<void> owner)
    : max_pages_(static_cast<int>(memory.size() / RoundedPage(page_bytes))),
      shared_(std::make_shared<Shared>(page_bytes)) {
  CHECK(page_bytes > 0 && owner != nullptr);
  absl::MutexLock lock(&shared_->mu);
  shared_->owner = std::move(owner);
  for (int i = 0; i < max_pages_; ++i) {
    shared_->free.push_back(memory.data() + i * RoundedPage(page_bytes));
  }
}

PagePool::~PagePool() = default;

PageBuffer PagePool::Allocate() {
  std::byte* memory = nullptr;
  {
    absl::MutexLock lock(&shared_->mu);
    if (shared_->in_use >= max_pages_) return nullptr;
    ++shared_->in_use;
    if (!shared_->free.empty()) {
      memory = shared_->free.back();
      shared_->free.pop_back();
    }
  }
  const size_t page_bytes = shared_->page_bytes;
  if (memory == nullptr) {
    memory = static_cast<std::byte*>(std::aligned_alloc(4096, RoundedPage(page_bytes)));
    CHECK(memory != nullptr);
  }
  std::memset(memory, 0, page_bytes);
  return PageBuffer(new absl::Span<std::byte>(memory, page_bytes),
                    [shared = shared_](absl::Span<std::byte>* page) {
                      absl::MutexLock lock(&shared->mu);
                      shared->free.push_back(page->data());
                      --shared->in_use;
                      delete page;
                    });
}

int PagePool::in_use() const {
  absl::MutexLock lock(&shared_->mu);
  return shared_->in_use;
}

}  // namespace nosara::worker
