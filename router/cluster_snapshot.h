// What the router knows about its workers at one moment. Plain data, input of the routing policies.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace nosara::router {

class WorkerHandle;

/// What a worker said about itself (nosara.worker.v1.GetLoadResponse).
struct WorkerLoad {
  std::string worker_id;
  uint64_t epoch = 0;  // incarnation; 0: never reported
  std::string model;
  std::string model_fingerprint;
  uint32_t max_context_tokens = 0;
  uint32_t vocab_size = 0;
  uint32_t running_requests = 0;
  uint32_t queued_requests = 0;
  uint64_t pending_prefill_tokens = 0;
  uint64_t running_tokens = 0;
  bool draining = false;
  std::vector<std::string> unreachable_stores;
};

/// How far a report can be relied on, best first.
enum class Trust {
  kFresh,  // the last report is recent
  kStale,  // the worker is late with its report; it is used when no fresh one is there
  kGone,   // the worker never reported, or its connection is broken: it is not used
};

/// One worker.
struct WorkerState {
  std::string address;
  Trust trust = Trust::kGone;
  WorkerLoad load;  // as of the last report
  // Opened minus ended by this router since that report; may be negative.
  int64_t requests_since_report = 0;
  int64_t prompt_tokens_since_report = 0;
  // The way to the worker; policies do not touch it.
  std::shared_ptr<WorkerHandle> handle;

  /// Whether it takes requests for `model`.
  bool Serves(absl::string_view model) const {
    return trust != Trust::kGone && !load.draining && load.model == model;
  }
};

/// All workers, in the order of the membership.
struct ClusterSnapshot {
  std::vector<WorkerState> workers;
};

}  // namespace nosara::router
