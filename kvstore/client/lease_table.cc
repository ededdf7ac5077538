#include "kvstore/client/lease_table.h"

#include "absl/strings/str_cat.h"

namespace nosara::kvstore {
namespace {

absl::Time Expiry(absl::Time sent, absl::Duration ttl) { return sent + ttl - ttl / 8; }

}  // namespace

LeaseId LeaseTable::Add(const ServerLease& lease, absl::Time sent, absl::Duration ttl) {
  const LeaseId id{next_++};
  entries_.emplace(id.value, Entry{lease, Expiry(sent, ttl), sent + ttl / 3, ttl, false});
  return id;
}

absl::Status LeaseTable::Check(LeaseId lease, absl::Time now) const {
  const auto found = entries_.find(lease.value);
  if (found == entries_.end()) {
    return absl::AbortedError(absl::StrCat("lease ", lease.value, ": not held"));
  }
  if (found->second.lost || now >= found->second.expires) {
    return absl::AbortedError(absl::StrCat("lease ", lease.value, ": lost"));
  }
  return absl::OkStatus();
}

std::vector<LeaseTable::Renewal> LeaseTable::TakeDue(StoreId store, absl::Time now, size_t max) {
  std::vector<Renewal> due;
  for (auto& [id, entry] : entries_) {
    if (!(entry.lease.store == store) || entry.lost) continue;
    if (now >= entry.expires) {
      MarkLost(entry);
    } else if (now >= entry.renew && due.size() < max) {
      entry.renew = now + entry.ttl / 3;
      due.push_back({LeaseId{id}, entry.lease.epoch, entry.lease.id});
    }
  }
  return due;
}

void LeaseTable::Renewed(LeaseId lease, absl::Time sent, absl::Duration ttl) {
  const auto found = entries_.find(lease.value);
  if (found == entries_.end() || found->second.lost) return;
  found->second.expires = Expiry(sent, ttl);
  found->second.renew = sent + ttl / 3;
  found->second.ttl = ttl;
}

void LeaseTable::MarkLost(Entry& entry) {
  if (entry.lost) return;
  entry.lost = true;
  ++lost_;
}

void LeaseTable::Lost(LeaseId lease) {
  const auto found = entries_.find(lease.value);
  if (found != entries_.end()) MarkLost(found->second);
}

void LeaseTable::LoseOthers(StoreId store, uint64_t epoch) {
  for (auto& [id, entry] : entries_) {
    if (entry.lease.store == store && entry.lease.epoch != epoch) MarkLost(entry);
  }
}

std::optional<LeaseTable::ServerLease> LeaseTable::Remove(LeaseId lease) {
  const auto found = entries_.find(lease.value);
  if (found == entries_.end()) return std::nullopt;
  const Entry entry = found->second;
  entries_.erase(found);
  if (entry.lost) return std::nullopt;
  return entry.lease;
}

std::vector<LeaseTable::ServerLease> LeaseTable::RemoveAll() {
  std::vector<ServerLease> held;
  for (const auto& [id, entry] : entries_) {
    if (!entry.lost) held.push_back(entry.lease);
  }
  entries_.clear();
  return held;
}

}  // namespace nosara::kvstore
