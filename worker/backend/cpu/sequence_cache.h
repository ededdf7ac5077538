// The working part of one sequence's KV cache in host memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kvstore/api/layout.h"
#include "kvstore/api/store_client.h"
#include "worker/backend/backend.h"
#include "worker/cache/page_pool.h"
#include "worker/cache/slot_table.h"
#include "worker/model/dtype.h"

namespace nosara::worker {

/// Memory aligned to 128 bytes, not initialised.
class AlignedBytes final {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t bytes);
  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

/// Compressed keys and pooled scores of one record (layer, KV head): nosa.md section 4.
struct WindowIndex {
  std::vector<float> keys;    // [W, D], values of the model's dtype
  std::vector<float> scores;  // [W]
};

/// A sequence: pages being written, slots with copies of stored records, and the window index.
///
/// Each block is in one of three states: open or finished (it has a page here), or stored (it has
/// a PageRef; its records may or may not lie in slots). Owned by the engine thread; during a step
/// the backend's threads read it, and write disjoint parts (one record each).
///
/// Invariants: (1) only the last block may be incomplete, and it has a page; (2) a slot holds the
/// bytes of the stored record that its table says; (3) `blocks.size() == ceil(tokens / 64)` between
/// steps.
class SequenceCache final {
 public:
  struct Block {
    PageBuffer page;                         // while open or finished
    std::optional<kvstore::PageRef> ref;     // once stored
    std::vector<uint64_t> record_checksums;  // once stored
  };

  /// `slots` per record, `max_pages` = open and finished blocks at any time (at least 2).
  SequenceCache(const kvstore::PageLayout& layout, DType dtype, int64_t max_tokens, int slots,
                int max_pages);

  /// Bytes that a sequence of these limits needs at most.
  static size_t BytesNeeded(const kvstore::PageLayout& layout, int64_t max_tokens, int slots,
                            int max_pages);

  int64_t tokens() const { return tokens_; }
  int64_t max_tokens() const { return max_tokens_; }
  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  int pages_held() const { return pages_held_; }
  /// Tokens that PrepareAppend would accept now.
  int64_t Headroom() const;

  /// Gets pages for `count` more tokens; they count as present from then on.
  /// Precondition: count <= Headroom().
  absl::Status PrepareAppend(int64_t count, PagePool& pool);

  /// The finished blocks among those that the last PrepareAppend touched, ascending.
  std::vector<FinishedBlock> TakeFinished();

  void BindPages(absl::Span<const BoundPage> pages);
  void CommitBlock(int block, const kvstore::PageRef& ref, absl::Span<const uint64_t> checksums);

  /// The bytes of a record that need not be fetched; null where they must be.
  const std::byte* Resident(int record, int block) const;
  /// The bytes of a record of an open block, to be written.
  std::byte* Writable(int record, int block);
  std::byte* WritablePage(int block) { return blocks_[block].page->data(); }

  const Block& block(int block) const { return blocks_[block]; }
  WindowIndex& windows(int record) { return windows_[record]; }
  SlotTable& table(int record) { return tables_[record]; }
  std::byte* slot_data(int record, SlotId slot) const;

  void CheckIntegrity() const;

 private:
  const kvstore::PageLayout layout_;
  const DType dtype_;
  const int64_t max_tokens_;
  const int slots_;
  const int max_pages_;

  int64_t tokens_ = 0;
  int64_t unreported_from_ = 0;  // first block that TakeFinished has not reported
  int pages_held_ = 0;
  std::vector<Block> blocks_;
  std::vector<WindowIndex> windows_;  // [records]
  std::vector<SlotTable> tables_;     // [records]
  AlignedBytes slot_memory_;          // [records, slots, record_bytes]
};

}  // namespace nosara::worker
