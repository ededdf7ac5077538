#include "kvstore/client/control_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/retry_delay.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"

namespace nosara::kvstore {
namespace {

constexpr int kMaxMessageBytes = 16 << 20;

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  // A restarted store should be found again within a second, not within minutes.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // In spite of its name the time that one attempt to connect may take.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

struct ControlClient::Impl {
  template <typename Request, typename Response>
  struct Call {
    grpc::ClientContext context;
    Request request;
    Response response;
    Done<Response> done;
  };

  template <typename Request, typename Response, typename Method>
  void Start(Method method, absl::Duration deadline, Request request, Done<Response> done) {
    auto* const call = new Call<Request, Response>;
    call->request = std::move(request);
    call->done = std::move(done);
    call->context.set_deadline(std::chrono::system_clock::now() +
                               absl::ToChronoMilliseconds(deadline));
    {
      absl::MutexLock lock(&mu);
      running.insert(&call->context);
    }
    (stub->async()->*method)(&call->context, &call->request, &call->response,
                             [this, call](grpc::Status status) {
                               {
                                 absl::MutexLock lock(&mu);
                                 running.erase(&call->context);
                                 ++finishing;
                               }
                               if (status.ok()) {
                                 std::move(call->done)(std::move(call->response));
                               } else {
                                 std::move(call->done)(ToStatus(status, call->context));
                               }
                               delete call;
                               absl::MutexLock lock(&mu);
                               --finishing;
                             });
  }

  absl::Status ToStatus(const grpc::Status& status, const grpc::ClientContext& context) const {
    auto code = static_cast<absl::StatusCode>(status.error_code());
    std::string message = status.error_message();
    if (code == absl::StatusCode::kDeadlineExceeded) {
      code = absl::StatusCode::kUnavailable;
      message = "does not answer in time";
    }
    absl::Status result(code, absl::StrCat("store ", name, ": ", message));
    const auto& trailers = context.GetServerTrailingMetadata();
    const auto delay = trailers.find(kRetryDelayMetadata);
    if (delay != trailers.end()) {
      result = WithRetryDelay(std::move(result),
                              absl::string_view(delay->second.data(), delay->second.size()));
    }
    return result;
  }

  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) { return running.empty() && finishing == 0; }

  std::string name;
  std::unique_ptr<v1::KvStoreService::Stub> stub;
  absl::Mutex mu;
  absl::flat_hash_set<grpc::ClientContext*> running ABSL_GUARDED_BY(mu);
  size_t finishing ABSL_GUARDED_BY(mu) = 0;
};

ControlClient::ControlClient(std::string address, std::shared_ptr<grpc::Channel> channel)
    : impl_(std::make_unique<Impl>()) {
  impl_->stub = v1::KvStoreService::NewStub(channel != nullptr ? channel : MakeChannel(address));
  impl_->name = std::move(address);
}

ControlClient::~ControlClient() { WaitIdle(); }

using AsyncStub = v1::KvStoreService::StubInterface::async_interface;
template <typename Request, typename Response>
using AsyncMethod = void (AsyncStub::*)(grpc::ClientContext*, const Request*, Response*,
                                        std::function<void(grpc::Status)>);

// Deadlines: those of kvstore.proto.
void ControlClient::GetInfo(v1::GetInfoRequest request, Done<v1::GetInfoResponse> done) {
  const AsyncMethod<v1::GetInfoRequest, v1::GetInfoResponse> method = &AsyncStub::GetInfo;
  impl_->Start(method, absl::Seconds(5), std::move(request), std::move(done));
}

void ControlClient::Lookup(v1::LookupRequest request, Done<v1::LookupResponse> done) {
  const AsyncMethod<v1::LookupRequest, v1::LookupResponse> method = &AsyncStub::Lookup;
  impl_->Start(method, absl::Seconds(2), std::move(request), std::move(done));
}

void ControlClient::Reserve(v1::ReserveRequest request, Done<v1::ReserveResponse> done) {
  const AsyncMethod<v1::ReserveRequest, v1::ReserveResponse> method = &AsyncStub::Reserve;
  impl_->Start(method, absl::Seconds(2), std::move(request), std::move(done));
}

void ControlClient::Commit(v1::CommitRequest request, Done<v1::CommitResponse> done) {
  const AsyncMethod<v1::CommitRequest, v1::CommitResponse> method = &AsyncStub::Commit;
  impl_->Start(method, absl::Seconds(5), std::move(request), std::move(done));
}

void ControlClient::Renew(v1::RenewRequest request, Done<v1::RenewResponse> done) {
  const AsyncMethod<v1::RenewRequest, v1::RenewResponse> method = &AsyncStub::Renew;
  impl_->Start(method, absl::Seconds(1), std::move(request), std::move(done));
}

void ControlClient::Release(v1::ReleaseRequest request, Done<v1::ReleaseResponse> done) {
  const AsyncMethod<v1::ReleaseRequest, v1::ReleaseResponse> method = &AsyncStub::Release;
  impl_->Start(method, absl::Seconds(1), std::move(request), std::move(done));
}

void ControlClient::Discard(v1::DiscardRequest request, Done<v1::DiscardResponse> done) {
  const AsyncMethod<v1::DiscardRequest, v1::DiscardResponse> method = &AsyncStub::Discard;
  impl_->Start(method, absl::Seconds(1), std::move(request), std::move(done));
}

void ControlClient::Cancel() {
  absl::MutexLock lock(&impl_->mu);
  // Under the lock, so that no context is deleted meanwhile; the completions run on other threads.
  for (grpc::ClientContext* context : impl_->running) context->TryCancel();
}

void ControlClient::WaitIdle() {
  absl::MutexLock lock(&impl_->mu);
  impl_->mu.Await(absl::Condition(impl_.get(), &Impl::Idle));
}

}  // namespace nosara::kvstore
