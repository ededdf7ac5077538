// The leases that a client holds, by its own reckoning.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kvstore/api/store_client.h"

namespace nosara::kvstore {

/// Pure bookkeeping: no locks, no clock.
///
/// Invariant: a lease counts as held for no longer than the store holds it. The store counts its
/// time to live from when it answers; the client from when it asked, less an eighth, which covers
/// clocks that run at different rates and reads that are on their way when the lease ends.
class LeaseTable final {
 public:
  struct ServerLease {
    StoreId store;
    uint64_t epoch = 0;
    uint64_t id = 0;  // the store's number
  };
  struct Renewal {
    LeaseId lease;
    uint64_t epoch = 0;
    uint64_t server_id = 0;
  };

  /// `sent`: when the request that got the lease was sent.
  LeaseId Add(const ServerLease& lease, absl::Time sent, absl::Duration ttl);

  /// OK while held; ABORTED when lost, expired, released or never there.
  absl::Status Check(LeaseId lease, absl::Time now) const;

  /// Held leases of `store` whose last renewal was sent at least a third of their time to live ago,
  /// at most `max`; their next renewal counts from now. Marks expired ones as lost first.
  std::vector<Renewal> TakeDue(StoreId store, absl::Time now, size_t max);

  /// A renewal sent at `sent` was granted. Lost leases stay lost.
  void Renewed(LeaseId lease, absl::Time sent, absl::Duration ttl);
  void Lost(LeaseId lease);
  /// All leases of `store` that are not of its incarnation `epoch` are lost.
  void LoseOthers(StoreId store, uint64_t epoch);

  /// Forgets the lease; what to release at the store, if it was still held.
  std::optional<ServerLease> Remove(LeaseId lease);
  /// Forgets all leases; those still held.
  std::vector<ServerLease> RemoveAll();

  uint64_t lost() const { return lost_; }

 private:
  struct Entry {
    ServerLease lease;
    absl::Time expires;
    absl::Time renew;
    absl::Duration ttl;
    bool lost = false;
  };
  void MarkLost(Entry& entry);

  absl::flat_hash_map<uint64_t, Entry> entries_;
  uint64_t next_ = 1;
  uint64_t lost_ = 0;
};

}  // namespace nosara::kvstore
