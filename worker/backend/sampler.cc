#include "worker/backend/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/container/flat_hash_map.h"
#include "base/check.h"

namespace nosara::worker {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void ApplyPenalties(absl::Span<float> logits, const SamplingParams& params,
                    absl::Span<const int32_t> history, size_t prompt_tokens) {
  absl::flat_hash_map<int32_t, int> output_counts;  // tokens of the prompt alone count 0
  for (size_t i = 0; i < history.size(); ++i) {
    output_counts[history[i]] += i >= prompt_tokens ? 1 : 0;
  }
  for (const auto& [id, count] : output_counts) {
    float& logit = logits[id];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (count > 0) logit -= params.presence_penalty + params.frequency_penalty * count;
  }
}

/// Log of the sum of exponentials, in double.
double LogSumExp(absl::Span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

struct Candidate {
  int32_t id;
  float logit;
};

bool Better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

std::vector<Candidate> Best(absl::Span<const float> logits, size_t count) {
  std::vector<Candidate> all;
  all.reserve(logits.size());
  for (int32_t i = 0; i < static_cast<int32_t>(logits.size()); ++i) all.push_back({i, logits[i]});
  count = std::min(count, all.size());
  std::partial_sort(all.begin(), all.begin() + count, all.end(), Better);
  all.resize(count);
  return all;
}

}  // namespace

kernels::DrawParams SamplingParams::ToDraw(uint64_t position) const {
  kernels::DrawParams draw;
  draw.seed = seed;
  draw.position = position;
  draw.temperature = temperature;
  draw.top_k = top_k;
  draw.top_p = top_p;
  draw.min_p = min_p;
  return draw;
}

SampledToken Sample(absl::Span<float> logits, const SamplingParams& params,
                    absl::Span<const int32_t> history, size_t prompt_tokens, uint64_t position) {
  CHECK(!logits.empty());
  for (float& logit : logits) {
    if (std::isnan(logit)) logit = -kInfinity;
  }
  SampledToken token;
  double log_sum = 0;
  std::vector<float> model_logits;  // before the penalties, where log-probabilities are asked for
  if (params.top_logprobs >= 0) {
    model_logits.assign(logits.begin(), logits.end());
    log_sum = LogSumExp(logits);
    for (const Candidate& best : Best(logits, params.top_logprobs)) {
      token.top.emplace_back(best.id, static_cast<float>(best.logit - log_sum));
    }
  }
  if (params.NeedsHistory()) ApplyPenalties(logits, params, history, prompt_tokens);
  token.id =
      kernels::DrawToken(logits.data(), static_cast<int>(logits.size()), params.ToDraw(position));
  if (params.top_logprobs >= 0) {
    token.logprob = static_cast<float>(model_logits[token.id] - log_sum);
  }
  return token;
}

}  // namespace nosara::worker
