// One Generate request on its way through the router.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "nosara/inference/v1/inference.pb.h"
#include "router/membership.h"
#include "router/model_registry.h"
#include "router/request_validation.h"
#include "router/routing_policy.h"
#include "router/stream_state.h"
#include "router/task_pool.h"
#include "router/worker_client.h"

namespace nosara::router {

/// What all requests of a router share. Thread-safe. Its owner destroys it after AwaitIdle(), when
/// no new request can come.
class RouterCore final {
 public:
  /// Counts a request from its beginning to the destruction of its last part.
  class OpenRequest final {
   public:
    explicit OpenRequest(RouterCore* core);
    ~OpenRequest();
    OpenRequest(const OpenRequest&) = delete;
    OpenRequest& operator=(const OpenRequest&) = delete;

   private:
    RouterCore* const core_;
  };

  int open_requests() const ABSL_LOCKS_EXCLUDED(mu_);
  /// Waits until no request is open.
  void AwaitIdle() const ABSL_LOCKS_EXCLUDED(mu_);

  // Constant once requests come.
  std::unique_ptr<const ModelRegistry> models;
  std::unique_ptr<Membership> membership;
  std::unique_ptr<const RoutingPolicy> policy;
  std::unique_ptr<TaskPool> pool;
  const Clock* clock = Clock::Real();
  int max_open_requests = 0;
  absl::Duration retry_delay;

  // Number of the next placement. Only a source of turns, nothing depends on it: relaxed order.
  std::atomic<uint64_t> placements{0};

 private:
  mutable absl::Mutex mu_;
  int open_requests_ ABSL_GUARDED_BY(mu_) = 0;
};

/// Where a request comes from, as its front (gRPC, HTTP) heard it. What it means - who the tenant
/// is, whether the request may run, which trace it belongs to - is decided in one place for all
/// fronts, behind this.
struct RequestOrigin {
  // "grpc" or "http".
  std::string protocol;
  // Address of the peer, for the access log.
  std::string peer;
  // Value of the header `authorization`; "" if there was none.
  std::string authorization;
  // Values of the W3C headers `traceparent` and `tracestate`; "" if there were none.
  std::string traceparent;
  std::string tracestate;
  // When the client gives up: wall-clock time or InfiniteFuture().
  absl::Time deadline = absl::InfiniteFuture();
};

/// The limits of `model` among the workers that can be used: the longest context. UNAVAILABLE when
/// there is none.
absl::StatusOr<ModelLimits> LimitsOf(const ClusterSnapshot& cluster, const std::string& model);

/// Validates, tokenizes, picks a worker, translates its stream. Knows nothing of gRPC: a gRPC
/// reactor and, one day, an HTTP stream are its sinks.
///
/// Thread-safe; never blocks, but for the text work, which runs in the pool. Kept alive by what is
/// under way (a task, a worker's call) and by the owner of the sink.
/// Flow control: while kMaxQueuedResponses wait for a slow sink, the worker's stream is not read.
/// A worker that refuses the request before it has accepted it, because it drains or is gone, is
/// replaced by another one, each at most once.
class Generation final : public WorkerCallObserver,
                         public std::enable_shared_from_this<Generation> {
 public:
  /// Receives the responses. Called by one thread at a time, no lock held; must not block.
  class Sink {
   public:
    virtual ~Sink() = default;
    /// The next response; the sink answers with OnWritten() when it can take another one.
    virtual void Write(const inference::v1::GenerateResponse& response) = 0;
    /// The end, exactly once; the sink is not touched any more.
    virtual void Finish(const absl::Status& status) = 0;
  };
  using ReadRequest = std::function<absl::StatusOr<inference::v1::GenerateRequest>()>;

  static constexpr size_t kMaxQueuedResponses = 32;

  /// `core` outlives this object.
  Generation(RouterCore* core, Sink* sink, RequestOrigin origin);

  /// Starts the request that `read_request`, run in the pool, gives. Call once.
  void Start(ReadRequest read_request);

  /// The sink can take another response.
  void OnWritten();

  /// Nobody is interested any more: the worker's call is cancelled at once, the sink is finished
  /// with CANCELLED. Idempotent, in any state.
  void Cancel();

 private:
  void OnWorkerEvent(const worker::v1::ExecuteResponse& event) override;
  void OnWorkerDone(const absl::Status& status) override;

  void Prepare(const ReadRequest& read_request);
  absl::Status PrepareRequest(const inference::v1::GenerateRequest& request);
  void Place();
  void Fail(absl::Status status);
  void Pump() ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status EndOfWorker(const absl::Status& status);
  bool TakesOtherWorker(const absl::Status& status) const;
  std::string WorkerName() const;

  // First, so that it goes last: the core may be gone after that.
  const RouterCore::OpenRequest open_;

  // Constant after construction.
  RouterCore* const core_;
  Sink* const sink_;
  const RequestOrigin origin_;
  const absl::Time arrival_;

  // Owned by the flow of the request: first the pool's task, then the worker's events, one after
  // the other.
  worker::v1::ExecuteRequest execute_;
  RequestFacts facts_;
  std::unique_ptr<StreamState> state_;
  std::shared_ptr<WorkerHandle> worker_;
  std::string worker_id_;
  std::string last_refusal_;  // why the last worker that refused did so

  mutable absl::Mutex mu_;
  std::string request_id_ ABSL_GUARDED_BY(mu_);  // "" until the request was read
  std::shared_ptr<WorkerCall> call_ ABSL_GUARDED_BY(mu_);
  std::deque<inference::v1::GenerateResponse> queue_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;        // the sink has not answered yet
  bool read_paused_ ABSL_GUARDED_BY(mu_) = false;    // the queue is full
  bool sink_finished_ ABSL_GUARDED_BY(mu_) = false;  // Finish was or is being called
  // The end, decided once; sent when the queue is empty.
  std::optional<absl::Status> result_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nosara::router
