// Stores pages: reserve, write one-sidedly, commit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "kvstore/api/store_client.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/store_set.h"
#include "kvstore/client/transfer_thread.h"

namespace nosara::kvstore {

/// The page that a store's answer gives for key `expected`; INTERNAL when it names another.
absl::StatusOr<PageRef> ParsePage(const v1::Page& page, const PageKey& expected, size_t store);

/// Thread-safe. A write that meets pages which another client is writing stores the rest, then asks
/// again, with growing delays, for all of them: the last answer has every page under one lease.
class PageWriter final {
 public:
  using Done = StoreClient::Done<WriteResult>;

  struct Options {
    PageLayout layout;
    /// How long to wait for other writers; ABORTED after.
    absl::Duration busy_timeout;
    const Clock* clock = nullptr;
    const StoreSet* stores = nullptr;
    LeaseKeeper* leases = nullptr;
    TransferThread* transfers = nullptr;
  };

  explicit PageWriter(const Options& options) : options_(options) {}
  PageWriter(const PageWriter&) = delete;
  PageWriter& operator=(const PageWriter&) = delete;

  /// 1 to 1,024 pages of the layout's size. `done` runs on any thread, never inside.
  /// `parent`: key of the page before the first one. The result is one copy, under one lease.
  void Write(size_t store, const PageKey& parent, const PageKey& name_space,
             std::vector<PageWrite> pages, Done done);

  /// Writes under way give up at their next step.
  void Close();

  uint64_t pages_written() const { return pages_written_.load(std::memory_order_relaxed); }
  uint64_t pages_already_stored() const {
    return pages_already_stored_.load(std::memory_order_relaxed);
  }

 private:
  struct State;
  using StatePtr = std::shared_ptr<State>;

  void Reserve(StatePtr write);
  void OnReserved(StatePtr write, absl::Time sent, absl::StatusOr<v1::ReserveResponse> response);
  absl::Status ParseReserved(State& write, const v1::ReserveResponse& response);
  void WriteReserved(StatePtr write);
  void Commit(StatePtr write);
  void FinishAttempt(StatePtr write);
  void WaitForOthers(StatePtr write);
  void Fail(StatePtr write, absl::Status status);
  StoreConnection& store(const State& write) const;
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  const Options options_;
  // Acquire and release: who sees it set also sees the connections being cancelled.
  std::atomic<bool> closed_{false};
  // Counters only count: relaxed.
  std::atomic<uint64_t> pages_written_{0};
  std::atomic<uint64_t> pages_already_stored_{0};
};

}  // namespace nosara::kvstore
