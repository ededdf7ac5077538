// Membership of a fixed list of workers, asked for their load again and again.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "router/membership.h"

namespace nosara::router {

/// Owns one thread, which asks each worker for its load and never waits for an answer.
///
/// Trust: a worker is gone until its first report, and when its connection is broken (GetLoad or a
/// stream found it so); it is stale when its last report is older than `stale_after`.
class StaticMembership final : public Membership {
 public:
  struct Options {
    absl::Duration poll_interval = absl::Milliseconds(500);
    absl::Duration poll_timeout = absl::Seconds(1);
    absl::Duration stale_after = absl::Seconds(2);
    const Clock* clock = Clock::Real();
    // Told how many workers can be used, after each change; called on any thread, not under a
    // lock, not after Stop().
    std::function<void(int usable_workers)> on_change;
  };

  /// Starts to poll at once.
  StaticMembership(std::vector<std::shared_ptr<WorkerHandle>> workers, Options options);
  ~StaticMembership() override { Stop(); }

  ClusterSnapshot Snapshot() const override ABSL_LOCKS_EXCLUDED(mu_);
  bool AwaitWorkers(int workers, absl::Duration timeout) override ABSL_LOCKS_EXCLUDED(mu_);
  void Stop() override ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Entry {
    std::shared_ptr<WorkerHandle> handle;
    WorkerLoad load;
    absl::Time reported_at = absl::InfinitePast();
    // What this router had open there when it asked for the report.
    int64_t requests_at_report = 0;
    int64_t prompt_tokens_at_report = 0;
    bool asking = false;     // a GetLoad is under way
    bool connected = false;  // the last GetLoad reached the worker
  };

  void PollLoop();
  void Ask(size_t index) ABSL_LOCKS_EXCLUDED(mu_);
  void OnReport(size_t index, int64_t open_requests, int64_t open_prompt_tokens,
                absl::StatusOr<WorkerLoad> report) ABSL_LOCKS_EXCLUDED(mu_);
  Trust TrustOf(const Entry& entry) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int UsableWorkers() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool NobodyAsks() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  mutable absl::Mutex mu_;
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);  // its size and the handles are constant
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  int told_usable_workers_ ABSL_GUARDED_BY(mu_) = 0;
  std::thread thread_;
};

}  // namespace nosara::router
