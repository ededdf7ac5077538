#include "kvstore/client/copy_table.h"

#include <algorithm>
#include <utility>

namespace nosara::kvstore {
namespace {

bool Same(const PageRef& a, const PageRef& b) {
  return a.store == b.store && a.slot == b.slot && a.generation == b.generation;
}

}  // namespace

void CopyTable::Add(const PageRef& page, LeaseId lease, const PageOrigin& origin) {
  absl::MutexLock lock(&mu_);
  Entry& entry = pages_[page.key];
  entry.origin = origin;
  entry.copies.push_back({page, lease, nullptr});
  by_lease_[lease.value].push_back(page.key);
}

void CopyTable::Remove(absl::Span<const LeaseId> leases) {
  absl::MutexLock lock(&mu_);
  for (const LeaseId lease : leases) {
    const auto keys = by_lease_.find(lease.value);
    if (keys == by_lease_.end()) continue;
    for (const PageKey& key : keys->second) {
      const auto found = pages_.find(key);
      if (found == pages_.end()) continue;
      std::erase_if(found->second.copies, [&](const Copy& copy) { return copy.lease == lease; });
      if (found->second.copies.empty()) pages_.erase(found);
    }
    by_lease_.erase(keys);
  }
}

std::vector<CopyTable::Copy> CopyTable::CopiesOf(const PageKey& key) const {
  absl::MutexLock lock(&mu_);
  std::vector<Copy> distinct;
  const auto found = pages_.find(key);
  if (found == pages_.end()) return distinct;
  for (const Copy& copy : found->second.copies) {
    const auto same = std::find_if(distinct.begin(), distinct.end(),
                                   [&](const Copy& other) { return Same(copy.page, other.page); });
    if (same == distinct.end()) {
      distinct.push_back(copy);
    } else if (same->checksums == nullptr) {
      same->checksums = copy.checksums;
    }
  }
  return distinct;
}

std::vector<std::pair<PageRef, PageOrigin>> CopyTable::OtherCopies(StoreId store) const {
  absl::MutexLock lock(&mu_);
  std::vector<std::pair<PageRef, PageOrigin>> others;
  for (const auto& [key, entry] : pages_) {
    bool there = false;
    const PageRef* other = nullptr;
    for (const Copy& copy : entry.copies) {
      if (copy.page.store == store) {
        there = true;
      } else {
        other = &copy.page;
      }
    }
    if (there && other != nullptr) others.emplace_back(*other, entry.origin);
  }
  return others;
}

void CopyTable::SetChecksums(const PageRef& page, Checksums checksums) {
  absl::MutexLock lock(&mu_);
  const auto found = pages_.find(page.key);
  if (found == pages_.end()) return;
  for (Copy& copy : found->second.copies) {
    if (Same(copy.page, page)) copy.checksums = checksums;
  }
}

size_t CopyTable::size() const {
  absl::MutexLock lock(&mu_);
  return pages_.size();
}

}  // namespace nosara::kvstore
