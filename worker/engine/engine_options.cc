#include "worker/engine/engine_options.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::worker {

absl::Status EngineOptions::Validate() const {
  const auto positive = [](const char* name, int64_t value) {
    return value >= 1 ? absl::OkStatus()
                      : absl::InvalidArgumentError(
                            absl::StrCat(name, " = ", value, ": must be at least 1"));
  };
  RETURN_IF_ERROR(positive("step_tokens", limits.step_tokens));
  RETURN_IF_ERROR(positive("prefill_chunk_tokens", limits.chunk_tokens));
  RETURN_IF_ERROR(positive("max_running", max_running));
  RETURN_IF_ERROR(positive("max_queued", max_queued));
  if (max_recoveries < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_recoveries = ", max_recoveries, ": must be 0 or more"));
  }
  if (max_replay_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_replay_tokens = ", max_replay_tokens, ": must be 0 or more"));
  }
  if (store_patience <= absl::ZeroDuration() || store_retry_delay <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("store_patience and store_retry_delay must be positive");
  }
  return absl::OkStatus();
}

}  // namespace nosara::worker
