// Finds a chain of pages over all stores.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "kvstore/api/store_client.h"
#include "kvstore/client/copy_table.h"
#include "kvstore/client/lease_keeper.h"
#include "kvstore/client/store_set.h"

namespace nosara::kvstore {

/// Thread-safe. Each group of a chain is asked for at its homes, one more than there are copies of
/// a page, so that pages are found which were written before a store joined or while one was away;
/// all groups of one store in one call. Of the copies found the nearest counts: in this process,
/// mapped, then by UCX; among equals in the order of the homes. All of them stay leased, so that a
/// read can fail over without asking anybody.
class ChainLookup final {
 public:
  struct Options {
    size_t replicas = 1;
    const Clock* clock = nullptr;
    StoreSet* stores = nullptr;
    LeaseKeeper* leases = nullptr;
    CopyTable* copies = nullptr;
    /// True when the client is closed.
    std::function<bool()> closed;
    /// Told of pages found with fewer copies than there should be.
    std::function<void(const PageRef& copy, const PageOrigin& origin)> on_short;
  };

  explicit ChainLookup(Options options) : options_(std::move(options)) {}
  ChainLookup(const ChainLookup&) = delete;
  ChainLookup& operator=(const ChainLookup&) = delete;

  /// `keys` from the start of a chain, at least one. A store that does not answer is as one that
  /// has nothing; when none answers its error is the result. `done` runs on any thread, never
  /// inside.
  void Lookup(std::vector<PageKey> keys, StoreClient::Done<LookupResult> done);

 private:
  struct State;
  using StatePtr = std::shared_ptr<State>;

  void Ask(StatePtr lookup, size_t index, int attempts_left);
  void OnAnswer(const StatePtr& lookup, size_t index, uint64_t epoch, absl::Time sent,
                const v1::LookupResponse& response);
  void OnError(const StatePtr& lookup, const absl::Status& status);
  /// One store less to wait for.
  void Count(const StatePtr& lookup);
  void Finish(State& lookup);

  const Options options_;
};

}  // namespace nosara::kvstore
