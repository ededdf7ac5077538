#include "router/router_server.h"

#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/service_type.h>

#include <mutex>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "router/grpc_worker_client.h"
#include "router/router_service.h"
#include "router/static_membership.h"

namespace nosara::router {
namespace {

constexpr char kServiceName[] = "nosara.inference.v1.InferenceService";

absl::Status CheckAtLeast(absl::string_view field, int64_t value, int64_t low) {
  if (value >= low) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, "; must be ", low, " or more"));
}

absl::Status CheckAddress(absl::string_view field, const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon != std::string::npos && colon > 0 &&
      absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 0 && port <= 65535) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": '", address, "'; must be host:port with a port from 0 to 65535"));
}

}  // namespace

// Tells gRPC's health service how many workers there are. The membership's thread may have news
// before the server exists and after it is gone.
class RouterServer::HealthReporter final {
 public:
  void SetServer(grpc::Server* server) {
    absl::MutexLock lock(&mu_);
    server_ = server;
    Tell();
  }
  void SetUsableWorkers(int workers) {
    absl::MutexLock lock(&mu_);
    usable_workers_ = workers;
    Tell();
  }

 private:
  void Tell() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (server_ == nullptr) return;
    grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
    health->SetServingStatus("", usable_workers_ > 0);
    health->SetServingStatus(kServiceName, usable_workers_ > 0);
  }

  absl::Mutex mu_;
  grpc::Server* server_ ABSL_GUARDED_BY(mu_) = nullptr;
  int usable_workers_ ABSL_GUARDED_BY(mu_) = 0;
};

absl::Status RouterServerOptions::Validate() const {
  RETURN_IF_ERROR(CheckAddress("listen", listen));
  for (const std::string& worker : worker_addresses) {
    RETURN_IF_ERROR(CheckAddress("workers", worker));
  }
  if (worker_addresses.empty() && worker_channels.empty()) {
    return absl::InvalidArgumentError("workers: none given; at least one host:port is needed");
  }
  if (models.empty()) {
    return absl::InvalidArgumentError("model: none given; at least one name=directory is needed");
  }
  RETURN_IF_ERROR(MakeRoutingPolicy(policy).status());
  RETURN_IF_ERROR(
      CheckAtLeast("poll_interval in ms", absl::ToInt64Milliseconds(poll_interval), 10));
  RETURN_IF_ERROR(CheckAtLeast("stale_after in ms", absl::ToInt64Milliseconds(stale_after), 10));
  RETURN_IF_ERROR(CheckAtLeast("max_message_bytes", max_message_bytes, 1024));
  RETURN_IF_ERROR(CheckAtLeast("max_streams_per_connection", max_streams_per_connection, 1));
  RETURN_IF_ERROR(CheckAtLeast("max_open_requests", max_open_requests, 1));
  RETURN_IF_ERROR(CheckAtLeast("text_threads", text_threads, 1));
  return CheckAtLeast("text_queue", text_queue, 1);
}

RouterServer::RouterServer() = default;

absl::StatusOr<std::unique_ptr<RouterServer>> RouterServer::Create(RouterServerOptions options) {
  RETURN_IF_ERROR(options.Validate());
  auto server = std::unique_ptr<RouterServer>(new RouterServer);
  RETURN_IF_ERROR(server->Start(options));
  return server;
}

absl::Status RouterServer::Start(const RouterServerOptions& options) {
  core_ = std::make_unique<RouterCore>();
  health_ = std::make_shared<HealthReporter>();
  ASSIGN_OR_RETURN(core_->models, ModelRegistry::Load(options.models));
  ASSIGN_OR_RETURN(core_->policy, MakeRoutingPolicy(options.policy));
  core_->pool = std::make_unique<TaskPool>(options.text_threads, options.text_queue);
  core_->max_open_requests = options.max_open_requests;
  core_->retry_delay = options.retry_delay;

  std::vector<std::shared_ptr<WorkerHandle>> workers;
  for (const std::string& address : options.worker_addresses) {
    workers.push_back(
        std::make_shared<WorkerHandle>(address, MakeGrpcWorkerClient(MakeWorkerChannel(address))));
  }
  for (const auto& [name, channel] : options.worker_channels) {
    workers.push_back(std::make_shared<WorkerHandle>(name, MakeGrpcWorkerClient(channel)));
  }
  StaticMembership::Options membership;
  membership.poll_interval = options.poll_interval;
  membership.stale_after = options.stale_after;
  membership.on_change = [health = health_](int usable) { health->SetUsableWorkers(usable); };
  core_->membership = std::make_unique<StaticMembership>(std::move(workers), std::move(membership));

  // Switches of the whole process, for the servers built after them.
  static std::once_flag once;
  std::call_once(once, [] {
    // Never undone: when its last object dies, gRPC waits up to 10 s for a poller of its own.
    grpc_init();
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
  service_ = MakeRouterService(core_.get());
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port_);
  builder.RegisterService(service_.get());
  builder.SetMaxReceiveMessageSize(options.max_message_bytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  // With it two routers would share a port silently.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || port_ == 0) {
    return absl::UnavailableError(absl::StrCat("listen: cannot listen on '", options.listen,
                                               "'; is the port in use, the host local?"));
  }
  host_ = options.listen.substr(0, options.listen.rfind(':'));
  health_->SetServer(server_.get());
  return absl::OkStatus();
}

RouterServer::~RouterServer() { Shutdown(absl::ZeroDuration()); }

std::string RouterServer::address() const { return absl::StrCat(host_, ":", port_); }

std::shared_ptr<grpc::Channel> RouterServer::InProcessChannel() {
  return server_->InProcessChannel(grpc::ChannelArguments());
}

bool RouterServer::AwaitWorkers(int workers, absl::Duration timeout) {
  return core_->membership->AwaitWorkers(workers, timeout);
}

void RouterServer::Wait() {
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(&shut_down_));
}

void RouterServer::Shutdown(absl::Duration drain_timeout) {
  {
    absl::MutexLock lock(&mu_);
    if (shutting_down_) {
      mu_.Await(absl::Condition(&shut_down_));
      return;
    }
    shutting_down_ = true;
  }
  // From the top down: the health service first, then the requests, then what they use.
  if (health_) health_->SetServer(nullptr);
  if (server_) {
    server_->GetHealthCheckService()->Shutdown();
    server_->Shutdown(absl::ToChronoTime(absl::Now() + drain_timeout));
  }
  if (core_ && core_->pool) core_->pool->Shutdown();
  // The calls to workers end last, on gRPC's threads.
  if (core_) core_->AwaitIdle();
  if (core_ && core_->membership) core_->membership->Stop();
  absl::MutexLock lock(&mu_);
  shut_down_ = true;
}

}  // namespace nosara::router
