// What a KV store node knows about its slots: keys, generations, leases, eviction order.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kvstore/api/page_key.h"
#include "kvstore/server/eviction_policy.h"

namespace nosara::kvstore {

/// Index over the page slots of one arena. Pure bookkeeping: no locks, no clock, no page bytes;
/// the same calls give the same results. Owned by whoever serialises the calls.
///
/// A slot is free, reserved (being written), stored (visible), discarded (its page was found
/// damaged: nobody finds it, but readers still hold leases) or quarantined (kept from reuse for a
/// while: its reservation was abandoned and a late writer may still write into it, or its page was
/// discarded).
///
/// Invariants, checked by CheckIntegrity():
///  1. each slot is in exactly one state, and the counts of the states add up to num_slots;
///  2. a key has at most one slot, reserved or stored;
///  3. a slot's generation grows by one at each reservation: an old reference never matches;
///  4. a stored page under a live lease is neither evicted nor reused;
///  5. a page is linked to its parent when that is in the index as the page is reserved, otherwise
///     to nothing, so that links cannot form a cycle whatever keys a client names;
///  6. a page is pinned iff it is reserved, leased, held or linked to by a pinned one. All others
///  are
///     evictable, one after the other: a page goes after those that are linked to it, so a chain
///     goes from its tail. The policy chooses among the pages that nobody is linked to.
class PageIndex final {
 public:
  struct Options {
    uint64_t num_slots = 0;
    /// Generation of all slots before their first reservation.
    uint64_t base_generation = 0;
    absl::Duration lease_ttl = absl::Seconds(30);
    absl::Duration quarantine = absl::Seconds(60);
    EvictionKind eviction = EvictionKind::kS3Fifo;
    /// How many pages one namespace may have, stored or being written; 0: no limit. One that is to
    /// get more gives up its own pages first, the least recently leased ones.
    uint64_t namespace_quota = 0;
    /// For these namespaces instead.
    absl::flat_hash_map<PageKey, uint64_t> namespace_quotas;
  };

  struct Page {
    PageKey key;
    uint64_t slot = 0;
    uint64_t generation = 0;
  };

  enum class ReserveState { kReserved, kStored, kBusy };
  struct ReservedPage {
    ReserveState state = ReserveState::kBusy;
    Page page;
  };

  struct ReserveOptions {
    uint64_t request_id = 0;
    /// Whose the new pages are. All zeros: those of the page that the first one hangs on, if that
    /// is in the index.
    PageKey name_space;
  };
  struct NamespacePages {
    PageKey name_space;
    uint64_t pages = 0;  // stored or reserved
    uint64_t quota = 0;  // 0: none
  };

  struct LookupResult {
    std::vector<Page> pages;
    uint64_t lease_id = 0;  // 0: no page, no lease
  };
  struct ReserveResult {
    std::vector<ReservedPage> pages;
    uint64_t lease_id = 0;
  };

  struct Stats {
    uint64_t slots_total = 0;
    uint64_t slots_free = 0;
    uint64_t slots_stored = 0;
    uint64_t slots_reserved = 0;
    uint64_t slots_quarantined = 0;  // and discarded
    uint64_t pages_leased = 0;
    /// Stored pages that could be evicted now.
    uint64_t pages_evictable = 0;
    uint64_t leases = 0;
    uint64_t namespaces = 0;  // that have pages
    uint64_t keys_looked_up = 0;
    uint64_t keys_found = 0;
    uint64_t pages_committed = 0;
    uint64_t pages_evicted = 0;             // to make room
    uint64_t pages_evicted_by_quota = 0;    // to keep their namespace within its quota
    uint64_t pages_evicted_by_request = 0;  // by Evict()
    uint64_t pages_discarded = 0;
    uint64_t leases_expired = 0;
    uint64_t reservations_refused = 0;           // because the store was full
    uint64_t reservations_refused_by_quota = 0;  // because the namespace was
  };

  /// `options.num_slots` is 1 to 2^32 - 1.
  explicit PageIndex(const Options& options);
  PageIndex(const PageIndex&) = delete;
  PageIndex& operator=(const PageIndex&) = delete;

  enum class Scope { kPrefix, kAll };
  /// What is stored of `keys`, leased until now + lease_ttl: the longest prefix, or all.
  LookupResult Lookup(absl::Span<const PageKey> keys, absl::Time now, Scope scope = Scope::kPrefix);

  /// Slots for `keys`, consecutive blocks of a chain behind `parent`. Evicts what it must. All
  /// states are under the one new lease, but for kBusy ones.
  /// RESOURCE_EXHAUSTED: not enough slots are free or evictable, or the namespace's quota leaves no
  /// room and not enough of its own pages are evictable; nothing was reserved or evicted.
  /// INVALID_ARGUMENT: a key occurs twice, or is `parent`.
  ///
  /// `options.request_id`, when not 0, makes a repetition possible: while the lease of a Reserve
  /// with this id lives, another one with the same keys renews that lease and answers what has
  /// become of its pages. INVALID_ARGUMENT: other keys.
  absl::StatusOr<ReserveResult> Reserve(absl::Span<const PageKey> keys, const PageKey& parent,
                                        absl::Time now, const ReserveOptions& options);
  absl::StatusOr<ReserveResult> Reserve(absl::Span<const PageKey> keys, const PageKey& parent,
                                        absl::Time now) {
    return Reserve(keys, parent, now, ReserveOptions());
  }

  /// OK when each page is a live reservation of `lease_id` or was committed under it already.
  /// ABORTED: the lease has ended. NOT_FOUND: no such reservation.
  absl::Status CheckReservations(uint64_t lease_id, absl::Span<const Page> pages, absl::Time now);

  /// Makes reserved pages visible; they stay leased. All or nothing. Errors: CheckReservations().
  absl::Status Commit(uint64_t lease_id, absl::Span<const Page> pages, absl::Time now);

  /// Takes one reservation back into quarantine: its writer wrote nonsense. No-op if it is gone.
  void DropReservation(uint64_t lease_id, const Page& page, absl::Time now);

  /// Evicts up to `count` pages that may be evicted; how many it did.
  uint64_t Evict(uint64_t count, absl::Time now);
  /// The same for pages of one namespace, in no order but that of their chains. Linear in the
  /// number of slots.
  uint64_t EvictNamespace(const PageKey& name_space, uint64_t count, absl::Time now);

  /// Keeps the page stored in `slot` from eviction while its bytes are looked at, which does not
  /// count as a use; none when the slot holds no page. Not while another page is held.
  std::optional<Page> Hold(uint64_t slot);
  /// Ends Hold(). Precondition: a page is held.
  void EndHold();
  /// Takes stored pages out of the index, because their bytes are not what they were; no-op for
  /// those that are not stored as they are named. A slot goes into quarantine when the last lease
  /// on it has ended: who changed its bytes may do so again.
  void Discard(absl::Span<const Page> pages, absl::Time now);

  /// Extends leases to now + lease_ttl; returns those that do not live.
  std::vector<uint64_t> Renew(absl::Span<const uint64_t> lease_ids, absl::Time now);

  /// Ends leases. Their uncommitted reservations become free at once: the caller says that nobody
  /// writes into them any more.
  void Release(absl::Span<const uint64_t> lease_ids, absl::Time now);

  /// Ends expired leases (their reservations go to quarantine), frees slots whose quarantine is
  /// over. Every call that takes a time does this first.
  void Expire(absl::Time now);

  Stats stats() const;
  /// The namespaces with the most pages, those with most first; up to `count`.
  std::vector<NamespacePages> LargestNamespaces(size_t count) const;

  /// The page stored in `slot`; none when the slot holds none, or does not exist.
  std::optional<Page> StoredIn(uint64_t slot) const;

  /// The first broken invariant, as INTERNAL. Linear in the number of slots; for tests.
  absl::Status CheckIntegrity() const;

 private:
  using Slot = EvictionPolicy::Slot;
  static constexpr Slot kNoSlot = std::numeric_limits<Slot>::max();
  enum class State : uint8_t { kFree, kReserved, kStored, kQuarantined, kDiscarded };
  struct Namespace {
    PageKey key;
    uint64_t pages = 0;   // stored or reserved; never 0
    uint64_t pinned = 0;  // of them
    uint64_t quota = 0;
    std::unique_ptr<EvictionPolicy> own;  // orders its pages; null without quota
  };
  struct SlotInfo {
    PageKey key;
    Namespace* name_space = nullptr;  // while keyed
    uint64_t generation = 0;
    uint64_t writer = 0;             // lease of the reservation, while reserved
    uint64_t parent_generation = 0;  // the link holds while this is the generation of `parent`
    Slot parent = kNoSlot;
    uint32_t leases = 0;           // live leases on the stored or discarded page
    uint32_t children = 0;         // pages linked to this one
    uint32_t pinned_children = 0;  // of these, the pinned ones
    State state = State::kFree;
    bool held = false;  // is held_
  };
  struct Lease {
    absl::Time expires;
    std::vector<Slot> pages;  // stored ones; each counts in SlotInfo::leases
    // Slots reserved under this lease. Those committed since are in `pages` too; those dropped have
    // another state, writer or generation.
    std::vector<Page> reservations;
    uint64_t request_id = 0;
    size_t request_hash = 0;  // of keys and parent
  };
  using LeaseMap = absl::flat_hash_map<uint64_t, Lease>;

  static bool IsKeyed(const SlotInfo& info) {
    return info.state == State::kReserved || info.state == State::kStored;
  }
  static bool IsPinned(const SlotInfo& info) {
    return info.state == State::kReserved || info.leases > 0 || info.held ||
           info.pinned_children > 0;
  }
  /// Stored, neither leased nor linked to: may go next.
  bool IsEvictable(Slot slot) const;
  /// The slot of `key`; kNoSlot when it is neither reserved nor stored.
  Slot Find(const PageKey& key) const;
  /// The page that this one is linked to, or kNoSlot.
  Slot ParentOf(const SlotInfo& info) const;
  /// To be called when something that IsPinned() reads has changed: `was` is what it said before.
  /// Goes up the chain as far as that changes others. Where leases cover chains from their heads,
  /// are taken from the head and ended from the tail, it changes nobody else.
  void PinsChanged(Slot slot, bool was);
  void LeasePage(Slot slot, Lease& lease);
  ReserveResult RepeatReserve(uint64_t lease_id, absl::Span<const PageKey> keys, absl::Time now);
  /// A reserved page is linked to `parent`, or no longer.
  void AddReservedChild(Slot parent);
  void RemoveReservedChild(Slot parent);
  /// Evicts the page that `policy` chooses; false when there is none.
  bool EvictOne(EvictionPolicy& policy);
  /// Takes a stored page out of the index; the caller says what the slot becomes.
  void RemoveStored(Slot slot);
  /// Tells the policies that order the page in `slot`.
  template <typename... Args>
  void Tell(void (EvictionPolicy::*event)(Slot, Args...), Slot slot, Args... args) {
    (policy_.get()->*event)(slot, args...);
    Namespace* const name_space = slots_[slot].name_space;
    if (name_space->own != nullptr) (name_space->own.get()->*event)(slot, args...);
  }
  uint64_t QuotaOf(const PageKey& name_space) const;
  /// Evicts so that `count` new pages of the namespace fit. Errors: those of Reserve().
  absl::Status MakeRoom(uint64_t count, const PageKey& name_space);
  /// Keeps pinned_, and that of the page's namespace.
  void CountPin(Slot slot, bool is);
  /// Makes a slot that holds a page findable by its key, or no longer.
  void AddKey(Slot slot, const PageKey& name_space);
  void RemoveKey(Slot slot);
  /// Ends a reservation: its slot leaves the index.
  void Unreserve(Slot slot);
  void Quarantine(Slot slot, absl::Time now);
  bool IsReservation(uint64_t lease_id, const Page& page) const;
  enum class LeaseEnd { kReleased, kExpired };
  void EndLease(LeaseMap::iterator lease, LeaseEnd end, absl::Time now);

  const Options options_;
  std::vector<SlotInfo> slots_;
  std::vector<Slot> free_;  // a stack
  absl::flat_hash_map<PageKey, Slot> by_key_;
  absl::node_hash_map<PageKey, Namespace> namespaces_;
  const std::unique_ptr<EvictionPolicy> policy_;
  const std::function<std::unique_ptr<EvictionPolicy>()> make_own_policy_;
  absl::btree_set<std::pair<absl::Time, Slot>> quarantined_;
  LeaseMap leases_;
  absl::flat_hash_map<uint64_t, uint64_t> requests_;  // request id -> lease
  absl::btree_set<std::pair<absl::Time, uint64_t>> expiries_;
  uint64_t next_lease_ = 1;
  uint64_t stored_ = 0;
  uint64_t reserved_ = 0;
  uint64_t leased_ = 0;     // stored pages under a lease
  uint64_t pinned_ = 0;     // reserved ones too
  uint64_t discarded_ = 0;  // slots
  Slot held_ = kNoSlot;
  Stats counters_;  // only the counters, not the gauges
};

}  // namespace nosara::kvstore
