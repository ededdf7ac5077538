// Which sequences take part in the next step, with how many tokens each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace nosara::worker {

/// What the scheduler sees of a sequence that could run now.
struct SequenceView {
  /// Tokens whose KV is in the cache.
  int64_t position = 0;
  /// Tokens of the prompt (with the output so far where the request was resumed); while `position`
  /// is below, the sequence is in prefill.
  int64_t prompt_tokens = 0;
  /// Backend::Headroom.
  int64_t headroom = 0;
};

struct SchedulerLimits {
  /// Tokens in one step, decode and prefill together; 1 or more.
  int64_t step_tokens = 512;
  /// Tokens of one prefill chunk; 1 or more.
  int64_t chunk_tokens = 256;
};

/// A sequence (its position in the list of views) and its number of tokens in the step.
struct ScheduledItem {
  size_t view = 0;
  int64_t tokens = 0;
};

struct Schedule {
  std::vector<ScheduledItem> decode;   // one token each
  std::vector<ScheduledItem> prefill;  // chunks
};

/// A pure function. `views` are in order of arrival. Decoding sequences come first, so that a long
/// prompt delays nobody's next token by more than one chunk; prompts share what is left, first come
/// first served. A sequence without headroom waits for the store.
///
/// Chunks end at block boundaries where they can, and the incomplete last block of a prompt is a
/// chunk of its own: a worker that finds all full blocks in the store then computes that chunk
/// exactly as the one that prefilled everything.
Schedule PlanStep(absl::Span<const SequenceView> views, const SchedulerLimits& limits);

}  // namespace nosara::worker
