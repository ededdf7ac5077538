#include "router/grpc_worker_client.h"

#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "base/retry_delay.h"
#include "nosara/worker/v1/worker.grpc.pb.h"

namespace nosara::router {
namespace {

// How long a worker has to prove that it is alive after a call ended as if it were not.
constexpr absl::Duration kProbeTimeout = absl::Milliseconds(500);

absl::Status ToStatus(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const auto& trailer = context.GetServerTrailingMetadata();
  const auto delay = trailer.find(kRetryDelayMetadata);
  if (delay != trailer.end()) {
    result = WithRetryDelay(std::move(result),
                            absl::string_view(delay->second.data(), delay->second.size()));
  }
  return result;
}

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

// The stub of one worker, and a count of its users.
//
// gRPC's objects must not be destroyed on gRPC's own threads when they are the last of their kind:
// its callback queue would wait for the thread that it runs on. A user is counted until its context
// is gone, and only then the channel can go, on the thread of the owner.
class Connection final {
 public:
  class Use final {
   public:
    explicit Use(Connection* connection) : connection_(connection) {
      absl::MutexLock lock(&connection_->mu_);
      ++connection_->uses_;
    }
    ~Use() {
      absl::MutexLock lock(&connection_->mu_);
      --connection_->uses_;
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Connection* const connection_;
  };

  explicit Connection(const std::shared_ptr<grpc::Channel>& channel)
      : stub_(worker::v1::WorkerService::NewStub(channel)) {}
  ~Connection() {
    const auto unused = [this] {
      mu_.AssertHeld();
      return uses_ == 0;
    };
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&unused));
  }

  worker::v1::WorkerService::Stub& stub() const { return *stub_; }

  void GetLoad(absl::Duration timeout, WorkerClient::LoadCallback done) {
    struct Call {
      explicit Call(Connection* connection) : use(connection) {}

      const Use use;  // first, so that it goes last
      grpc::ClientContext context;
      worker::v1::GetLoadRequest request;
      worker::v1::GetLoadResponse response;
    };
    auto call = std::make_shared<Call>(this);
    call->context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    Call& c = *call;
    stub_->async()->GetLoad(
        &c.context, &c.request, &c.response,
        [call = std::move(call), done = std::move(done)](const grpc::Status& status) {
          if (status.ok()) return done(FromProto(call->response));
          // Nothing but a broken connection makes this call unavailable.
          if (status.error_code() == grpc::StatusCode::UNAVAILABLE) {
            return done(WorkerLostStatus(status.error_message()));
          }
          done(ToStatus(status, call->context));
        });
  }

 private:
  const std::unique_ptr<worker::v1::WorkerService::Stub> stub_;
  absl::Mutex mu_;
  int uses_ ABSL_GUARDED_BY(mu_) = 0;
};

// One Execute. Owns itself until the observer has heard the end.
//
// Invariants: (1) at most one of {a read, the delivery of an event} is under way, so that the
// observer is called by one thread at a time; (2) the hold of the gRPC call is kept until a read
// has failed, so that reads may be started from outside the reactions; (3) after Cancel() reads
// follow each other until one fails, so that OnDone comes.
class GrpcWorkerCall final : public WorkerCall,
                             private grpc::ClientReadReactor<worker::v1::ExecuteResponse> {
 public:
  GrpcWorkerCall(Connection* connection, worker::v1::ExecuteRequest request, absl::Time deadline,
                 std::shared_ptr<WorkerCallObserver> observer)
      : use_(connection),
        connection_(connection),
        request_(std::move(request)),
        observer_(std::move(observer)) {
    if (deadline != absl::InfiniteFuture()) context_.set_deadline(absl::ToChronoTime(deadline));
  }

  void Start(std::shared_ptr<GrpcWorkerCall> self) {
    self_ = std::move(self);
    connection_->stub().async()->Execute(&context_, &request_, this);
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
    absl::Status result = ToStatus(status, context_);
    bool cancelled = false;
    {
      absl::MutexLock lock(&mu_);
      cancelled = cancelled_;
    }
    const bool doubtful = absl::IsUnavailable(result) || absl::IsCancelled(result);
    if (!doubtful || cancelled) return Deliver(std::move(result));
    // The worker said so, or its connection broke: gRPC reports both alike. Ask it.
    connection_->GetLoad(kProbeTimeout, [this, result](absl::StatusOr<WorkerLoad> load) {
      Deliver(load.ok() && absl::IsUnavailable(result) ? result
                                                       : WorkerLostStatus(result.message()));
    });
  }

  void Deliver(const absl::Status& status) {
    const std::shared_ptr<GrpcWorkerCall> self = std::move(self_);
    observer_->OnWorkerDone(status);
    // The observer holds the call: without this the two would keep each other for ever.
    observer_.reset();
  }

  const Connection::Use use_;  // first, so that it goes last

  // Constant after construction.
  Connection* const connection_;
  const worker::v1::ExecuteRequest request_;
  // Owned by the gRPC reactions.
  grpc::ClientContext context_;
  worker::v1::ExecuteResponse event_;
  std::shared_ptr<WorkerCallObserver> observer_;
  std::shared_ptr<GrpcWorkerCall> self_;

  absl::Mutex mu_;
  bool busy_ ABSL_GUARDED_BY(mu_) = false;    // reading or delivering
  bool wanted_ ABSL_GUARDED_BY(mu_) = false;  // Next() was called
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;  // a read has failed
};

class GrpcWorkerClient final : public WorkerClient {
 public:
  explicit GrpcWorkerClient(const std::shared_ptr<grpc::Channel>& channel) : connection_(channel) {}

  std::shared_ptr<WorkerCall> Execute(const worker::v1::ExecuteRequest& request,
                                      absl::Time deadline,
                                      std::shared_ptr<WorkerCallObserver> observer) override {
    auto call =
        std::make_shared<GrpcWorkerCall>(&connection_, request, deadline, std::move(observer));
    call->Start(call);
    return call;
  }

  void GetLoad(absl::Duration timeout, LoadCallback done) override {
    connection_.GetLoad(timeout, std::move(done));
  }

 private:
  Connection connection_;
};

}  // namespace

std::unique_ptr<WorkerClient> MakeGrpcWorkerClient(std::shared_ptr<grpc::Channel> channel) {
  return std::make_unique<GrpcWorkerClient>(channel);
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
