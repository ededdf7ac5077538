#include "router/grpc_worker_client.h"

#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/numbers.h"
#include "absl/synchronization/mutex.h"
#include "nosara/worker/v1/worker.grpc.pb.h"
#include "router/retry_delay.h"

namespace nosara::router {
namespace {

constexpr char kWorkerMetadata[] = "nosara-worker";

absl::Status ToStatus(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  const auto& trailer = context.GetServerTrailingMetadata();
  // Neither is a worker's own word without its metadata: the connection broke, or the worker's
  // server went down under the call.
  const bool broken = status.error_code() == grpc::StatusCode::UNAVAILABLE ||
                      status.error_code() == grpc::StatusCode::CANCELLED;
  if (broken && trailer.find(kWorkerMetadata) == trailer.end()) {
    return WorkerLostStatus(status.error_message());
  }
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const auto delay = trailer.find(kRetryDelayMetadata);
  int64_t milliseconds = 0;
  if (delay != trailer.end() &&
      absl::SimpleAtoi(absl::string_view(delay->second.data(), delay->second.size()),
                       &milliseconds) &&
      milliseconds >= 0) {
    result = WithRetryDelay(std::move(result), absl::Milliseconds(milliseconds));
  }
  return result;
}

// One Execute. Owns itself until the observer has heard the end.
//
// Invariants: (1) at most one of {a read, the delivery of an event} is under way, so that the
// observer is called by one thread at a time; (2) the hold of the gRPC call is kept until a read
// has failed, so that reads may be started from outside the reactions; (3) after Cancel() reads
// follow each other until one fails, so that OnDone comes.
class GrpcWorkerCall final : public WorkerCall,
                             private grpc::ClientReadReactor<worker::v1::ExecuteResponse> {
 public:
  GrpcWorkerCall(std::shared_ptr<worker::v1::WorkerService::Stub> stub,
                 worker::v1::ExecuteRequest request, absl::Time deadline,
                 std::shared_ptr<WorkerCallObserver> observer)
      : stub_(std::move(stub)), request_(std::move(request)), observer_(std::move(observer)) {
    if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  }

  void Start(std::shared_ptr<GrpcWorkerCall> self) {
    self_ = std::move(self);
    stub_->async()->Execute(&context_, &request_, this);
    AddHold();
    StartCall();
  }

  void Next() override {
    {
      absl::MutexLock lock(&mu_);
      if (ended_) return;
      wanted_ = true;
    }
    ReadIfWanted();
  }

  void Cancel() override {
    {
      absl::MutexLock lock(&mu_);
      if (ended_ || cancelled_) return;
      cancelled_ = true;
    }
    context_.TryCancel();
    ReadIfWanted();
  }

 private:
  void ReadIfWanted() {
    {
      absl::MutexLock lock(&mu_);
      if (busy_ || ended_ || !(wanted_ || cancelled_)) return;
      busy_ = true;
      wanted_ = false;
    }
    StartRead(&event_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      {
        absl::MutexLock lock(&mu_);
        ended_ = true;
      }
      RemoveHold();
      return;
    }
    observer_->OnWorkerEvent(event_);
    {
      absl::MutexLock lock(&mu_);
      busy_ = false;
    }
    ReadIfWanted();
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<GrpcWorkerCall> self = std::move(self_);
    observer_->OnWorkerDone(ToStatus(status, context_));
    // The observer holds the call: without this the two would keep each other for ever.
    observer_.reset();
  }

  // Constant after construction.
  const std::shared_ptr<worker::v1::WorkerService::Stub> stub_;
  const worker::v1::ExecuteRequest request_;
  // Owned by the gRPC reactions.
  grpc::ClientContext context_;
  worker::v1::ExecuteResponse event_;
  std::shared_ptr<WorkerCallObserver> observer_;
  std::shared_ptr<GrpcWorkerCall> self_;

  absl::Mutex mu_;
  bool busy_ ABSL_GUARDED_BY(mu_) = false;       // reading or delivering
  bool wanted_ ABSL_GUARDED_BY(mu_) = false;     // Next() was called
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;      // a read has failed
};

WorkerLoad FromProto(const worker::v1::GetLoadResponse& response) {
  WorkerLoad load;
  load.worker_id = response.worker_id();
  load.epoch = response.epoch();
  load.model = response.model();
  load.model_fingerprint = response.model_fingerprint();
  load.max_context_tokens = response.max_context_tokens();
  load.vocab_size = response.vocab_size();
  load.running_requests = response.running_requests();
  load.queued_requests = response.queued_requests();
  load.pending_prefill_tokens = response.pending_prefill_tokens();
  load.running_tokens = response.running_tokens();
  load.draining = response.draining();
  load.unreachable_stores.assign(response.unreachable_stores().begin(),
                                 response.unreachable_stores().end());
  return load;
}

class GrpcWorkerClient final : public WorkerClient {
 public:
  explicit GrpcWorkerClient(std::shared_ptr<grpc::Channel> channel)
      : stub_(worker::v1::WorkerService::NewStub(channel)) {}

  std::shared_ptr<WorkerCall> Execute(const worker::v1::ExecuteRequest& request,
                                      absl::Time deadline,
                                      std::shared_ptr<WorkerCallObserver> observer) override {
    auto call = std::make_shared<GrpcWorkerCall>(stub_, request, deadline, std::move(observer));
    call->Start(call);
    return call;
  }

  void GetLoad(absl::Duration timeout, LoadCallback done) override {
    struct Call {
      grpc::ClientContext context;
      worker::v1::GetLoadRequest request;
      worker::v1::GetLoadResponse response;
    };
    auto call = std::make_shared<Call>();
    call->context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    stub_->async()->GetLoad(
        &call->context, &call->request, &call->response,
        [stub = stub_, call, done = std::move(done)](const grpc::Status& status) {
          if (!status.ok()) return done(ToStatus(status, call->context));
          done(FromProto(call->response));
        });
  }

 private:
  const std::shared_ptr<worker::v1::WorkerService::Stub> stub_;
};

}  // namespace

std::unique_ptr<WorkerClient> MakeGrpcWorkerClient(std::shared_ptr<grpc::Channel> channel) {
  return std::make_unique<GrpcWorkerClient>(std::move(channel));
}

std::shared_ptr<grpc::Channel> MakeWorkerChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  // gRPC's own back-off grows to two minutes: too long for a worker that restarts.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  arguments.SetMaxReceiveMessageSize(16 << 20);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace nosara::router
