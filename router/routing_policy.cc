#include "router/routing_policy.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"

namespace nosara::router {
namespace {

// Indices of the workers that may take the request, all of the best trust there is.
std::vector<size_t> Candidates(const RequestFacts& request, const ClusterSnapshot& cluster) {
  std::vector<size_t> candidates;
  Trust best = Trust::kGone;
  for (size_t i = 0; i < cluster.workers.size(); ++i) {
    const WorkerState& worker = cluster.workers[i];
    if (!worker.Serves(request.model)) continue;
    if (worker.load.max_context_tokens < request.context_tokens) continue;
    const auto& excluded = request.excluded_addresses;
    if (std::find(excluded.begin(), excluded.end(), worker.address) != excluded.end()) continue;
    if (worker.trust > best) continue;
    if (worker.trust < best) candidates.clear();
    best = worker.trust;
    candidates.push_back(i);
  }
  return candidates;
}

int64_t OpenRequests(const WorkerState& worker) {
  const int64_t reported = int64_t{worker.load.running_requests} + worker.load.queued_requests;
  return std::max<int64_t>(0, reported + worker.requests_since_report);
}

int64_t WaitingPromptTokens(const WorkerState& worker) {
  return std::max<int64_t>(0, static_cast<int64_t>(worker.load.pending_prefill_tokens) +
                                  worker.prompt_tokens_since_report);
}

}  // namespace

std::optional<size_t> LeastLoadedPolicy::Choose(const RequestFacts& request,
                                                const ClusterSnapshot& cluster) const {
  const std::vector<size_t> candidates = Candidates(request, cluster);
  if (candidates.empty()) return std::nullopt;
  const size_t first = request.sequence % candidates.size();
  size_t best = candidates[first];
  for (size_t i = 1; i < candidates.size(); ++i) {
    const size_t other = candidates[(first + i) % candidates.size()];
    const WorkerState& a = cluster.workers[other];
    const WorkerState& b = cluster.workers[best];
    if (std::make_tuple(OpenRequests(a), WaitingPromptTokens(a)) <
        std::make_tuple(OpenRequests(b), WaitingPromptTokens(b))) {
      best = other;
    }
  }
  return best;
}

std::optional<size_t> RoundRobinPolicy::Choose(const RequestFacts& request,
                                               const ClusterSnapshot& cluster) const {
  const std::vector<size_t> candidates = Candidates(request, cluster);
  if (candidates.empty()) return std::nullopt;
  return candidates[request.sequence % candidates.size()];
}

absl::StatusOr<std::unique_ptr<RoutingPolicy>> MakeRoutingPolicy(absl::string_view name) {
  if (name == "least_loaded") return std::make_unique<LeastLoadedPolicy>();
  if (name == "round_robin") return std::make_unique<RoundRobinPolicy>();
  return absl::InvalidArgumentError(
      absl::StrCat("policy '", name, "': must be least_loaded or round_robin"));
}

}  // namespace nosara::router
