#include "cluster/etcd_client.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "etcdserverpb/rpc.grpc.pb.h"

namespace nosara::cluster {
namespace {

constexpr absl::Duration kDeadline = absl::Seconds(2);
/// mvccpb.Event.type.
constexpr int kDeleted = 1;

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& endpoint) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // A watch is silent for hours: only this tells that the machine behind it is gone. etcd refuses
  // clients that ask more often than each 5 s.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  return grpc::CreateCustomChannel(endpoint, grpc::InsecureChannelCredentials(), arguments);
}

/// Behind all keys that begin with `prefix`: the last byte that can grow grows.
std::string EndOf(std::string prefix) {
  while (!prefix.empty() && static_cast<unsigned char>(prefix.back()) == 0xff) prefix.pop_back();
  if (!prefix.empty()) ++prefix.back();
  return prefix;
}

}  // namespace

struct EtcdClient::Impl {
  /// A call that Stop() can end.
  class Call {
   public:
    enum class When { kUntilStop, kAlways };
    Call(Impl* impl, When when, absl::Duration deadline) : impl_(impl) {
      // A call that fails at once would not move the connection on, which only calls that wait do.
      context.set_wait_for_ready(true);
      if (deadline < absl::InfiniteDuration()) {
        context.set_deadline(std::chrono::system_clock::now() +
                             absl::ToChronoMilliseconds(deadline));
      }
      if (when == When::kAlways) return;
      absl::MutexLock lock(&impl_->mu);
      if (impl_->stopped) context.TryCancel();
      impl_->running.insert(&context);
    }
    ~Call() {
      absl::MutexLock lock(&impl_->mu);
      impl_->running.erase(&context);
    }

    grpc::ClientContext context;

   private:
    Impl* const impl_;
  };

  absl::Status ToStatus(const grpc::Status& status) {
    if (status.ok()) return absl::OkStatus();
    {
      absl::MutexLock lock(&mu);
      if (stopped) return absl::CancelledError("etcd client is stopped");
    }
    auto code = static_cast<absl::StatusCode>(status.error_code());
    if (code == absl::StatusCode::kDeadlineExceeded) {
      return absl::UnavailableError(absl::StrCat("etcd ", name, ": cannot be reached"));
    }
    return absl::Status(code, absl::StrCat("etcd ", name, ": ", status.error_message()));
  }

  std::string name;
  std::unique_ptr<etcdserverpb::KV::Stub> kv;
  std::unique_ptr<etcdserverpb::Lease::Stub> lease;
  std::unique_ptr<etcdserverpb::Watch::Stub> watch;

  absl::Mutex mu;
  bool stopped ABSL_GUARDED_BY(mu) = false;
  absl::flat_hash_set<grpc::ClientContext*> running ABSL_GUARDED_BY(mu);
};

EtcdClient::EtcdClient(const std::string& endpoint) : impl_(std::make_unique<Impl>()) {
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(endpoint);
  impl_->name = endpoint;
  impl_->kv = etcdserverpb::KV::NewStub(channel);
  impl_->lease = etcdserverpb::Lease::NewStub(channel);
  impl_->watch = etcdserverpb::Watch::NewStub(channel);
}

EtcdClient::~EtcdClient() { Stop(); }

absl::StatusOr<int64_t> EtcdClient::GrantLease(absl::Duration ttl) {
  Impl::Call call(impl_.get(), Impl::Call::When::kUntilStop, kDeadline);
  etcdserverpb::LeaseGrantRequest request;
  request.set_ttl(absl::ToInt64Seconds(ttl));
  etcdserverpb::LeaseGrantResponse response;
  const grpc::Status status = impl_->lease->LeaseGrant(&call.context, request, &response);
  if (!status.ok()) return impl_->ToStatus(status);
  if (!response.error().empty()) {
    return absl::UnavailableError(absl::StrCat("etcd ", impl_->name, ": ", response.error()));
  }
  return response.id();
}

absl::Status EtcdClient::KeepLeaseAlive(int64_t lease) {
  Impl::Call call(impl_.get(), Impl::Call::When::kUntilStop, kDeadline);
  const auto stream = impl_->lease->LeaseKeepAlive(&call.context);
  etcdserverpb::LeaseKeepAliveRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseKeepAliveResponse response;
  if (stream->Write(request) && stream->WritesDone() && stream->Read(&response)) {
    call.context.TryCancel();
    (void)stream->Finish();
    if (response.ttl() > 0) return absl::OkStatus();
    return absl::NotFoundError(absl::StrCat("etcd ", impl_->name, ": the lease has ended"));
  }
  const absl::Status status = impl_->ToStatus(stream->Finish());
  if (!status.ok()) return status;
  return absl::UnavailableError(absl::StrCat("etcd ", impl_->name, ": no answer"));
}

absl::Status EtcdClient::RevokeLease(int64_t lease) {
  Impl::Call call(impl_.get(), Impl::Call::When::kAlways, kDeadline);
  etcdserverpb::LeaseRevokeRequest request;
  request.set_id(lease);
  etcdserverpb::LeaseRevokeResponse response;
  return impl_->ToStatus(impl_->lease->LeaseRevoke(&call.context, request, &response));
}

absl::Status EtcdClient::Put(const std::string& key, const std::string& value, int64_t lease) {
  Impl::Call call(impl_.get(), Impl::Call::When::kUntilStop, kDeadline);
  etcdserverpb::PutRequest request;
  request.set_key(key);
  request.set_value(value);
  request.set_lease(lease);
  etcdserverpb::PutResponse response;
  return impl_->ToStatus(impl_->kv->Put(&call.context, request, &response));
}

absl::StatusOr<EtcdClient::Keys> EtcdClient::List(const std::string& prefix) {
  Impl::Call call(impl_.get(), Impl::Call::When::kUntilStop, kDeadline);
  etcdserverpb::RangeRequest request;
  request.set_key(prefix);
  request.set_range_end(EndOf(prefix));
  etcdserverpb::RangeResponse response;
  const grpc::Status status = impl_->kv->Range(&call.context, request, &response);
  if (!status.ok()) return impl_->ToStatus(status);
  Keys keys;
  keys.revision = response.header().revision();
  for (const mvccpb::KeyValue& kv : response.kvs()) keys.values[kv.key()] = kv.value();
  return keys;
}

absl::Status EtcdClient::Watch(const std::string& prefix, Keys keys,
                               const std::function<void(const Keys&)>& on_change) {
  Impl::Call call(impl_.get(), Impl::Call::When::kUntilStop, absl::InfiniteDuration());
  const auto stream = impl_->watch->Watch(&call.context);
  etcdserverpb::WatchRequest request;
  request.mutable_create_request()->set_key(prefix);
  request.mutable_create_request()->set_range_end(EndOf(prefix));
  request.mutable_create_request()->set_start_revision(keys.revision + 1);
  absl::Status ended = absl::UnavailableError(absl::StrCat("etcd ", impl_->name, ": watch ended"));
  if (stream->Write(request)) {
    etcdserverpb::WatchResponse response;
    while (stream->Read(&response)) {
      if (response.canceled()) {
        ended = absl::UnavailableError(
            absl::StrCat("etcd ", impl_->name, ": watch was ended: ", response.cancel_reason()));
        break;
      }
      if (response.events().empty()) continue;
      for (const mvccpb::Event& event : response.events()) {
        if (event.type() == kDeleted) {
          keys.values.erase(event.kv().key());
        } else {
          keys.values[event.kv().key()] = event.kv().value();
        }
      }
      keys.revision = response.header().revision();
      on_change(keys);
    }
  }
  call.context.TryCancel();
  const absl::Status status = impl_->ToStatus(stream->Finish());
  return absl::IsUnavailable(status) ? status : ended;
}

void EtcdClient::Stop() {
  absl::MutexLock lock(&impl_->mu);
  impl_->stopped = true;
  // Under the lock, so that no context ends meanwhile.
  for (grpc::ClientContext* context : impl_->running) context->TryCancel();
}

}  // namespace nosara::cluster
