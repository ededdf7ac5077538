// Places groups of pages on the stores, in as many copies as there should be.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvstore/api/store_client.h"
#include "kvstore/client/copy_table.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/page_writer.h"
#include "kvstore/client/store_set.h"

namespace nosara::kvstore {

/// Thread-safe. The pages of one call are written group by group and copy by copy: each copy is
/// sealed in the same memory for another slot, and nobody waits for a write but whoever wants the
/// memory back, which is what bounds the writes in flight. The nearest copy is written last and is
/// the one that the result names.
///
/// For a copy that a store does not take, the home after the others is tried, where look-ups look
/// too; what is missing then is counted. A group without any copy fails the call.
class ReplicaWriter final {
 public:
  struct Options {
    /// Copies of each page, where there are so many stores; 1 or more.
    size_t replicas = 1;
    StoreSet* stores = nullptr;
    LeaseKeeper* leases = nullptr;
    CopyTable* copies = nullptr;
    PageWriter* writer = nullptr;
  };

  explicit ReplicaWriter(const Options& options) : options_(options) {}
  ReplicaWriter(const ReplicaWriter&) = delete;
  ReplicaWriter& operator=(const ReplicaWriter&) = delete;

  /// See StoreClient::Write. `done` runs on any thread, never inside.
  void Write(ChainPosition position, std::vector<PageWrite> pages,
             StoreClient::Done<WriteResult> done);

  uint64_t copies_missing() const { return copies_missing_.load(std::memory_order_relaxed); }

 private:
  struct State;
  using StatePtr = std::shared_ptr<State>;

  void StartGroup(StatePtr write);
  void WriteCopy(StatePtr write);
  void OnCopy(const StatePtr& write, absl::StatusOr<WriteResult> copy);
  void FinishGroup(StatePtr write);

  const Options options_;
  // Only counts: relaxed.
  std::atomic<uint64_t> copies_missing_{0};
};

}  // namespace nosara::kvstore
