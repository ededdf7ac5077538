// Which page a full store gives up first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace nosara::kvstore {

/// The order in which stored pages are evicted. The index says what happens to its pages; the
/// policy keeps an order of them and knows neither keys, leases nor chains. A page may be evicted
/// when the index says so (no lease, no stored page behind it): what comes up for eviction and may
/// not go is set aside until OnIdle() or OnLeaf() brings it back, so that nobody searches past it
/// again. All calls take O(1), amortised. One thread.
///
/// Invariant: a page that may be evicted is queued.
class EvictionPolicy {
 public:
  using Slot = uint32_t;
  using Predicate = absl::FunctionRef<bool(Slot)>;

  virtual ~EvictionPolicy() = default;

  /// `slot`, which holds no page so far, holds one now, under a lease. `hash`: of the page's key;
  /// equal keys have equal hashes.
  virtual void OnStored(Slot slot, uint64_t hash) = 0;
  /// A client has asked for the page and has a lease on it now.
  virtual void OnUse(Slot slot) = 0;
  /// The page's last lease has ended. Of a chain the last block comes first.
  virtual void OnIdle(Slot slot) = 0;
  /// The last page behind a page without leases is gone.
  virtual void OnLeaf(Slot slot) = 0;
  /// The page is gone, and not by TakeVictim().
  virtual void OnRemoved(Slot slot) = 0;
  /// Chooses the page to evict and forgets it; none when no page may be evicted.
  virtual std::optional<Slot> TakeVictim(Predicate may_be_evicted) = 0;
  /// Whether TakeVictim() will come to the page. For tests.
  virtual bool IsQueued(Slot slot) const = 0;
};

enum class EvictionKind { kLru, kS3Fifo };

/// "lru" or "s3fifo"; INVALID_ARGUMENT otherwise.
absl::StatusOr<EvictionKind> ParseEvictionKind(absl::string_view name);
absl::string_view EvictionKindName(EvictionKind kind);

/// For slots 0 to `num_slots` - 1.
///
/// kLru: the page whose last lease ended first goes first.
///
/// kS3Fifo: S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23). New
/// pages pass through a small queue; those that were asked for meanwhile go on into the main queue,
/// the others leave, and only their hashes are remembered for a while: who comes back while
/// remembered goes straight into the main queue. So what is used once (a scan) passes through the
/// small queue and leaves the main one alone. Differences to the paper, with their reasons:
///  * pages enter when their first lease ends (before, they cannot be evicted anyway);
///  * one use while in the small queue is enough to go on, not two: the next turn of a conversation
///    is one use;
///  * a page that comes up for eviction while it is leased is in use: it enters the main queue when
///    the lease ends;
///  * the size of the small queue adapts itself, as in ARC (Megiddo and Modha, FAST'03): a page
///  that
///    comes back after it left the small queue says that this is too small, one that left the main
///    queue that it is too large. The hashes of both are kept apart, as many of each as there are
///    slots, or the small queue's would push out the others.
/// docs/benchmarks/README.md has what each costs and gains.
std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(EvictionKind kind, uint32_t num_slots);

/// Makes kLru policies that share the slots 0 to `num_slots` - 1, and the memory for them: at any
/// time at most one of them knows a slot.
std::function<std::unique_ptr<EvictionPolicy>()> LruPolicies(uint32_t num_slots);

}  // namespace nosara::kvstore
