#include "worker/worker_server.h"

#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/service_type.h>

#include <mutex>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/notification.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/worker_service.h"

namespace nosara::worker {
namespace {

/// Longest prompt and output as ids, with room.
constexpr int kMaxMessageBytes = 64 << 20;

void SetStores(kvstore::GrpcStoreClient& client, const std::vector<cluster::Member>& members) {
  std::vector<kvstore::StoreEndpoint> stores;
  std::vector<std::string> names;
  for (const cluster::Member& member : members) {
    stores.push_back({member.address, nullptr, {}});
    names.push_back(absl::StrCat(member.id, " at ", member.address));
  }
  if (const absl::Status set = client.SetStores(std::move(stores)); !set.ok()) {
    LogWarning("stores are as before: {}", set.ToString());
    return;
  }
  LogInfo("stores now: {}", absl::StrJoin(names, ", "));
}

}  // namespace

absl::Status WorkerServerOptions::Validate() const {
  if (model_dir.empty()) {
    return absl::InvalidArgumentError("model_dir: none given; must be a folder with config.json");
  }
  if (model_name.empty()) {
    return absl::InvalidArgumentError("model_name: empty; must be the name that requests ask for");
  }
  if (worker_id.empty()) return absl::InvalidArgumentError("worker_id: must not be empty");
  if (stores.empty() && !etcd.has_value()) {
    return absl::InvalidArgumentError(
        "stores: none given; at least one host:port is needed, or etcd");
  }
  if (!stores.empty() && etcd.has_value()) {
    return absl::InvalidArgumentError("stores and etcd are both given: must be one of them");
  }
  if (repair_bytes_per_second < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("repair_bytes_per_second = ", repair_bytes_per_second, ": must be 0 or more"));
  }
  if (etcd.has_value()) RETURN_IF_ERROR(etcd->Validate());
  if (replicas < 1 || replicas > 8) {
    return absl::InvalidArgumentError(absl::StrCat("replicas = ", replicas, ": must be 1 to 8"));
  }
  return engine.Validate();
}

absl::StatusOr<std::unique_ptr<WorkerServer>> WorkerServer::Create(WorkerServerOptions options) {
  RETURN_IF_ERROR(options.Validate());
  std::unique_ptr<WorkerServer> server(new WorkerServer);
  RETURN_IF_ERROR(server->Start(std::move(options)));
  return server;
}

absl::Status WorkerServer::Start(WorkerServerOptions options) {
  ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(options.model_dir));
  for (int* slots : {&options.backend.slots_per_head, &options.cuda_backend.slots_per_head}) {
    if (*slots == -1) *slots = checkpoint_->config().nosa.topk_blocks;
  }
  options_ = std::move(options);
  ASSIGN_OR_RETURN(const kvstore::PageLayout layout, CpuBackend::LayoutFor(checkpoint_->config()));
  kvstore::GrpcStoreClientOptions store(layout);
  store.stores = options_.stores;
  store.replicas = static_cast<size_t>(options_.replicas);
  store.repair_bytes_per_second = static_cast<uint64_t>(options_.repair_bytes_per_second);
  if (options_.etcd.has_value()) {
    store.membership = kvstore::GrpcStoreClientOptions::Membership::kDynamic;
  }
  store.data_path = options_.store_path;
  store.ucx_tls = options_.ucx_tls;
  ASSIGN_OR_RETURN(store_, kvstore::GrpcStoreClient::Create(std::move(store)));
  if (options_.etcd.has_value()) {
    ASSIGN_OR_RETURN(stores_watcher_,
                     cluster::MemberWatcher::Create(
                         *options_.etcd, cluster::Role::kStore,
                         [store = store_.get()](const std::vector<cluster::Member>& members) {
                           SetStores(*store, members);
                         }));
  }
  ASSIGN_OR_RETURN(auto backend, MakeBackend());
  ASSIGN_OR_RETURN(
      engine_, Engine::Create(std::move(backend), store_.get(), Clock::Real(), options_.engine));

  // Switches of the whole process, for the servers built after them.
  static std::once_flag once;
  std::call_once(once, [] {
    // Never undone: when its last object dies, gRPC waits up to 10 s for a poller of its own.
    grpc_init();
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
  WorkerIdentity identity;
  identity.worker_id = options_.worker_id;
  identity.model = options_.model_name;
  std::random_device random;
  identity.epoch = (uint64_t{random()} << 32 | random()) | 1;
  service_ = MakeWorkerService(engine_.get(), store_.get(), std::move(identity));
  grpc::ServerBuilder builder;
  int port = 0;
  if (!options_.listen.empty()) {
    builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port);
  }
  builder.RegisterService(service_.get());
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || (!options_.listen.empty() && port == 0)) {
    return absl::UnavailableError(absl::StrCat("listen: cannot listen on '", options_.listen,
                                               "'; is the port in use, the host local?"));
  }
  if (port != 0) {
    address_ = absl::StrCat(options_.listen.substr(0, options_.listen.rfind(':')), ":", port);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Backend>> WorkerServer::MakeBackend() {
  using Device = WorkerServerOptions::Device;
  const bool cuda =
      options_.device == Device::kCuda ||
      (options_.device == Device::kAuto && checkpoint_->config().dtype == DType::kBf16 &&
       CudaUsable(options_.cuda_backend.device));
  SchedulerLimits& limits = options_.engine.limits;
  if (cuda) {
    // What is computed does not depend on it; matrix products want many rows.
    limits.chunk_tokens = (options_.cuda_backend.max_unstored_blocks - 1) * 64;
    limits.step_tokens = options_.cuda_backend.max_prefill_rows;
  }
  if (options_.prefill_chunk_tokens != 0) limits.chunk_tokens = options_.prefill_chunk_tokens;
  if (options_.step_tokens != 0) limits.step_tokens = options_.step_tokens;
  if (cuda) {
    // So that the arenas on this machine are known to the GPU before the first request; stores that
    // come later are met later.
    absl::Notification connected;
    store_->Connect([&connected](absl::Status) { connected.Notify(); });
    connected.WaitForNotification();
    CudaBackendOptions options = options_.cuda_backend;
    options.num_stores = static_cast<int>(options_.stores.size());
    return MakeCudaBackend(checkpoint_, store_.get(), options);
  }
  return CpuBackend::Create(checkpoint_, store_.get(), options_.backend);
}

WorkerServer::~WorkerServer() { Shutdown(absl::ZeroDuration()); }

std::shared_ptr<grpc::Channel> WorkerServer::InProcessChannel() {
  return server_->InProcessChannel(grpc::ChannelArguments());
}

std::string WorkerServer::Describe() const {
  const ModelConfig& config = checkpoint_->config();
  return absl::StrCat("model ", options_.model_name, " (", checkpoint_->weight_bytes() >> 20,
                      " MiB ", DTypeName(config.dtype), ", context ",
                      config.max_position_embeddings, "), ", engine_->backend().Describe());
}

void WorkerServer::Shutdown(absl::Duration drain_timeout) {
  if (server_ == nullptr) return;
  engine_->Drain();
  // Refuses new streams at once, cancels what still runs when the time is up.
  server_->Shutdown(absl::ToChronoTime(absl::Now() + drain_timeout));
  server_->Wait();
  engine_->Stop();
  if (stores_watcher_ != nullptr) stores_watcher_->Stop();
  store_->Close();
  server_ = nullptr;
}

}  // namespace nosara::worker
