// The stores that a client knows, and in which order a group of pages is offered to them.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "kvstore/api/page_key.h"
#include "kvstore/client/store_connection.h"

namespace nosara::kvstore {

/// Owns the connections. A store keeps its number (StoreId) and its connection for the client's
/// life, also when it is no member any more: what is leased there can still be read.
///
/// Thread-safe.
class StoreSet final {
 public:
  /// Stores that one client may meet in its life, the departed ones included.
  static constexpr size_t kMaxStores = 1024;

  StoreSet() = default;
  StoreSet(const StoreSet&) = delete;
  StoreSet& operator=(const StoreSet&) = delete;

  /// Makes `members` (addresses, distinct) the stores that groups are placed on; `connect` makes
  /// the connection of one that was never met, with the number given. False: too many were met, the
  /// members are as before. An empty list is none at all: the members are as before. Calls of this
  /// one must not overlap.
  bool SetMembers(absl::Span<const std::string> members,
                  const std::function<std::unique_ptr<StoreConnection>(
                      size_t store, const std::string& address)>& connect);

  /// Stores met so far; their numbers are below.
  size_t size() const { return size_.load(std::memory_order_acquire); }
  StoreConnection& at(size_t store) const { return *connections_[store]; }

  /// The members in the order of RankStores that are live (StoreConnection::live), at most `count`;
  /// when none is, the first `count` members: there is nothing better to try.
  std::vector<size_t> Homes(const PageKey& group, size_t count) const;

  std::vector<size_t> members() const;

 private:
  // Written before size_ grows beyond them, constant after.
  std::array<std::unique_ptr<StoreConnection>, kMaxStores> connections_;
  // Release: who sees a number below sees its connection.
  std::atomic<size_t> size_{0};

  mutable absl::Mutex mu_;
  std::vector<std::string> names_ ABSL_GUARDED_BY(mu_);  // of the members
  std::vector<size_t> members_ ABSL_GUARDED_BY(mu_);     // their numbers
};

}  // namespace nosara::kvstore
