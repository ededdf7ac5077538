// Reads pages from whichever copy answers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "kvstore/api/layout.h"
#include "kvstore/api/store_client.h"
#include "kvstore/client/copy_table.h"
#include "kvstore/client/store_set.h"
#include "kvstore/client/transfer_thread.h"

namespace nosara::kvstore {

/// Thread-safe. A piece is read from the copy that it names, unless that one's store is in doubt
/// and another copy's is not; where this fails, from the other copies one after the other. A
/// landing buffer goes to the next copy only when the transfer before it is complete.
///
/// A copy has checksums of its own: before the first record of another copy than the one named is
/// read, that copy's prefix is. Copies whose bytes do not match are discarded at their stores.
class FailoverReader final {
 public:
  struct Options {
    PageLayout layout;
    StoreSet* stores = nullptr;
    TransferThread* transfers = nullptr;
    CopyTable* copies = nullptr;
  };
  using Piece = TransferThread::Piece;
  using Done = StoreClient::Done<std::vector<PageRef>>;

  explicit FailoverReader(const Options& options) : options_(options) {}
  FailoverReader(const FailoverReader&) = delete;
  FailoverReader& operator=(const FailoverReader&) = delete;

  /// Reads `pieces`, none of them a write; element i of the answer is the copy that piece i was
  /// read from. On an error no transfer is in flight any more. `done` runs on the transfer thread
  /// or on one of gRPC, never inside.
  void Read(std::vector<Piece> pieces, Done done);

  uint64_t reads_failed_over() const { return failed_over_.load(std::memory_order_relaxed); }
  uint64_t pages_discarded() const { return discarded_.load(std::memory_order_relaxed); }

 private:
  struct State;
  using StatePtr = std::shared_ptr<State>;

  /// Reads the pieces numbered in `todo` from where they point to.
  void Submit(StatePtr read, std::vector<size_t> todo);
  void OnTransferred(const StatePtr& read, const std::vector<size_t>& todo,
                     std::vector<TransferThread::Failure> failures);
  /// Points piece `i` to a copy that was not tried; false when there is none. `live_only`: only to
  /// one whose store is not in doubt.
  enum class Among { kAll, kLive };
  bool Redirect(State& read, size_t i, Among among);
  /// Reads the prefixes that the redirected pieces in `todo` lack checksums of, then the pieces.
  void SubmitRedirected(StatePtr read, std::vector<size_t> todo);
  void Discard(std::vector<PageRef> pages, absl::AnyInvocable<void() &&> then);
  void Finish(const StatePtr& read);

  const Options options_;
  // Only count: relaxed.
  std::atomic<uint64_t> failed_over_{0};
  std::atomic<uint64_t> discarded_{0};
};

}  // namespace nosara::kvstore
