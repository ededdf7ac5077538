// A WorkerClient whose calls a test drives by hand, without gRPC.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "router/worker_client.h"

namespace nosara::router {

/// Thread-safe.
class FakeWorkerCall final : public WorkerCall {
 public:
  explicit FakeWorkerCall(std::shared_ptr<WorkerCallObserver> observer)
      : observer_(std::move(observer)) {}

  void Next() override {
    absl::MutexLock lock(&mu_);
    ++wanted_;
  }
  void Cancel() override {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
  }

  /// Events that were asked for and not sent yet.
  int wanted() const {
    absl::MutexLock lock(&mu_);
    return wanted_;
  }
  bool cancelled() const {
    absl::MutexLock lock(&mu_);
    return cancelled_;
  }
  void AwaitWanted() const {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &FakeWorkerCall::IsWanted));
  }

  /// Waits for a Next() and answers it.
  void Send(const worker::v1::ExecuteResponse& event) {
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &FakeWorkerCall::IsWanted));
      --wanted_;
    }
    observer_->OnWorkerEvent(event);
  }
  /// Waits for a Next() or Cancel() and ends the stream. Once; later ones do nothing.
  void End(const absl::Status& status) {
    if (observer_ == nullptr) return;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &FakeWorkerCall::MayEnd));
    }
    // As a real call does: it lets go of its observer.
    std::exchange(observer_, nullptr)->OnWorkerDone(status);
  }

 private:
  bool IsWanted() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return wanted_ > 0; }
  bool MayEnd() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return wanted_ > 0 || cancelled_; }

  std::shared_ptr<WorkerCallObserver> observer_;
  mutable absl::Mutex mu_;
  int wanted_ ABSL_GUARDED_BY(mu_) = 0;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
};

/// Thread-safe. What its clients share outlives them.
struct FakeWorkerState {
  absl::Mutex mu;
  std::vector<std::shared_ptr<FakeWorkerCall>> calls ABSL_GUARDED_BY(mu);
  absl::StatusOr<WorkerLoad> load ABSL_GUARDED_BY(mu) = absl::UnavailableError("not set");
  int load_requests ABSL_GUARDED_BY(mu) = 0;

  std::shared_ptr<FakeWorkerCall> AwaitCall(size_t index) {
    const auto there = [this, index] {
      mu.AssertHeld();
      return calls.size() > index;
    };
    absl::MutexLock lock(&mu);
    mu.Await(absl::Condition(&there));
    return calls[index];
  }
  void SetLoad(absl::StatusOr<WorkerLoad> new_load) {
    absl::MutexLock lock(&mu);
    load = std::move(new_load);
  }
  /// Waits until the load was asked for, answered, and asked for once more.
  void AwaitReport() {
    absl::MutexLock lock(&mu);
    const int target = load_requests + 2;
    const auto there = [this, target] {
      mu.AssertHeld();
      return load_requests >= target;
    };
    mu.Await(absl::Condition(&there));
  }
};

class FakeWorkerClient final : public WorkerClient {
 public:
  explicit FakeWorkerClient(std::shared_ptr<FakeWorkerState> state) : state_(std::move(state)) {}

  std::shared_ptr<WorkerCall> Execute(const worker::v1::ExecuteRequest& request,
                                      absl::Time deadline,
                                      std::shared_ptr<WorkerCallObserver> observer) override {
    auto call = std::make_shared<FakeWorkerCall>(std::move(observer));
    absl::MutexLock lock(&state_->mu);
    state_->calls.push_back(call);
    return call;
  }
  void GetLoad(absl::Duration timeout, LoadCallback done) override {
    absl::StatusOr<WorkerLoad> load;
    {
      absl::MutexLock lock(&state_->mu);
      ++state_->load_requests;
      load = state_->load;
    }
    done(std::move(load));
  }

 private:
  const std::shared_ptr<FakeWorkerState> state_;
};

}  // namespace nosara::router
