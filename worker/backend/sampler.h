// From logits to a token: the same function on every backend and every machine.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "kernels/sample/draw.h"

namespace nosara::worker {

/// Validated sampling parameters; ranges in proto/nosara/inference/v1.
struct SamplingParams {
  float temperature = 1;  // 0: greedy
  int top_k = 0;          // 0: all
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint64_t seed = 0;
  int top_logprobs = -1;  // -1: no log-probabilities at all

  bool NeedsHistory() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
  /// Whether the logits alone decide, and the token is all that is wanted.
  bool DrawnFromLogits() const { return top_logprobs < 0 && !NeedsHistory(); }
  /// How the token at absolute position `position` is drawn.
  kernels::DrawParams ToDraw(uint64_t position) const;
};

/// A drawn token. `logprob` and `top` (best first) are natural logarithms of the model's own
/// probabilities, before any sampling parameter; they are set where top_logprobs >= 0.
struct SampledToken {
  int32_t id = 0;
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top;
};

/// Draws the token at absolute position `position` (prompt included).
///
/// `logits`: [V] f32, used as scratch. `history`: prompt, then output, where
/// params.NeedsHistory(); the output begins at `prompt_tokens`. Order of application: repetition,
/// presence and frequency penalties, then as kernels/sample/draw.h has it: temperature, top_k,
/// top_p, min_p. Greedy takes the smallest id among equals. A NaN logit counts as -inf.
SampledToken Sample(absl::Span<float> logits, const SamplingParams& params,
                    absl::Span<const int32_t> history, size_t prompt_tokens, uint64_t position);

}  // namespace nosara::worker
