#include "kvstore/server/kvstore_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "kvstore/server/arena.h"
#include "kvstore/server/kvstore_service.h"
#include "kvstore/transport/ucx_target.h"

namespace nosara::kvstore {
namespace {

/// Requests carry up to 65,536 keys.
constexpr int kMaxMessageBytes = 16 << 20;

uint64_t NewEpoch() {
  std::random_device random;
  uint64_t epoch = 0;
  // The upper half marks the generations of this incarnation: it must not be 0 either.
  while ((epoch >> 32) == 0) epoch = (uint64_t{random()} << 32) | random();
  return epoch;
}

}  // namespace

absl::Status KvStoreServerOptions::Validate() const {
  if (arena_bytes == 0) {
    return absl::InvalidArgumentError("arena_bytes = 0: must be at least the size of one page");
  }
  if (arena_bytes > uint64_t{1} << 46) {
    return absl::InvalidArgumentError(
        absl::StrCat("arena_bytes = ", arena_bytes, ": must be at most 64 TiB"));
  }
  if (node_id.empty() || node_id.size() > 255) {
    return absl::InvalidArgumentError(
        absl::StrCat("node_id '", node_id, "': must have 1 to 255 characters"));
  }
  if (lease_ttl < absl::Milliseconds(100) || lease_ttl > absl::Hours(24)) {
    return absl::InvalidArgumentError(
        absl::StrCat("lease_ttl = ", absl::FormatDuration(lease_ttl), ": must be 100ms to 24h"));
  }
  if (quarantine < absl::ZeroDuration() || quarantine > absl::Hours(24)) {
    return absl::InvalidArgumentError(
        absl::StrCat("quarantine = ", absl::FormatDuration(quarantine), ": must be 0s to 24h"));
  }
  if (arena_folder.empty()) {
    return absl::InvalidArgumentError("arena_folder is empty: must be a folder in shared memory");
  }
  return absl::OkStatus();
}

KvStoreServer::KvStoreServer() = default;

absl::StatusOr<std::unique_ptr<KvStoreServer>> KvStoreServer::Create(
    const KvStoreServerOptions& options) {
  RETURN_IF_ERROR(options.Validate());
  std::unique_ptr<KvStoreServer> server(new KvStoreServer);
  server->epoch_ = NewEpoch();
  Arena::Options arena;
  arena.bytes = options.arena_bytes;
  arena.folder = options.arena_folder;
  arena.epoch = server->epoch_;
  ASSIGN_OR_RETURN(server->arena_, Arena::Create(arena));
  server->startup_.map = server->arena_->startup().map;
  server->startup_.allocate = server->arena_->startup().allocate;
  server->startup_.huge_bytes = server->arena_->startup().huge_bytes;

  KvStoreServiceImpl::Options service;
  service.node_id = options.node_id;
  service.epoch = server->epoch_;
  service.lease_ttl = options.lease_ttl;
  service.quarantine = options.quarantine;
  service.eviction = options.eviction;
  service.namespace_quota_bytes = options.namespace_quota_bytes;
  service.namespace_quotas_bytes = options.namespace_quotas_bytes;
  service.arena = server->arena();
  service.arena_path = server->arena_->path();
  service.host_id = server->arena_->host_id();
  service.clock = options.clock;
  if (options.ucx == KvStoreServerOptions::Ucx::kOn) {
    const absl::Time started = Clock::Real()->Now();
    absl::StatusOr<std::unique_ptr<UcxTarget>> ucx =
        UcxTarget::Create(server->arena(), options.ucx_tls);
    if (!ucx.ok()) {
      return absl::Status(
          ucx.status().code(),
          absl::StrCat("ucx_tls = '", options.ucx_tls, "': UCX cannot start (",
                       ucx.status().message(),
                       "); name other transports, or serve this host only with ucx = off"));
    }
    server->ucx_ = *std::move(ucx);
    server->startup_.register_memory = Clock::Real()->Now() - started;
    service.ucx_address = server->ucx_->address();
    service.ucx_rkey = server->ucx_->rkey();
  }
  server->service_ = std::make_unique<KvStoreServiceImpl>(std::move(service));

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  // Two stores at one address would answer each other's clients at random.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  int port = 0;
  if (!options.listen.empty()) {
    builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port);
  }
  builder.RegisterService(server->service_.get());
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || (!options.listen.empty() && port == 0)) {
    return absl::UnavailableError(
        absl::StrCat("listen '", options.listen, "': cannot listen there (is the port in use?)"));
  }
  if (!options.listen.empty()) {
    server->address_ = absl::StrCat(options.listen.substr(0, options.listen.rfind(':')), ":", port);
  }
  const absl::Duration period =
      std::clamp(options.lease_ttl / 4, absl::Milliseconds(20), absl::Seconds(1));
  server->expire_thread_ = std::thread([raw = server.get(), period] { raw->ExpireLoop(period); });
  return server;
}

void KvStoreServer::ExpireLoop(absl::Duration period) {
  while (!stop_.WaitForNotificationWithTimeout(period)) service_->ExpireLeases();
}

KvStoreServer::~KvStoreServer() { Stop(); }

void KvStoreServer::Stop() {
  if (stop_.HasBeenNotified()) return;
  stop_.Notify();
  if (server_ != nullptr) {
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
    server_->Wait();
  }
  if (expire_thread_.joinable()) expire_thread_.join();
  if (service_ != nullptr) service_->Stop();
  ucx_.reset();
}

std::shared_ptr<grpc::Channel> KvStoreServer::InProcessChannel() {
  return server_->InProcessChannel(grpc::ChannelArguments());
}

absl::Span<std::byte> KvStoreServer::arena() const {
  return absl::MakeSpan(arena_->data(), arena_->bytes());
}

const std::string& KvStoreServer::arena_path() const { return arena_->path(); }

KvStoreStats KvStoreServer::Stats() const { return service_->Stats(); }

void KvStoreServer::WaitForVerify() { service_->WaitForVerify(); }

absl::Status KvStoreServer::CheckIntegrity() const { return service_->CheckIntegrity(); }

}  // namespace nosara::kvstore
