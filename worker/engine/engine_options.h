// What an engine can be set to.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/engine/scheduler.h"

namespace nosara::worker {

struct EngineOptions {
  SchedulerLimits limits;
  /// Sequences with memory in the backend at a time; 1 or more.
  int max_running = 64;
  /// Requests that may wait; 1 or more. More are refused.
  int max_queued = 1024;
  /// How long a sequence may wait for the store to take its finished blocks before it fails.
  absl::Duration store_patience = absl::Seconds(10);
  /// Between two tries to store the same blocks, or to look up what is left of a sequence's pages.
  absl::Duration store_retry_delay = absl::Milliseconds(100);
  /// How often one request may lose pages and go on by computing them again; 0 or more. At the next
  /// loss it fails.
  int max_recoveries = 16;
  /// After such a loss, up to so many tokens of output are computed again one by one, in steps of
  /// the same shape as before, so that the same numbers come out to the last bit; more are
  /// prefilled in chunks, which is faster and adds in another order (docs/adr/0002-numerics.md). 0
  /// or more.
  int64_t max_replay_tokens = 1024;
  /// Runs Backend::CheckIntegrity after every step.
  enum class Integrity { kOff, kEachStep } integrity = Integrity::kOff;

  absl::Status Validate() const;
};

}  // namespace nosara::worker
