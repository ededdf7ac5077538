// The router's view of one worker: run a request, ask for its load.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "nosara/worker/v1/worker.pb.h"
#include "router/cluster_snapshot.h"

namespace nosara::router {

/// A running Execute. Thread-safe; methods may be called in any state and never block.
class WorkerCall {
 public:
  virtual ~WorkerCall() = default;

  /// Asks for the next event, or for the end of the stream. Once at first and once after each
  /// event: a worker whose events nobody asks for is slowed down by flow control.
  virtual void Next() = 0;

  /// Ends the call as soon as possible; the observer's OnDone follows. Idempotent.
  virtual void Cancel() = 0;
};

/// Receives what a worker sends. Called on threads of the client, one call at a time, no lock held;
/// must not block.
class WorkerCallObserver {
 public:
  virtual ~WorkerCallObserver() = default;

  /// One event; the answer to one Next().
  virtual void OnWorkerEvent(const worker::v1::ExecuteResponse& event) = 0;

  /// The end of the stream, exactly once, last. UNAVAILABLE with IsWorkerLost: the connection
  /// broke; any other status was sent by the worker.
  virtual void OnWorkerDone(const absl::Status& status) = 0;
};

/// Thread-safe. The destructor waits for the calls to end and for their objects to be gone: it must
/// not run in a callback.
class WorkerClient {
 public:
  virtual ~WorkerClient() = default;

  /// Starts a request. `observer` is kept until OnWorkerDone returns; nothing is called before the
  /// first Next(). `deadline` is wall-clock time or InfiniteFuture().
  virtual std::shared_ptr<WorkerCall> Execute(const worker::v1::ExecuteRequest& request,
                                              absl::Time deadline,
                                              std::shared_ptr<WorkerCallObserver> observer) = 0;

  using LoadCallback = std::function<void(absl::StatusOr<WorkerLoad>)>;

  /// Asks for identity and load; `done` is called exactly once, on any thread, after at most about
  /// `timeout`.
  virtual void GetLoad(absl::Duration timeout, LoadCallback done) = 0;
};

/// Marks a status as the loss of the worker, not something that the worker said.
absl::Status WorkerLostStatus(absl::string_view detail);
bool IsWorkerLost(const absl::Status& status);

}  // namespace nosara::router
