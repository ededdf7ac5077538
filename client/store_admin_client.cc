#include "client/store_admin_client.h"

#include <grpc/grpc.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"

namespace nosara::client {

namespace v1 = kvstore::v1;

struct StoreAdminClient::Impl {
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::KvStoreService::Stub::*method)(
                                    grpc::ClientContext*, const Request&, Response*),
                                const Request& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    Response response;
    const grpc::Status status = (*stub.*method)(&context, request, &response);
    if (status.ok()) return response;
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                        absl::StrCat("store ", name, ": ", status.error_message()));
  }

  std::string name;
  std::unique_ptr<v1::KvStoreService::Stub> stub;
};

absl::StatusOr<std::unique_ptr<StoreAdminClient>> StoreAdminClient::Connect(
    const std::string& address) {
  if (address.empty()) return absl::InvalidArgumentError("store is empty: must be host:port");
  // Never undone: when its last object dies, gRPC waits up to 10 s for a poller of its own.
  static std::once_flag once;
  std::call_once(once, grpc_init);
  auto impl = std::make_unique<Impl>();
  impl->name = address;
  impl->stub =
      v1::KvStoreService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  return std::unique_ptr<StoreAdminClient>(new StoreAdminClient(std::move(impl)));
}

StoreAdminClient::StoreAdminClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StoreAdminClient::~StoreAdminClient() = default;

absl::StatusOr<v1::GetStatsResponse> StoreAdminClient::Stats() {
  return impl_->Call(&v1::KvStoreService::Stub::GetStats, v1::GetStatsRequest());
}

absl::StatusOr<v1::DrainResponse> StoreAdminClient::Drain() {
  return impl_->Call(&v1::KvStoreService::Stub::Drain, v1::DrainRequest());
}

absl::StatusOr<v1::EvictResponse> StoreAdminClient::Evict(uint64_t max_pages,
                                                          const std::string& namespace_key) {
  v1::EvictRequest request;
  request.set_max_pages(max_pages);
  request.set_namespace_key(namespace_key);
  return impl_->Call(&v1::KvStoreService::Stub::Evict, request);
}

absl::StatusOr<v1::VerifyProgress> StoreAdminClient::StartVerify(uint64_t bytes_per_second) {
  v1::StartVerifyRequest request;
  request.set_bytes_per_second(bytes_per_second);
  return impl_->Call(&v1::KvStoreService::Stub::StartVerify, request);
}

absl::StatusOr<v1::VerifyProgress> StoreAdminClient::VerifyProgress() {
  return impl_->Call(&v1::KvStoreService::Stub::GetVerifyProgress, v1::GetVerifyProgressRequest());
}

}  // namespace nosara::client
