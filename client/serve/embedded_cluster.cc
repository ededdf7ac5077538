#include "client/serve/embedded_cluster.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::client {
namespace {

// The worker is in the same process: it answers as soon as its threads run.
constexpr absl::Duration kPatience = absl::Seconds(30);
// Names in logs and, for the store, part of where chains live.
constexpr char kStoreName[] = "embedded-store";
constexpr char kWorkerName[] = "embedded-worker";

}  // namespace

absl::StatusOr<std::unique_ptr<EmbeddedCluster>> EmbeddedCluster::Create(
    const EmbeddedClusterOptions& options) {
  auto cluster = std::unique_ptr<EmbeddedCluster>(new EmbeddedCluster);

  kvstore::KvStoreServerOptions store;
  store.listen.clear();
  store.node_id = kStoreName;
  store.arena_bytes = options.arena_bytes;
  store.arena_folder = options.arena_folder;
  store.ucx = kvstore::KvStoreServerOptions::Ucx::kOff;
  ASSIGN_OR_RETURN(cluster->store_, kvstore::KvStoreServer::Create(store));

  worker::WorkerServerOptions worker;
  worker.listen.clear();
  worker.model_dir = options.model_dir;
  worker.model_name = options.model_name;
  worker.worker_id = kWorkerName;
  kvstore::StoreEndpoint endpoint;
  endpoint.address = kStoreName;
  endpoint.channel = cluster->store_->InProcessChannel();
  endpoint.in_process_arena = cluster->store_->arena();
  worker.stores.push_back(std::move(endpoint));
  worker.backend.slots_per_head = options.slots_per_head;
  worker.device = worker::WorkerServerOptions::Device::kCpu;
  worker.backend.threads = options.threads;
  worker.backend.cache_bytes = options.cache_bytes;
  ASSIGN_OR_RETURN(cluster->worker_, worker::WorkerServer::Create(std::move(worker)));

  router::RouterServerOptions router;
  router.listen = options.listen;
  router.worker_channels.emplace_back(kWorkerName, cluster->worker_->InProcessChannel());
  router.models = {absl::StrCat(options.model_name, "=", options.model_dir)};
  ASSIGN_OR_RETURN(cluster->router_, router::RouterServer::Create(std::move(router)));
  if (!cluster->router_->AwaitWorkers(1, kPatience)) {
    return absl::UnavailableError(
        absl::StrCat("the worker did not get ready within ", absl::FormatDuration(kPatience)));
  }
  return cluster;
}

void EmbeddedCluster::Shutdown(absl::Duration drain_timeout) {
  if (router_) router_->Shutdown(drain_timeout);
  if (worker_) worker_->Shutdown(absl::ZeroDuration());
  if (store_) store_->Stop();
}

}  // namespace nosara::client
