#include "kvstore/server/eviction_policy.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace nosara::kvstore {
namespace {

using Slot = EvictionPolicy::Slot;
constexpr Slot kNone = std::numeric_limits<Slot>::max();

enum class Place : uint8_t {
  kUnknown,  // no page, or one that was never queued: `main` says where it will go
  kAside,    // came up for eviction and could not go; `main` says from which queue
  kQueued,
};

struct Node {
  Slot newer = kNone;
  Slot older = kNone;
  uint64_t hash = 0;
  uint8_t uses = 0;  // since it was queued, at most kMaxUses; of S3-FIFO
  Place place = Place::kUnknown;
  bool main = false;  // of S3-FIFO: belongs into the main queue
};

/// A doubly linked list through the nodes of all slots.
class Queue final {
 public:
  explicit Queue(std::vector<Node>* nodes) : nodes_(*nodes) {}

  uint64_t size() const { return size_; }
  Slot oldest() const { return oldest_; }

  void PushNewest(Slot slot) { Link(/*older=*/newest_, slot, /*newer=*/kNone); }
  void PushOldest(Slot slot) { Link(/*older=*/kNone, slot, /*newer=*/oldest_); }
  void Remove(Slot slot) {
    Node& node = nodes_[slot];
    (node.newer == kNone ? newest_ : nodes_[node.newer].older) = node.older;
    (node.older == kNone ? oldest_ : nodes_[node.older].newer) = node.newer;
    node.newer = node.older = kNone;
    node.place = Place::kUnknown;
    --size_;
  }

 private:
  void Link(Slot older, Slot slot, Slot newer) {
    Node& node = nodes_[slot];
    node.older = older;
    node.newer = newer;
    (older == kNone ? oldest_ : nodes_[older].newer) = slot;
    (newer == kNone ? newest_ : nodes_[newer].older) = slot;
    node.place = Place::kQueued;
    ++size_;
  }

  std::vector<Node>& nodes_;
  Slot newest_ = kNone;
  Slot oldest_ = kNone;
  uint64_t size_ = 0;
};

class LruPolicy final : public EvictionPolicy {
 public:
  explicit LruPolicy(std::shared_ptr<std::vector<Node>> nodes)
      : shared_(std::move(nodes)), nodes_(*shared_), queue_(&nodes_) {}

  void OnStored(Slot slot, uint64_t hash) override { nodes_[slot].place = Place::kUnknown; }
  void OnUse(Slot slot) override {}
  void OnIdle(Slot slot) override {
    OnRemoved(slot);
    queue_.PushNewest(slot);
  }
  void OnLeaf(Slot slot) override {
    // What was set aside was the oldest, and whatever was used since is newer.
    if (nodes_[slot].place == Place::kAside) queue_.PushOldest(slot);
  }
  void OnRemoved(Slot slot) override {
    if (nodes_[slot].place == Place::kQueued) queue_.Remove(slot);
    nodes_[slot].place = Place::kUnknown;
  }
  std::optional<Slot> TakeVictim(Predicate may_be_evicted) override {
    while (queue_.size() > 0) {
      const Slot slot = queue_.oldest();
      queue_.Remove(slot);
      if (may_be_evicted(slot)) return slot;
      nodes_[slot].place = Place::kAside;
    }
    return std::nullopt;
  }
  bool IsQueued(Slot slot) const override { return nodes_[slot].place == Place::kQueued; }

 private:
  const std::shared_ptr<std::vector<Node>> shared_;
  std::vector<Node>& nodes_;
  Queue queue_;
};

/// The hashes of the pages evicted last, `capacity` of them.
class Ghosts final {
 public:
  explicit Ghosts(uint32_t capacity) : ring_(capacity, 0) {}

  void Add(uint64_t hash) {
    // What is overwritten may have been taken, or added anew, since.
    const auto found = positions_.find(ring_[next_]);
    if (found != positions_.end() && found->second == next_) positions_.erase(found);
    ring_[next_] = hash;
    positions_[hash] = next_;
    next_ = next_ + 1 == ring_.size() ? 0 : next_ + 1;
  }
  /// Forgets the hash; false when it is not known.
  bool Take(uint64_t hash) { return positions_.erase(hash) > 0; }

 private:
  std::vector<uint64_t> ring_;
  absl::flat_hash_map<uint64_t, uint32_t> positions_;  // in ring_
  uint32_t next_ = 0;
};

class S3FifoPolicy final : public EvictionPolicy {
 public:
  explicit S3FifoPolicy(uint32_t num_slots)
      : nodes_(num_slots),
        small_(&nodes_),
        main_(&nodes_),
        small_ghosts_(num_slots),
        main_ghosts_(num_slots),
        small_target_(num_slots / 2) {}

  void OnStored(Slot slot, uint64_t hash) override {
    Node& node = nodes_[slot];
    node = Node();
    node.hash = hash;
    if (main_ghosts_.Take(hash)) {
      node.main = true;
      small_target_ -= std::min<uint64_t>(small_target_, kTargetStep);
    } else if (small_ghosts_.Take(hash)) {
      node.main = true;
      small_target_ = std::min<uint64_t>(nodes_.size(), small_target_ + kTargetStep);
    }
  }
  void OnUse(Slot slot) override {
    Node& node = nodes_[slot];
    if (node.uses < kMaxUses) ++node.uses;
  }
  void OnIdle(Slot slot) override {
    Node& node = nodes_[slot];
    if (node.place == Place::kQueued) return;
    if (node.place == Place::kAside) node.main = true;
    (node.main ? main_ : small_).PushNewest(slot);
  }
  void OnLeaf(Slot slot) override {
    Node& node = nodes_[slot];
    if (node.place == Place::kAside) (node.main ? main_ : small_).PushOldest(slot);
  }
  void OnRemoved(Slot slot) override {
    Node& node = nodes_[slot];
    if (node.place == Place::kQueued) (node.main ? main_ : small_).Remove(slot);
    node.place = Place::kUnknown;
  }
  std::optional<Slot> TakeVictim(Predicate may_be_evicted) override {
    while (small_.size() + main_.size() > 0) {
      const bool from_small =
          main_.size() == 0 || (small_.size() > 0 && small_.size() >= small_target_);
      Queue& queue = from_small ? small_ : main_;
      const Slot slot = queue.oldest();
      Node& node = nodes_[slot];
      queue.Remove(slot);
      if (!may_be_evicted(slot)) {
        node.place = Place::kAside;
      } else if (from_small && node.uses >= kUsesToStay) {
        node.uses = 0;
        node.main = true;
        main_.PushNewest(slot);
      } else if (!from_small && node.uses > 0) {
        --node.uses;
        main_.PushNewest(slot);
      } else {
        (from_small ? small_ghosts_ : main_ghosts_).Add(node.hash);
        return slot;
      }
    }
    return std::nullopt;
  }
  bool IsQueued(Slot slot) const override { return nodes_[slot].place == Place::kQueued; }

 private:
  static constexpr uint8_t kMaxUses = 3;
  static constexpr uint8_t kUsesToStay = 1;
  /// By how many pages one that comes back moves the target.
  static constexpr uint64_t kTargetStep = 4;

  std::vector<Node> nodes_;
  Queue small_;
  Queue main_;
  Ghosts small_ghosts_;  // of pages that left small_
  Ghosts main_ghosts_;
  uint64_t small_target_;  // above this many pages small_ gives way, not main_
};

}  // namespace

absl::StatusOr<EvictionKind> ParseEvictionKind(absl::string_view name) {
  for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
    if (name == EvictionKindName(kind)) return kind;
  }
  return absl::InvalidArgumentError(absl::StrCat("eviction = '", name, "': must be s3fifo or lru"));
}

absl::string_view EvictionKindName(EvictionKind kind) {
  return kind == EvictionKind::kLru ? "lru" : "s3fifo";
}

std::unique_ptr<EvictionPolicy> MakeEvictionPolicy(EvictionKind kind, uint32_t num_slots) {
  if (kind == EvictionKind::kLru) return LruPolicies(num_slots)();
  return std::make_unique<S3FifoPolicy>(num_slots);
}

std::function<std::unique_ptr<EvictionPolicy>()> LruPolicies(uint32_t num_slots) {
  return [nodes = std::make_shared<std::vector<Node>>(num_slots)] {
    return std::make_unique<LruPolicy>(nodes);
  };
}

}  // namespace nosara::kvstore
