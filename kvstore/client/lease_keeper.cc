#include "kvstore/client/lease_keeper.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"

namespace nosara::kvstore {
namespace {

constexpr size_t kMaxRenewalsPerCall = 65536;

StoreId Id(size_t store) { return StoreId{static_cast<uint32_t>(store)}; }

}  // namespace

LeaseId LeaseKeeper::Add(size_t store, uint64_t epoch, uint64_t server_id, absl::Time sent,
                         absl::Duration ttl) {
  absl::MutexLock lock(&mu_);
  return table_.Add({Id(store), epoch, server_id}, sent, ttl);
}

absl::Status LeaseKeeper::Check(LeaseId lease) const {
  absl::MutexLock lock(&mu_);
  return table_.Check(lease, clock_.Now());
}

void LeaseKeeper::Release(absl::Span<const LeaseId> leases) {
  std::vector<LeaseTable::ServerLease> held;
  {
    absl::MutexLock lock(&mu_);
    for (const LeaseId lease : leases) {
      if (const auto removed = table_.Remove(lease)) held.push_back(*removed);
    }
  }
  SendRelease(held);
}

void LeaseKeeper::Forget(LeaseId lease) {
  absl::MutexLock lock(&mu_);
  table_.Remove(lease);
}

uint64_t LeaseKeeper::lost() const {
  absl::MutexLock lock(&mu_);
  return table_.lost();
}

void LeaseKeeper::OnSession(size_t store, uint64_t epoch, absl::Duration lease_ttl) {
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || epochs_[store] == epoch) return;  // the same incarnation: renewals go on
    epochs_[store] = epoch;
    table_.LoseOthers(Id(store), epoch);
  }
  transfers_.Run([this, store, epoch, lease_ttl] { Keep(store, epoch, lease_ttl); });
}

void LeaseKeeper::Keep(size_t store, uint64_t epoch, absl::Duration lease_ttl) {
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || epochs_[store] != epoch) return;
  }
  // On a doubtful connection too: the answer tells, and leases are precious.
  RenewDue(store);
  const absl::Duration period = std::clamp(lease_ttl / 12, absl::Milliseconds(5), absl::Seconds(1));
  transfers_.RunAfter(period, [=, this] { Keep(store, epoch, lease_ttl); });
}

void LeaseKeeper::RenewDue(size_t store) {
  const absl::Time sent = clock_.Now();
  std::vector<LeaseTable::Renewal> due;
  {
    absl::MutexLock lock(&mu_);
    due = table_.TakeDue(Id(store), sent, kMaxRenewalsPerCall);
  }
  if (due.empty()) return;
  const uint64_t epoch = due.front().epoch;
  v1::RenewRequest request;
  request.set_epoch(epoch);
  std::vector<LeaseTable::Renewal> asked;
  for (const LeaseTable::Renewal& renewal : due) {
    // Leases of another incarnation than the first one's are lost as soon as GetInfo says so.
    if (renewal.epoch != epoch) continue;
    request.add_lease_ids(renewal.server_id);
    asked.push_back(renewal);
  }
  stores_.at(store).control().Renew(
      std::move(request), [this, store, epoch, sent,
                           asked = std::move(asked)](absl::StatusOr<v1::RenewResponse> response) {
        if (response.ok()) {
          OnRenewed(sent, asked, *response);
        } else if (IsConnectionError(response.status())) {
          stores_.at(store).Doubt(epoch);
        }
      });
}

void LeaseKeeper::OnRenewed(absl::Time sent, const std::vector<LeaseTable::Renewal>& asked,
                            const v1::RenewResponse& response) {
  const absl::flat_hash_set<uint64_t> lost(response.lost_lease_ids().begin(),
                                           response.lost_lease_ids().end());
  absl::MutexLock lock(&mu_);
  for (const LeaseTable::Renewal& renewal : asked) {
    if (lost.contains(renewal.server_id)) {
      table_.Lost(renewal.lease);
    } else {
      table_.Renewed(renewal.lease, sent, absl::Milliseconds(response.lease_ttl_ms()));
    }
  }
}

void LeaseKeeper::SendRelease(const std::vector<LeaseTable::ServerLease>& leases) {
  for (size_t store = 0; store < stores_.size(); ++store) {
    v1::ReleaseRequest request;
    for (const LeaseTable::ServerLease& lease : leases) {
      if (lease.store.value != store) continue;
      request.set_epoch(lease.epoch);
      request.add_lease_ids(lease.id);
    }
    // What cannot be released expires.
    if (request.lease_ids_size() > 0) {
      stores_.at(store).control().Release(std::move(request),
                                          [](absl::StatusOr<v1::ReleaseResponse>) {});
    }
  }
}

void LeaseKeeper::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
}

void LeaseKeeper::ReleaseAll() {
  std::vector<LeaseTable::ServerLease> held;
  {
    absl::MutexLock lock(&mu_);
    held = table_.RemoveAll();
  }
  SendRelease(held);
}

}  // namespace nosara::kvstore
