// Host memory for pages that a worker has written and the store does not have yet.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace nosara::worker {

/// One page of memory, aligned to 4096 bytes. Goes back to its pool when the last owner lets go.
using PageBuffer = std::shared_ptr<absl::Span<std::byte>>;

/// A bounded pool of page buffers. Thread-safe; must outlive its buffers' last owner's use of
/// Allocate (buffers themselves may outlive the pool).
class PagePool final {
 public:
  /// `page_bytes` > 0; at most `max_pages` are out at any time.
  PagePool(size_t page_bytes, int max_pages);

  /// A pool of the pages that fit into `memory` (4096-byte aligned), which `owner` keeps alive: for
  /// memory that a device can reach.
  PagePool(size_t page_bytes, absl::Span<std::byte> memory, std::shared_ptr<void> owner);
  ~PagePool();

  /// Bytes that a page takes in such memory.
  static size_t RoundedPage(size_t page_bytes);

  /// A zeroed page, or null when all are in use.
  PageBuffer Allocate();

  int max_pages() const { return max_pages_; }
  int in_use() const;

 private:
  struct Shared;
  const int max_pages_;
  const std::shared_ptr<Shared> shared_;
};

}  // namespace nosara::worker
