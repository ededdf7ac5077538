#include "kvstore/server/page_index.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nosara::kvstore {

PageIndex::PageIndex(const Options& options) : options_(options) {
  CHECK(options.num_slots >= 1 && options.num_slots <= std::numeric_limits<Slot>::max());
  slots_.resize(options.num_slots);
  free_.reserve(options.num_slots);
  // The stack gives low slots first: pages lie together while the arena fills.
  for (uint64_t slot = options.num_slots; slot-- > 0;) {
    slots_[slot].generation = options.base_generation;
    free_.push_back(static_cast<Slot>(slot));
  }
}

PageIndex::LookupResult PageIndex::Lookup(absl::Span<const PageKey> keys, absl::Time now,
                                          Scope scope) {
  Expire(now);
  counters_.keys_looked_up += keys.size();
  LookupResult result;
  Lease lease;
  for (const PageKey& key : keys) {
    const auto found = by_key_.find(key);
    if (found == by_key_.end() || slots_[found->second].state != State::kStored) {
      if (scope == Scope::kAll) continue;
      break;
    }
    LeasePage(found->second, lease);
    result.pages.push_back({key, found->second, slots_[found->second].generation});
  }
  counters_.keys_found += result.pages.size();
  if (result.pages.empty()) return result;
  result.lease_id = next_lease_++;
  lease.expires = now + options_.lease_ttl;
  expiries_.insert({lease.expires, result.lease_id});
  leases_.emplace(result.lease_id, std::move(lease));
  return result;
}

absl::StatusOr<PageIndex::ReserveResult> PageIndex::Reserve(absl::Span<const PageKey> keys,
                                                            const PageKey& parent, absl::Time now) {
  Expire(now);
  absl::flat_hash_set<PageKey> distinct;
  std::vector<size_t> missing;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!distinct.insert(keys[i]).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("keys[", i, "] = ", keys[i].ToHex(), ": occurs twice"));
    }
    // A page behind itself could never be evicted.
    if (keys[i] == parent) {
      return absl::InvalidArgumentError(
          absl::StrCat("keys[", i, "] = ", keys[i].ToHex(), ": is its own parent"));
    }
    if (!by_key_.contains(keys[i])) missing.push_back(i);
  }

  // Lease what is stored and count the new pages as children first, so that making room can evict
  // neither them nor the page they hang on.
  ReserveResult result;
  result.lease_id = next_lease_++;
  Lease lease;
  lease.expires = now + options_.lease_ttl;
  for (const PageKey& key : keys) {
    ReservedPage page;
    page.page.key = key;
    const auto found = by_key_.find(key);
    if (found != by_key_.end() && slots_[found->second].state == State::kStored) {
      LeasePage(found->second, lease);
      page.state = ReserveState::kStored;
      page.page.slot = found->second;
      page.page.generation = slots_[found->second].generation;
    }
    result.pages.push_back(page);
  }
  const auto parent_of = [&](size_t i) { return i == 0 ? parent : keys[i - 1]; };
  for (const size_t i : missing) AddChild(parent_of(i));

  const bool hopeless = missing.size() > free_.size() + stored_ - leased_;
  while (!hopeless && free_.size() < missing.size() && EvictOne()) {
  }
  if (free_.size() < missing.size()) {
    ++counters_.reservations_refused;
    for (const size_t i : missing) RemoveChild(parent_of(i));
    const absl::Status refused = absl::ResourceExhaustedError(
        absl::StrCat("store full: ", missing.size(), " pages asked for, ", free_.size(),
                     " slots of ", slots_.size(), " free, ", leased_, " leased, ", reserved_,
                     " being written, ", quarantined_.size(), " in quarantine"));
    expiries_.insert({lease.expires, result.lease_id});
    const auto inserted = leases_.emplace(result.lease_id, std::move(lease)).first;
    EndLease(inserted, LeaseEnd::kReleased, now);
    return refused;
  }

  for (const size_t i : missing) {
    const Slot slot = free_.back();
    free_.pop_back();
    SlotInfo& info = slots_[slot];
    info.key = keys[i];
    info.parent = parent_of(i);
    ++info.generation;
    info.state = State::kReserved;
    info.writer = result.lease_id;
    ++reserved_;
    by_key_.emplace(keys[i], slot);
    result.pages[i].state = ReserveState::kReserved;
    result.pages[i].page.slot = slot;
    result.pages[i].page.generation = info.generation;
    lease.reservations.push_back(result.pages[i].page);
  }
  expiries_.insert({lease.expires, result.lease_id});
  leases_.emplace(result.lease_id, std::move(lease));
  return result;
}

bool PageIndex::IsReservation(uint64_t lease_id, const Page& page) const {
  const SlotInfo& info = slots_[page.slot];
  return info.state == State::kReserved && info.writer == lease_id &&
         info.generation == page.generation && info.key == page.key;
}

absl::Status PageIndex::CheckReservations(uint64_t lease_id, absl::Span<const Page> pages,
                                          absl::Time now) {
  Expire(now);
  if (!leases_.contains(lease_id)) {
    return absl::AbortedError(absl::StrCat("lease ", lease_id, ": has ended"));
  }
  for (const Page& page : pages) {
    if (page.slot >= slots_.size()) {
      return absl::NotFoundError(
          absl::StrCat("slot ", page.slot, ": the store has ", slots_.size(), " slots"));
    }
    const SlotInfo& info = slots_[page.slot];
    const bool committed = info.state == State::kStored && info.writer == lease_id &&
                           info.generation == page.generation && info.key == page.key;
    if (!committed && !IsReservation(lease_id, page)) {
      return absl::NotFoundError(absl::StrCat("page ", page.key.ToHex(), " slot ", page.slot,
                                              " generation ", page.generation,
                                              ": not reserved under lease ", lease_id));
    }
  }
  return absl::OkStatus();
}

absl::Status PageIndex::Commit(uint64_t lease_id, absl::Span<const Page> pages, absl::Time now) {
  RETURN_IF_ERROR(CheckReservations(lease_id, pages, now));
  Lease& lease = leases_.find(lease_id)->second;
  for (const Page& page : pages) {
    SlotInfo& info = slots_[page.slot];
    if (info.state == State::kStored) continue;  // a repeated Commit
    info.state = State::kStored;
    --reserved_;
    ++stored_;
    ++counters_.pages_committed;
    LeasePage(static_cast<Slot>(page.slot), lease);
  }
  return absl::OkStatus();
}

void PageIndex::DropReservation(uint64_t lease_id, const Page& page, absl::Time now) {
  Expire(now);
  if (page.slot >= slots_.size() || !IsReservation(lease_id, page)) return;
  Unreserve(static_cast<Slot>(page.slot));
  Quarantine(static_cast<Slot>(page.slot), now);
}

void PageIndex::Discard(absl::Span<const Page> pages, absl::Time now) {
  Expire(now);
  for (const Page& page : pages) {
    if (page.slot >= slots_.size()) continue;
    const Slot slot = static_cast<Slot>(page.slot);
    SlotInfo& info = slots_[slot];
    if (info.state != State::kStored || info.generation != page.generation ||
        info.key != page.key) {
      continue;
    }
    info.state = info.leases > 0 ? State::kDiscarded : State::kFree;
    RefreshEvictable(slot);
    --stored_;
    ++counters_.pages_discarded;
    by_key_.erase(info.key);
    if (info.leases > 0) {
      --leased_;
      ++discarded_;
    } else {
      free_.push_back(slot);
    }
    RemoveChild(info.parent);
  }
}

std::vector<uint64_t> PageIndex::Renew(absl::Span<const uint64_t> lease_ids, absl::Time now) {
  Expire(now);
  std::vector<uint64_t> lost;
  for (const uint64_t id : lease_ids) {
    const auto found = leases_.find(id);
    if (found == leases_.end()) {
      lost.push_back(id);
      continue;
    }
    expiries_.erase({found->second.expires, id});
    found->second.expires = now + options_.lease_ttl;
    expiries_.insert({found->second.expires, id});
  }
  return lost;
}

void PageIndex::Release(absl::Span<const uint64_t> lease_ids, absl::Time now) {
  Expire(now);
  for (const uint64_t id : lease_ids) {
    const auto found = leases_.find(id);
    if (found != leases_.end()) EndLease(found, LeaseEnd::kReleased, now);
  }
}

void PageIndex::Expire(absl::Time now) {
  while (!expiries_.empty() && expiries_.begin()->first <= now) {
    ++counters_.leases_expired;
    EndLease(leases_.find(expiries_.begin()->second), LeaseEnd::kExpired, now);
  }
  while (!quarantined_.empty() && quarantined_.begin()->first <= now) {
    const Slot slot = quarantined_.begin()->second;
    quarantined_.erase(quarantined_.begin());
    slots_[slot].state = State::kFree;
    free_.push_back(slot);
  }
}

void PageIndex::EndLease(LeaseMap::iterator lease, LeaseEnd end, absl::Time now) {
  const uint64_t id = lease->first;
  expiries_.erase({lease->second.expires, id});
  ++use_counter_;
  for (const Slot slot : lease->second.pages) {
    SlotInfo& info = slots_[slot];
    if (--info.leases > 0) continue;
    if (info.state == State::kDiscarded) {
      --discarded_;
      info.state = State::kFree;
      free_.push_back(slot);
      continue;
    }
    --leased_;
    info.last_use = use_counter_;
    RefreshEvictable(slot);
  }
  for (const Page& page : lease->second.reservations) {
    if (!IsReservation(id, page)) continue;  // committed or dropped since
    const Slot slot = static_cast<Slot>(page.slot);
    Unreserve(slot);
    if (end == LeaseEnd::kExpired) {
      Quarantine(slot, now);
    } else {
      slots_[slot].state = State::kFree;
      free_.push_back(slot);
    }
  }
  leases_.erase(lease);
}

void PageIndex::LeasePage(Slot slot, Lease& lease) {
  lease.pages.push_back(slot);
  if (++slots_[slot].leases == 1) ++leased_;
  RefreshEvictable(slot);
}

void PageIndex::RefreshEvictable(Slot slot) {
  SlotInfo& info = slots_[slot];
  const bool evictable =
      info.state == State::kStored && info.leases == 0 && !children_.contains(info.key);
  if (evictable == info.evictable) return;
  info.evictable = evictable;
  if (evictable) {
    evictable_.insert({info.last_use, slot});
  } else {
    evictable_.erase({info.last_use, slot});
  }
}

void PageIndex::RefreshEvictable(const PageKey& key) {
  const auto found = by_key_.find(key);
  if (found != by_key_.end()) RefreshEvictable(found->second);
}

void PageIndex::AddChild(const PageKey& parent) {
  if (++children_[parent] == 1) RefreshEvictable(parent);
}

void PageIndex::RemoveChild(const PageKey& parent) {
  const auto found = children_.find(parent);
  if (--found->second > 0) return;
  children_.erase(found);
  RefreshEvictable(parent);
}

bool PageIndex::EvictOne() {
  if (evictable_.empty()) return false;
  const Slot slot = evictable_.begin()->second;
  evictable_.erase(evictable_.begin());
  SlotInfo& info = slots_[slot];
  info.evictable = false;
  info.state = State::kFree;
  --stored_;
  ++counters_.pages_evicted;
  by_key_.erase(info.key);
  free_.push_back(slot);
  RemoveChild(info.parent);
  return true;
}

void PageIndex::Unreserve(Slot slot) {
  SlotInfo& info = slots_[slot];
  --reserved_;
  by_key_.erase(info.key);
  info.state = State::kFree;
  RemoveChild(info.parent);
}

void PageIndex::Quarantine(Slot slot, absl::Time now) {
  slots_[slot].state = State::kQuarantined;
  quarantined_.insert({now + options_.quarantine, slot});
}

PageIndex::Stats PageIndex::stats() const {
  Stats stats = counters_;
  stats.slots_total = slots_.size();
  stats.slots_free = free_.size();
  stats.slots_stored = stored_;
  stats.slots_reserved = reserved_;
  stats.slots_quarantined = quarantined_.size();
  stats.slots_discarded = discarded_;
  stats.pages_leased = leased_;
  stats.leases = leases_.size();
  return stats;
}

absl::Status PageIndex::CheckIntegrity() const {
  const auto broken = [](absl::string_view what, uint64_t slot) {
    return absl::InternalError(absl::StrCat("page index: ", what, " (slot ", slot, ")"));
  };
  std::vector<uint32_t> leases(slots_.size(), 0);
  for (const auto& [id, lease] : leases_) {
    if (!expiries_.contains({lease.expires, id})) return broken("lease without expiry", id);
    for (const Slot slot : lease.pages) ++leases[slot];
  }
  if (expiries_.size() != leases_.size()) return broken("expiry without lease", 0);

  const absl::flat_hash_set<Slot> free(free_.begin(), free_.end());
  if (free.size() != free_.size()) return broken("slot twice in the free list", 0);
  absl::flat_hash_map<PageKey, uint32_t> children;
  uint64_t stored = 0, reserved = 0, quarantined = 0, leased = 0, evictable = 0, keyed = 0,
           discarded = 0;
  for (Slot slot = 0; slot < slots_.size(); ++slot) {
    const SlotInfo& info = slots_[slot];
    if (free.contains(slot) != (info.state == State::kFree)) return broken("free list", slot);
    if (leases[slot] != info.leases) return broken("count of leases", slot);
    if (info.leases > 0) {
      leased += info.state == State::kStored;
      if (info.state != State::kStored && info.state != State::kDiscarded) {
        return broken("lease on a slot without page", slot);
      }
    }
    discarded += info.state == State::kDiscarded;
    if (info.state == State::kDiscarded && info.leases == 0) return broken("discarded", slot);
    stored += info.state == State::kStored;
    reserved += info.state == State::kReserved;
    quarantined += info.state == State::kQuarantined;
    evictable += info.evictable;
    if (info.state == State::kStored || info.state == State::kReserved) {
      ++keyed;
      ++children[info.parent];
      const auto found = by_key_.find(info.key);
      if (found == by_key_.end() || found->second != slot) return broken("key", slot);
    }
    if (info.state == State::kReserved && !leases_.contains(info.writer)) {
      return broken("reservation without lease", slot);
    }
    if (info.generation < options_.base_generation) return broken("generation", slot);
  }
  if (keyed != by_key_.size()) return broken("key without slot", 0);
  if (stored != stored_ || reserved != reserved_ || leased != leased_) return broken("counts", 0);
  if (discarded != discarded_) return broken("count of discarded slots", 0);
  if (quarantined != quarantined_.size()) return broken("count of quarantined slots", 0);
  if (evictable != evictable_.size()) return broken("count of evictable slots", 0);
  if (children != children_) return broken("children", 0);
  for (Slot slot = 0; slot < slots_.size(); ++slot) {
    const SlotInfo& info = slots_[slot];
    const bool expected =
        info.state == State::kStored && info.leases == 0 && !children.contains(info.key);
    if (expected != info.evictable) return broken("evictable", slot);
    if (expected && !evictable_.contains({info.last_use, slot})) return broken("eviction", slot);
  }
  for (const auto& [until, slot] : quarantined_) {
    if (slots_[slot].state != State::kQuarantined) return broken("quarantine", slot);
  }
  return absl::OkStatus();
}

}  // namespace nosara::kvstore
