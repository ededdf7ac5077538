// What the engine is asked to do, and whom it tells.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/backend/backend.h"
#include "worker/backend/sampler.h"

namespace nosara::worker {

/// A request as the engine runs it.
struct Request {
  std::string request_id;
  std::vector<int32_t> prompt;     // at least one token
  std::vector<int32_t> generated;  // tokens generated elsewhere already
  SamplingParams sampling;
  int64_t max_tokens = 0;  // of output, `generated` included
  std::vector<int32_t> stop_token_ids;
  std::string cache_salt;
  /// By the engine's clock.
  absl::Time deadline = absl::InfiniteFuture();
};

enum class FinishReason { kStop, kLength };

/// How a request ended well.
struct Completion {
  FinishReason reason = FinishReason::kStop;
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_prompt_tokens = 0;
  CacheCounters cache;
  int64_t pages_written = 0;
};

/// Receives what becomes of one request. Called by the engine thread, in order; calls must not
/// block. Exactly one of OnCompleted and OnFailed is called, last; neither after Engine::Cancel has
/// taken effect before them.
class RequestSink {
 public:
  virtual ~RequestSink() = default;

  /// The request runs; `cached_tokens` of its prompt were found in the stores.
  virtual void OnAccepted(int64_t cached_tokens) = 0;
  virtual void OnPrefillProgress(int64_t done_tokens, int64_t total_tokens) = 0;
  virtual void OnToken(const SampledToken& token) = 0;
  virtual void OnCompleted(const Completion& completion) = 0;
  virtual void OnFailed(const absl::Status& status) = 0;
};

}  // namespace nosara::worker
