#include "kvstore/server/page_index.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace nosara::kvstore {

PageIndex::PageIndex(const Options& options)
    : options_(options),
      policy_(MakeEvictionPolicy(options.eviction, static_cast<uint32_t>(options.num_slots))),
      make_own_policy_(LruPolicies(options.namespace_quota > 0 || !options.namespace_quotas.empty()
                                       ? static_cast<uint32_t>(options.num_slots)
                                       : 0)) {
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
    const Slot slot = Find(key);
    if (slot == kNoSlot || slots_[slot].state != State::kStored) {
      if (scope == Scope::kAll) continue;
      break;
    }
    LeasePage(slot, lease);
    Tell(&EvictionPolicy::OnUse, slot);
    result.pages.push_back({key, slot, slots_[slot].generation});
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
                                                            const PageKey& parent, absl::Time now,
                                                            const ReserveOptions& options) {
  Expire(now);
  const size_t request_hash = absl::HashOf(keys, parent);
  if (const auto repeated = requests_.find(options.request_id); repeated != requests_.end()) {
    if (leases_.find(repeated->second)->second.request_hash != request_hash) {
      return absl::InvalidArgumentError(
          absl::StrCat("request_id = ", options.request_id, ": was used for other keys"));
    }
    return RepeatReserve(repeated->second, keys, now);
  }
  absl::flat_hash_set<PageKey> distinct;
  std::vector<size_t> missing;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!distinct.insert(keys[i]).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("keys[", i, "] = ", keys[i].ToHex(), ": occurs twice"));
    }
    if (keys[i] == parent) {
      return absl::InvalidArgumentError(
          absl::StrCat("keys[", i, "] = ", keys[i].ToHex(), ": is its own parent"));
    }
    if (!by_key_.contains(keys[i])) missing.push_back(i);
  }

  // Lease what is stored, and hold the page that the first new one hangs on, before making room:
  // that must evict none of them.
  ReserveResult result;
  result.lease_id = next_lease_++;
  Lease lease;
  lease.expires = now + options_.lease_ttl;
  lease.request_id = options.request_id;
  lease.request_hash = request_hash;
  for (const PageKey& key : keys) {
    ReservedPage page;
    page.page.key = key;
    const Slot slot = Find(key);
    if (slot != kNoSlot && slots_[slot].state == State::kStored) {
      LeasePage(slot, lease);
      Tell(&EvictionPolicy::OnUse, slot);
      page.state = ReserveState::kStored;
      page.page.slot = slot;
      page.page.generation = slots_[slot].generation;
    }
    result.pages.push_back(page);
  }
  const Slot anchor = !missing.empty() && missing.front() == 0 ? Find(parent) : kNoSlot;
  AddReservedChild(anchor);
  const PageKey name_space = options.name_space == PageKey() && anchor != kNoSlot
                                 ? slots_[anchor].name_space->key
                                 : options.name_space;
  const absl::Status room = MakeRoom(missing.size(), name_space);
  if (!room.ok()) {
    RemoveReservedChild(anchor);
    expiries_.insert({lease.expires, result.lease_id});
    const auto inserted = leases_.emplace(result.lease_id, std::move(lease)).first;
    EndLease(inserted, LeaseEnd::kReleased, now);
    return room;
  }

  for (const size_t i : missing) {
    const Slot slot = free_.back();
    free_.pop_back();
    SlotInfo& info = slots_[slot];
    info.key = keys[i];
    info.parent = i == 0 ? anchor : Find(keys[i - 1]);
    if (info.parent != kNoSlot) info.parent_generation = slots_[info.parent].generation;
    if (i > 0) AddReservedChild(info.parent);
    ++info.generation;
    info.state = State::kReserved;
    info.writer = result.lease_id;
    info.children = 0;
    info.pinned_children = 0;
    ++reserved_;
    AddKey(slot, name_space);
    CountPin(slot, true);
    result.pages[i].state = ReserveState::kReserved;
    result.pages[i].page.slot = slot;
    result.pages[i].page.generation = info.generation;
    lease.reservations.push_back(result.pages[i].page);
  }
  if (options.request_id != 0) requests_.emplace(options.request_id, result.lease_id);
  expiries_.insert({lease.expires, result.lease_id});
  leases_.emplace(result.lease_id, std::move(lease));
  return result;
}

uint64_t PageIndex::QuotaOf(const PageKey& name_space) const {
  const auto found = options_.namespace_quotas.find(name_space);
  return found == options_.namespace_quotas.end() ? options_.namespace_quota : found->second;
}

absl::Status PageIndex::MakeRoom(uint64_t count, const PageKey& name_space) {
  const auto found = namespaces_.find(name_space);
  Namespace* const own = found == namespaces_.end() ? nullptr : &found->second;
  const uint64_t quota = QuotaOf(name_space);
  const uint64_t own_pages = own == nullptr ? 0 : own->pages;
  const uint64_t own_evictable = own == nullptr ? 0 : own->pages - own->pinned;
  const uint64_t over =
      quota > 0 && own_pages + count > quota ? own_pages + count - quota : uint64_t{0};
  const auto refused = [&] {
    ++counters_.reservations_refused_by_quota;
    return absl::ResourceExhaustedError(absl::StrCat(
        "namespace ", name_space.ToHex(), " full: ", count, " pages asked for, ", own_pages,
        " of a quota of ", quota, " there, ", own_evictable, " of them evictable"));
  };
  if (over > own_evictable) return refused();
  const uint64_t evictable = stored_ + reserved_ - pinned_;
  if (count > free_.size() + evictable) {
    ++counters_.reservations_refused;
    return absl::ResourceExhaustedError(absl::StrCat(
        "store full: ", count, " pages asked for, ", free_.size(), " of ", slots_.size(),
        " slots free and ", evictable, " evictable; ", leased_, " leased, ", reserved_,
        " being written, ", quarantined_.size() + discarded_, " in quarantine"));
  }
  for (uint64_t i = 0; i < over; ++i) {
    // Pages of another namespace hang on those of this one: only a client that lies about its
    // namespace brings that about.
    if (own->own == nullptr || !EvictOne(*own->own)) return refused();
    ++counters_.pages_evicted_by_quota;
    // With its last page the namespace goes.
    if (i + 1 < over && !namespaces_.contains(name_space)) return refused();
  }
  for (; free_.size() < count; ++counters_.pages_evicted) CHECK(EvictOne(*policy_));
  return absl::OkStatus();
}

PageIndex::ReserveResult PageIndex::RepeatReserve(uint64_t lease_id, absl::Span<const PageKey> keys,
                                                  absl::Time now) {
  Renew({&lease_id, 1}, now);
  Lease& lease = leases_.find(lease_id)->second;
  const absl::flat_hash_set<Slot> leased(lease.pages.begin(), lease.pages.end());
  ReserveResult result;
  result.lease_id = lease_id;
  for (const PageKey& key : keys) {
    ReservedPage page;  // busy: another's, or a reservation of this lease that was dropped
    page.page.key = key;
    const Slot slot = Find(key);
    if (slot != kNoSlot && slots_[slot].state == State::kStored) {
      // Another's at first, and committed since.
      if (!leased.contains(slot)) LeasePage(slot, lease);
      page.state = ReserveState::kStored;
    } else if (slot != kNoSlot && slots_[slot].writer == lease_id) {
      page.state = ReserveState::kReserved;
    }
    if (page.state != ReserveState::kBusy) {
      page.page.slot = slot;
      page.page.generation = slots_[slot].generation;
    }
    result.pages.push_back(page);
  }
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
    const Slot slot = static_cast<Slot>(page.slot);
    // Leased before it is no longer reserved: it is pinned throughout.
    LeasePage(slot, lease);
    info.state = State::kStored;
    --reserved_;
    ++stored_;
    ++counters_.pages_committed;
    Tell<uint64_t>(&EvictionPolicy::OnStored, slot, absl::HashOf(info.key));
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
    const std::optional<Page> stored = StoredIn(page.slot);
    if (!stored.has_value() || stored->generation != page.generation || stored->key != page.key) {
      continue;
    }
    const Slot slot = static_cast<Slot>(page.slot);
    RemoveStored(slot);
    ++counters_.pages_discarded;
    if (slots_[slot].leases > 0) {
      slots_[slot].state = State::kDiscarded;
      --leased_;
      ++discarded_;
    } else {
      Quarantine(slot, now);
    }
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
  // From the tail of the chain: see EvictionPolicy::OnIdle() and PinsChanged().
  for (auto it = lease->second.pages.rbegin(); it != lease->second.pages.rend(); ++it) {
    SlotInfo& info = slots_[*it];
    if (--info.leases > 0) continue;
    if (info.state == State::kDiscarded) {
      --discarded_;
      Quarantine(*it, now);
      continue;
    }
    --leased_;
    PinsChanged(*it, /*was=*/true);
    Tell(&EvictionPolicy::OnIdle, *it);
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
  if (lease->second.request_id != 0) requests_.erase(lease->second.request_id);
  leases_.erase(lease);
}

void PageIndex::AddKey(Slot slot, const PageKey& name_space) {
  by_key_.emplace(slots_[slot].key, slot);
  const auto [found, is_new] = namespaces_.try_emplace(name_space);
  Namespace& own = found->second;
  if (is_new) {
    own.key = name_space;
    own.quota = QuotaOf(name_space);
    if (own.quota > 0) own.own = make_own_policy_();
  }
  ++own.pages;
  slots_[slot].name_space = &own;
}

void PageIndex::RemoveKey(Slot slot) {
  by_key_.erase(slots_[slot].key);
  Namespace* const own = std::exchange(slots_[slot].name_space, nullptr);
  if (--own->pages == 0) namespaces_.erase(PageKey(own->key));
}

void PageIndex::CountPin(Slot slot, bool is) {
  is ? ++pinned_ : --pinned_;
  Namespace& own = *slots_[slot].name_space;
  is ? ++own.pinned : --own.pinned;
}

PageIndex::Slot PageIndex::Find(const PageKey& key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? kNoSlot : found->second;
}

PageIndex::Slot PageIndex::ParentOf(const SlotInfo& info) const {
  if (info.parent == kNoSlot) return kNoSlot;
  const SlotInfo& parent = slots_[info.parent];
  // A reservation can go while others hang on it; evicted pages have nobody linked to them.
  return IsKeyed(parent) && parent.generation == info.parent_generation ? info.parent : kNoSlot;
}

void PageIndex::PinsChanged(Slot slot, bool was) {
  while (slot != kNoSlot) {
    const bool is = IsPinned(slots_[slot]);
    if (is == was) return;
    CountPin(slot, is);
    slot = ParentOf(slots_[slot]);
    if (slot == kNoSlot) return;
    was = IsPinned(slots_[slot]);
    is ? ++slots_[slot].pinned_children : --slots_[slot].pinned_children;
  }
}

void PageIndex::LeasePage(Slot slot, Lease& lease) {
  const bool was = IsPinned(slots_[slot]);
  lease.pages.push_back(slot);
  if (++slots_[slot].leases == 1) ++leased_;
  PinsChanged(slot, was);
}

void PageIndex::AddReservedChild(Slot parent) {
  if (parent == kNoSlot) return;
  SlotInfo& info = slots_[parent];
  const bool was = IsPinned(info);
  ++info.children;
  ++info.pinned_children;
  PinsChanged(parent, was);
}

void PageIndex::RemoveReservedChild(Slot parent) {
  if (parent == kNoSlot) return;
  SlotInfo& info = slots_[parent];
  --info.children;
  --info.pinned_children;
  PinsChanged(parent, /*was=*/true);
  if (IsEvictable(parent)) Tell(&EvictionPolicy::OnLeaf, parent);
}

bool PageIndex::IsEvictable(Slot slot) const {
  const SlotInfo& info = slots_[slot];
  return info.state == State::kStored && info.leases == 0 && info.children == 0 && !info.held;
}

bool PageIndex::EvictOne(EvictionPolicy& policy) {
  const std::optional<Slot> victim =
      policy.TakeVictim([this](Slot slot) { return IsEvictable(slot); });
  if (!victim.has_value()) return false;
  RemoveStored(*victim);
  slots_[*victim].state = State::kFree;
  free_.push_back(*victim);
  return true;
}

void PageIndex::RemoveStored(Slot slot) {
  SlotInfo& info = slots_[slot];
  const Slot parent = ParentOf(info);
  const bool pinned = IsPinned(info);
  --stored_;
  Tell(&EvictionPolicy::OnRemoved, slot);
  if (pinned) CountPin(slot, false);
  RemoveKey(slot);
  info.state = State::kFree;
  if (parent == kNoSlot) return;
  SlotInfo& parent_info = slots_[parent];
  const bool was = IsPinned(parent_info);
  --parent_info.children;
  if (pinned) --parent_info.pinned_children;
  PinsChanged(parent, was);
  if (IsEvictable(parent)) Tell(&EvictionPolicy::OnLeaf, parent);
}

uint64_t PageIndex::Evict(uint64_t count, absl::Time now) {
  Expire(now);
  count = std::min(count, stored_ + reserved_ - pinned_);
  for (uint64_t i = 0; i < count; ++i) CHECK(EvictOne(*policy_));
  counters_.pages_evicted_by_request += count;
  return count;
}

uint64_t PageIndex::EvictNamespace(const PageKey& name_space, uint64_t count, absl::Time now) {
  Expire(now);
  uint64_t evicted = 0;
  for (Slot slot = 0; slot < slots_.size(); ++slot) {
    // Up the chain from a page that nobody is linked to.
    for (Slot next = slot; next != kNoSlot && evicted < count && IsEvictable(next) &&
                           slots_[next].name_space->key == name_space;
         ++evicted) {
      const Slot parent = ParentOf(slots_[next]);
      RemoveStored(next);
      free_.push_back(next);
      next = parent;
    }
  }
  counters_.pages_evicted_by_request += evicted;
  return evicted;
}

std::optional<PageIndex::Page> PageIndex::Hold(uint64_t slot) {
  CHECK(held_ == kNoSlot);
  const std::optional<Page> page = StoredIn(slot);
  if (!page.has_value()) return std::nullopt;
  held_ = static_cast<Slot>(slot);
  const bool was = IsPinned(slots_[held_]);
  slots_[held_].held = true;
  PinsChanged(held_, was);
  return page;
}

void PageIndex::EndHold() {
  CHECK(held_ != kNoSlot);
  const Slot slot = held_;
  held_ = kNoSlot;
  slots_[slot].held = false;
  // Discarded meanwhile: no longer in the index.
  if (slots_[slot].state != State::kStored) return;
  PinsChanged(slot, /*was=*/true);
  // Its turn may have come, and passed it, meanwhile.
  if (IsEvictable(slot)) Tell(&EvictionPolicy::OnLeaf, slot);
}

void PageIndex::Unreserve(Slot slot) {
  SlotInfo& info = slots_[slot];
  const Slot parent = ParentOf(info);
  --reserved_;
  CountPin(slot, false);
  RemoveKey(slot);
  info.state = State::kFree;
  RemoveReservedChild(parent);
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
  stats.slots_quarantined = quarantined_.size() + discarded_;
  stats.pages_leased = leased_;
  stats.pages_evictable = stored_ + reserved_ - pinned_;
  stats.leases = leases_.size();
  stats.namespaces = namespaces_.size();
  return stats;
}

std::vector<PageIndex::NamespacePages> PageIndex::LargestNamespaces(size_t count) const {
  std::vector<NamespacePages> all;
  all.reserve(namespaces_.size());
  for (const auto& [key, own] : namespaces_) all.push_back({key, own.pages, own.quota});
  count = std::min(count, all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(count), all.end(),
                    [](const NamespacePages& a, const NamespacePages& b) {
                      return a.pages != b.pages ? a.pages > b.pages
                                                : a.name_space.bytes < b.name_space.bytes;
                    });
  all.resize(count);
  return all;
}

std::optional<PageIndex::Page> PageIndex::StoredIn(uint64_t slot) const {
  if (slot >= slots_.size() || slots_[slot].state != State::kStored) return std::nullopt;
  return Page{slots_[slot].key, slot, slots_[slot].generation};
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
  for (const auto& [request_id, id] : requests_) {
    const auto lease = leases_.find(id);
    if (lease == leases_.end() || lease->second.request_id != request_id) {
      return broken("request without lease", request_id);
    }
  }
  if (expiries_.size() != leases_.size()) return broken("expiry without lease", 0);

  const absl::flat_hash_set<Slot> free(free_.begin(), free_.end());
  if (free.size() != free_.size()) return broken("slot twice in the free list", 0);
  absl::flat_hash_map<PageKey, std::pair<uint64_t, uint64_t>> namespaces;  // pages, pinned
  std::vector<uint32_t> children(slots_.size(), 0), pinned_children(slots_.size(), 0);
  uint64_t stored = 0, reserved = 0, quarantined = 0, leased = 0, pinned = 0, discarded = 0;
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
    if (info.held != (slot == held_)) return broken("held", slot);
    discarded += info.state == State::kDiscarded;
    if (info.state == State::kDiscarded && info.leases == 0) return broken("discarded", slot);
    stored += info.state == State::kStored;
    reserved += info.state == State::kReserved;
    quarantined += info.state == State::kQuarantined;
    if (IsKeyed(info)) {
      if (Find(info.key) != slot) return broken("key", slot);
      auto& [pages, pinned_pages] = namespaces[info.name_space->key];
      ++pages;
      pinned_pages += IsPinned(info);
      pinned += IsPinned(info);
      const Slot parent = ParentOf(info);
      if (parent != kNoSlot) {
        ++children[parent];
        pinned_children[parent] += IsPinned(info);
      }
    }
    if (info.state == State::kReserved && !leases_.contains(info.writer)) {
      return broken("reservation without lease", slot);
    }
    if (info.generation < options_.base_generation) return broken("generation", slot);
  }
  if (namespaces.size() != namespaces_.size()) return broken("namespaces", 0);
  for (const auto& [key, own] : namespaces_) {
    const auto found = namespaces.find(key);
    if (found == namespaces.end() || found->second != std::pair(own.pages, own.pinned) ||
        own.key != key) {
      return broken("namespace", own.pages);
    }
  }
  if (stored + reserved != by_key_.size()) return broken("key without slot", 0);
  if (stored != stored_ || reserved != reserved_ || leased != leased_ || pinned != pinned_ ||
      discarded != discarded_) {
    return broken("counts", 0);
  }
  if (quarantined != quarantined_.size()) return broken("count of quarantined slots", 0);
  for (Slot slot = 0; slot < slots_.size(); ++slot) {
    const SlotInfo& info = slots_[slot];
    if (!IsKeyed(info)) continue;
    if (children[slot] != info.children) return broken("count of children", slot);
    if (pinned_children[slot] != info.pinned_children) return broken("pinned children", slot);
    if (!IsEvictable(slot)) continue;
    const EvictionPolicy* const own = info.name_space->own.get();
    if (!policy_->IsQueued(slot) || (own != nullptr && !own->IsQueued(slot))) {
      return broken("eviction", slot);
    }
  }
  for (const auto& [until, slot] : quarantined_) {
    if (slots_[slot].state != State::kQuarantined) return broken("quarantine", slot);
  }
  return absl::OkStatus();
}

}  // namespace nosara::kvstore
