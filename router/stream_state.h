// From the events of a worker to the events of a client: text, stop texts, log-probabilities,
// usage.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "nosara/inference/v1/inference.pb.h"
#include "nosara/worker/v1/worker.pb.h"
#include "text/detokenizer.h"
#include "text/stop_matcher.h"

namespace nosara::router {

/// The output side of one request. One thread at a time; no I/O.
///
/// Invariants: (1) the order of the responses is Started, (PrefillProgress | TextChunk)*, Finished;
/// (2) the texts of the chunks, concatenated, are the decoded output up to the stop text, whatever
/// the sizes of the worker's chunks; every text is whole UTF-8 characters; (3) nothing follows
/// Finished.
class StreamState final {
 public:
  struct Config {
    std::string request_id;
    std::string model;
    uint32_t prompt_tokens = 0;
    uint64_t seed = 0;
    std::vector<std::string> stop;
    bool wants_logprobs = false;
    absl::Time arrival;  // of the request, on `clock`
    const Clock* clock = Clock::Real();
  };

  /// `tokenizer` must outlive this object.
  StreamState(Config config, const text::Tokenizer* tokenizer);

  /// Takes the next event of the worker and appends the responses that follow from it. INTERNAL
  /// for an event that the protocol does not allow now. After finished(): ignored.
  absl::Status OnWorkerEvent(const worker::v1::ExecuteResponse& event,
                             std::vector<inference::v1::GenerateResponse>* responses);

  /// The worker has taken the request: Started is out.
  bool started() const { return started_; }
  /// Finished is out. If the worker has not completed, its call can be cancelled now.
  bool finished() const { return finished_; }
  bool worker_completed() const { return worker_completed_; }
  /// Tokens received so far.
  uint32_t completion_tokens() const { return completion_tokens_; }

 private:
  void OnTokens(const worker::v1::TokenChunk& tokens,
                std::vector<inference::v1::GenerateResponse>* responses);
  void OnCompleted(const worker::v1::Completed& completed,
                   std::vector<inference::v1::GenerateResponse>* responses);
  void FinishWithStopText(std::vector<inference::v1::GenerateResponse>* responses);
  void SetTimes(inference::v1::Finished* finished) const;
  std::string DisplayText(uint32_t id) const;
  void FillLogprob(const worker::v1::Token& token, inference::v1::TokenLogprob* logprob) const;

  const Config config_;
  const text::Tokenizer* const tokenizer_;
  text::IncrementalDetokenizer detokenizer_;
  text::StopMatcher stop_matcher_;
  bool started_ = false;
  bool finished_ = false;
  bool worker_completed_ = false;
  uint32_t completion_tokens_ = 0;
  uint32_t cached_prompt_tokens_ = 0;
  absl::Time first_token_at_ = absl::InfinitePast();
};

}  // namespace nosara::router
