// Keeps a client's leases alive, and gives them back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "kvstore/api/store_client.h"
#include "kvstore/client/lease_table.h"
#include "kvstore/client/store_set.h"
#include "kvstore/client/transfer_thread.h"

namespace nosara::kvstore {

/// Thread-safe. Renews the leases of each store in batches, by timers of the transfer thread, from
/// the first OnSession() until Close().
class LeaseKeeper final {
 public:
  /// All arguments outlive it.
  LeaseKeeper(const Clock* clock, const StoreSet* stores, TransferThread* transfers)
      : clock_(*clock), stores_(*stores), transfers_(*transfers) {}
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

  /// A lease that `store`, as incarnation `epoch`, granted to a request sent at `sent`.
  LeaseId Add(size_t store, uint64_t epoch, uint64_t server_id, absl::Time sent,
              absl::Duration ttl);
  /// See LeaseTable::Check.
  absl::Status Check(LeaseId lease) const;
  /// Ends leases here and at their stores, as far as these can be reached.
  void Release(absl::Span<const LeaseId> leases);
  /// Ends a lease here only: at its store it expires.
  void Forget(LeaseId lease);
  /// `store` runs as incarnation `epoch`: leases of others are lost, those of this one are renewed.
  void OnSession(size_t store, uint64_t epoch, absl::Duration lease_ttl);
  uint64_t lost() const;

  /// Stops renewing.
  void Close();
  /// Releases everything.
  void ReleaseAll();

 private:
  void Keep(size_t store, uint64_t epoch, absl::Duration lease_ttl);
  void RenewDue(size_t store);
  void OnRenewed(absl::Time sent, const std::vector<LeaseTable::Renewal>& asked,
                 const v1::RenewResponse& response);
  void SendRelease(const std::vector<LeaseTable::ServerLease>& leases);

  const Clock& clock_;
  const StoreSet& stores_;
  TransferThread& transfers_;

  mutable absl::Mutex mu_;
  LeaseTable table_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<size_t, uint64_t> epochs_ ABSL_GUARDED_BY(mu_);  // last known, by store
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace nosara::kvstore
