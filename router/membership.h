// Which workers there are, and how they do.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "router/cluster_snapshot.h"
#include "router/worker_client.h"

namespace nosara::router {

/// One worker as this router knows it: the way to it, and what this router has open there.
/// Thread-safe. Shared by the membership and the requests that run on the worker.
class WorkerHandle final {
 public:
  WorkerHandle(std::string address, std::unique_ptr<WorkerClient> client)
      : address_(std::move(address)), client_(std::move(client)) {}

  const std::string& address() const { return address_; }
  WorkerClient& client() const { return *client_; }

  /// A request was sent there, or has ended there. Each OnOpened is followed by one OnEnded with
  /// the same number of prompt tokens.
  void OnOpened(uint32_t prompt_tokens) { Count(1, prompt_tokens); }
  void OnEnded(uint32_t prompt_tokens) { Count(-1, -static_cast<int64_t>(prompt_tokens)); }

  /// A stream broke: no request goes there until the worker reports again.
  void OnLost() { lost_.store(true, std::memory_order_relaxed); }

  // For the membership. The numbers are estimates that no other data depends on: relaxed order.
  int64_t open_requests() const { return open_requests_.load(std::memory_order_relaxed); }
  int64_t open_prompt_tokens() const { return open_prompt_tokens_.load(std::memory_order_relaxed); }
  bool lost() const { return lost_.load(std::memory_order_relaxed); }
  void OnReported() { lost_.store(false, std::memory_order_relaxed); }

 private:
  void Count(int64_t requests, int64_t prompt_tokens) {
    open_requests_.fetch_add(requests, std::memory_order_relaxed);
    open_prompt_tokens_.fetch_add(prompt_tokens, std::memory_order_relaxed);
  }

  const std::string address_;
  const std::unique_ptr<WorkerClient> client_;
  std::atomic<int64_t> open_requests_{0};
  std::atomic<int64_t> open_prompt_tokens_{0};
  std::atomic<bool> lost_{false};
};

/// Thread-safe.
class Membership {
 public:
  virtual ~Membership() = default;

  /// What is known now. Never blocks on the network.
  virtual ClusterSnapshot Snapshot() const = 0;

  /// Waits until at least `workers` workers can be used, or for `timeout`; true if they can.
  virtual bool AwaitWorkers(int workers, absl::Duration timeout) = 0;

  /// Ends what runs in the background. Idempotent. Snapshots stay as they are.
  virtual void Stop() = 0;
};

}  // namespace nosara::router
