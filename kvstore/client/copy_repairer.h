// Restores copies of pages that stores have lost.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "kvstore/api/layout.h"
#include "kvstore/client/copy_table.h"
#include "kvstore/client/failover_reader.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/page_writer.h"
#include "kvstore/client/store_set.h"
#include "kvstore/client/transfer_thread.h"

namespace nosara::kvstore {

/// Reads pages that have too few copies, one at a time and no faster than `bytes_per_second`, and
/// writes them to the homes that should have them. Nobody waits for it and it keeps no leases: a
/// page that is gone when its turn comes is left out.
///
/// Thread-safe.
class CopyRepairer final {
 public:
  /// Pages that may wait; more are dropped. They are found again by the next look-up.
  static constexpr size_t kMaxWaiting = 16384;

  struct Options {
    PageLayout layout;
    size_t replicas = 1;
    /// Of pages read; 0: nothing is repaired.
    uint64_t bytes_per_second = 0;
    StoreSet* stores = nullptr;
    TransferThread* transfers = nullptr;
    FailoverReader* reader = nullptr;
    PageWriter* writer = nullptr;
    LeaseKeeper* leases = nullptr;
  };

  explicit CopyRepairer(const Options& options) : options_(options) {}
  CopyRepairer(const CopyRepairer&) = delete;
  CopyRepairer& operator=(const CopyRepairer&) = delete;

  /// `page` is a copy of a page that has too few. A page that waits already is not taken twice.
  void Add(const PageRef& page, const PageOrigin& origin);

  /// What waits is dropped; what runs ends soon.
  void Close();
  /// Waits until nothing runs. After Close().
  void WaitIdle();

  /// Copies written.
  uint64_t copies_repaired() const { return repaired_.load(std::memory_order_relaxed); }

 private:
  struct Repair;
  using RepairPtr = std::shared_ptr<Repair>;

  void StartNext();
  void ReadRecords(RepairPtr repair);
  void WriteNext(RepairPtr repair);
  void Finish(const RepairPtr& repair);
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !running_; }

  const Options options_;
  std::atomic<uint64_t> repaired_{0};  // relaxed: only counts

  absl::Mutex mu_;
  std::deque<RepairPtr> waiting_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<PageKey> keys_ ABSL_GUARDED_BY(mu_);  // of those that wait
  /// One is under way, or the pause after it.
  bool running_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace nosara::kvstore
