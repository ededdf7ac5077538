#include "router/static_membership.h"

#include <algorithm>
#include <utility>

#include "base/log.h"

namespace nosara::router {

StaticMembership::StaticMembership(std::vector<std::shared_ptr<WorkerHandle>> workers,
                                   Options options)
    : options_(std::move(options)) {
  entries_.resize(workers.size());
  for (size_t i = 0; i < workers.size(); ++i) entries_[i].handle = std::move(workers[i]);
  thread_ = std::thread([this] { PollLoop(); });
}

void StaticMembership::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    // The answers refer to this object.
    mu_.Await(absl::Condition(this, &StaticMembership::NobodyAsks));
  }
  if (thread_.joinable()) thread_.join();
}

void StaticMembership::PollLoop() {
  for (;;) {
    size_t workers = 0;
    {
      absl::MutexLock lock(&mu_);
      workers = entries_.size();
    }
    for (size_t i = 0; i < workers; ++i) Ask(i);
    absl::MutexLock lock(&mu_);
    if (mu_.AwaitWithTimeout(absl::Condition(&stopped_), options_.poll_interval)) return;
  }
}

void StaticMembership::Ask(size_t index) {
  std::shared_ptr<WorkerHandle> handle;
  {
    absl::MutexLock lock(&mu_);
    Entry& entry = entries_[index];
    if (stopped_ || entry.asking) return;
    entry.asking = true;
    handle = entry.handle;
  }
  const int64_t requests = handle->open_requests();
  const int64_t tokens = handle->open_prompt_tokens();
  handle->client().GetLoad(options_.poll_timeout,
                           [this, index, requests, tokens](absl::StatusOr<WorkerLoad> report) {
                             OnReport(index, requests, tokens, std::move(report));
                           });
}

void StaticMembership::OnReport(size_t index, int64_t open_requests, int64_t open_prompt_tokens,
                                absl::StatusOr<WorkerLoad> report) {
  std::string event;
  bool good_news = true;
  int usable = 0;
  bool tell = false;
  {
    absl::MutexLock lock(&mu_);
    Entry& entry = entries_[index];
    const std::string& address = entry.handle->address();
    const bool was_connected = entry.connected;
    if (report.ok()) {
      if (entry.load.epoch != report->epoch || !was_connected) {
        event = absl::StrCat("worker ", report->worker_id, " at ", address, " serves ",
                             report->model, ", context ", report->max_context_tokens, " tokens");
      } else if (!entry.load.draining && report->draining) {
        event = absl::StrCat("worker ", report->worker_id, " at ", address, " is draining");
      }
      entry.load = *std::move(report);
      entry.reported_at = options_.clock->Now();
      entry.requests_at_report = open_requests;
      entry.prompt_tokens_at_report = open_prompt_tokens;
      entry.connected = true;
      entry.handle->OnReported();
    } else if (IsWorkerLost(report.status())) {
      entry.connected = false;
      if (was_connected) {
        good_news = false;
        event = absl::StrCat("worker ", entry.load.worker_id, " at ", address,
                             " is gone: ", report.status().message());
      }
    }
    // Any other failure only lets the last report grow old.
    usable = UsableWorkers();
    tell = !stopped_ && usable != told_usable_workers_;
    told_usable_workers_ = usable;
  }
  if (!event.empty()) good_news ? LogInfo("{}", event) : LogWarning("{}", event);
  if (tell && options_.on_change) options_.on_change(usable);
  absl::MutexLock lock(&mu_);
  entries_[index].asking = false;
}

Trust StaticMembership::TrustOf(const Entry& entry) const {
  if (entry.load.epoch == 0 || !entry.connected || entry.handle->lost()) return Trust::kGone;
  const absl::Duration age = options_.clock->Now() - entry.reported_at;
  return age > options_.stale_after ? Trust::kStale : Trust::kFresh;
}

int StaticMembership::UsableWorkers() const {
  return std::count_if(entries_.begin(), entries_.end(), [this](const Entry& entry) {
    mu_.AssertHeld();
    return TrustOf(entry) != Trust::kGone && !entry.load.draining;
  });
}

bool StaticMembership::NobodyAsks() const {
  return std::none_of(entries_.begin(), entries_.end(),
                      [](const Entry& entry) { return entry.asking; });
}

ClusterSnapshot StaticMembership::Snapshot() const {
  ClusterSnapshot snapshot;
  absl::MutexLock lock(&mu_);
  snapshot.workers.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    WorkerState& worker = snapshot.workers.emplace_back();
    worker.address = entry.handle->address();
    worker.trust = TrustOf(entry);
    worker.load = entry.load;
    worker.requests_since_report = entry.handle->open_requests() - entry.requests_at_report;
    worker.prompt_tokens_since_report =
        entry.handle->open_prompt_tokens() - entry.prompt_tokens_at_report;
    worker.handle = entry.handle;
  }
  return snapshot;
}

bool StaticMembership::AwaitWorkers(int workers, absl::Duration timeout) {
  const auto enough = [this, workers] {
    mu_.AssertHeld();
    return UsableWorkers() >= workers;
  };
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithTimeout(absl::Condition(&enough), timeout);
}

}  // namespace nosara::router
