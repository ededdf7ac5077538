// Which worker gets a request.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "router/cluster_snapshot.h"

namespace nosara::router {

/// What a policy may know about a request.
struct RequestFacts {
  std::string model;
  uint32_t prompt_tokens = 0;
  // Prompt and longest output; workers with a smaller context are left out.
  uint32_t context_tokens = 0;
  // Number of the placement in this router: makes round robin and tie breaking pure functions.
  uint64_t sequence = 0;
  // Workers that refused this request already.
  std::vector<std::string> excluded_addresses;
};

/// A pure function from a request and a snapshot to a worker. Immutable, thread-safe.
///
/// Contract of all policies: only workers that serve the model, have the context and are not
/// excluded are chosen; a stale one only when no fresh one is left. No worker: nothing.
class RoutingPolicy {
 public:
  virtual ~RoutingPolicy() = default;

  /// Index into `cluster.workers`.
  virtual std::optional<size_t> Choose(const RequestFacts& request,
                                       const ClusterSnapshot& cluster) const = 0;
};

/// The worker with the fewest open requests (queued, running, and sent since its report); then the
/// one with the fewest prompt tokens waiting; ties take turns.
class LeastLoadedPolicy final : public RoutingPolicy {
 public:
  std::optional<size_t> Choose(const RequestFacts& request,
                               const ClusterSnapshot& cluster) const override;
};

/// Workers take turns, whatever their load.
class RoundRobinPolicy final : public RoutingPolicy {
 public:
  std::optional<size_t> Choose(const RequestFacts& request,
                               const ClusterSnapshot& cluster) const override;
};

/// The policy of that name: "least_loaded" or "round_robin". INVALID_ARGUMENT for another.
absl::StatusOr<std::unique_ptr<RoutingPolicy>> MakeRoutingPolicy(absl::string_view name);

}  // namespace nosara::router
