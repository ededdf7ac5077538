#include "worker/engine/scheduler.h"

#include <algorithm>

namespace nosara::worker {
namespace {

constexpr int64_t kBlock = 64;

/// The length of the next prefill chunk of `view`, at most `limit` tokens; 0 for none.
int64_t ChunkTokens(const SequenceView& view, int64_t limit) {
  // The last full block that can come from a store: one token at least is always computed.
  const int64_t last_boundary = (view.prompt_tokens - 1) / kBlock * kBlock;
  int64_t end = view.prompt_tokens;
  if (view.position < last_boundary) end = last_boundary;
  const int64_t bound = view.position + std::min(limit, view.headroom);
  if (bound >= end) return end - view.position;
  const int64_t aligned = bound / kBlock * kBlock;
  return (aligned > view.position ? aligned : bound) - view.position;
}

}  // namespace

Schedule PlanStep(absl::Span<const SequenceView> views, const SchedulerLimits& limits) {
  Schedule schedule;
  int64_t left = limits.step_tokens;
  for (size_t i = 0; i < views.size() && left > 0; ++i) {
    const bool decodes = views[i].position >= views[i].prompt_tokens;
    if (!decodes || views[i].headroom < 1) continue;
    schedule.decode.push_back({i, 1});
    --left;
  }
  for (size_t i = 0; i < views.size() && left > 0; ++i) {
    const bool decodes = views[i].position >= views[i].prompt_tokens;
    if (decodes || views[i].headroom < 1) continue;
    const int64_t tokens = ChunkTokens(views[i], std::min(left, limits.chunk_tokens));
    if (tokens < 1) continue;
    schedule.prefill.push_back({i, tokens});
    left -= tokens;
  }
  return schedule;
}

}  // namespace nosara::worker
