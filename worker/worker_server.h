// A whole worker: model, backend, engine, store client, gRPC server. What nosara-worker runs, and
// what a process that serves everything embeds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cluster/member.h"
#include "cluster/member_watcher.h"
#include "kvstore/client/grpc_store_client.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/backend/cuda/cuda_backend_options.h"
#include "worker/engine/engine.h"

namespace grpc {
class Channel;
class Server;
class Service;
}  // namespace grpc

namespace nosara::worker {

struct WorkerServerOptions {
  /// Address to listen on, "host:port"; port 0 takes a free one. Empty: no socket, only
  /// InProcessChannel().
  std::string listen = "127.0.0.1:0";
  /// Folder of the checkpoint.
  std::string model_dir;
  /// Name that requests ask for.
  std::string model_name;
  /// Name of this worker, unique in its cluster.
  std::string worker_id = "worker";
  /// The KV store nodes, at least one; or none, and `etcd` tells.
  std::vector<kvstore::StoreEndpoint> stores;
  /// Where the KV store nodes publish themselves.
  std::optional<cluster::EtcdLocation> etcd;
  /// Copies of each page on different stores, where there are so many: 1 to 8.
  int replicas = 1;
  /// How fast lost copies are restored, bytes of pages per second; 0: not at all.
  int64_t repair_bytes_per_second = int64_t{64} << 20;
  kvstore::DataPath store_path = kvstore::DataPath::kAuto;
  /// UCX transports, in UCX's notation; empty: UCX chooses.
  std::string ucx_tls;
  /// What computes.
  enum class Device {
    kAuto,  // a GPU where there is one and the model is bf16, else the CPU
    kCpu,
    kCuda,
  };
  Device device = Device::kAuto;
  /// Of the two, the one that `device` comes to is used. slots_per_head -1: the fewest that the
  /// model allows.
  CpuBackendOptions backend;
  CudaBackendOptions cuda_backend;
  EngineOptions engine;
  /// Instead of engine.limits, which are the backend's own where these are 0; tokens.
  int prefill_chunk_tokens = 0;
  int step_tokens = 0;

  absl::Status Validate() const;
};

/// Thread-safe. Runs from Create() until Shutdown() or destruction.
class WorkerServer final {
 public:
  /// Errors: those of Validate() and Checkpoint::Open; UNAVAILABLE when it cannot listen. Stores
  /// may start later.
  static absl::StatusOr<std::unique_ptr<WorkerServer>> Create(WorkerServerOptions options);
  WorkerServer(const WorkerServer&) = delete;
  WorkerServer& operator=(const WorkerServer&) = delete;
  ~WorkerServer();

  /// "host:port" with the real port; empty without a socket.
  const std::string& address() const { return address_; }
  /// For clients in this process. Not after Shutdown().
  std::shared_ptr<grpc::Channel> InProcessChannel();

  const Engine& engine() const { return *engine_; }
  kvstore::ClientStats store_stats() const { return store_->stats(); }
  /// One line: model, backend, slots, stores.
  std::string Describe() const;

  /// Refuses new requests, lets running ones go on for at most `drain_timeout`, then fails them
  /// with UNAVAILABLE. Idempotent.
  void Shutdown(absl::Duration drain_timeout);

 private:
  WorkerServer() = default;
  absl::Status Start(WorkerServerOptions options);
  absl::StatusOr<std::unique_ptr<Backend>> MakeBackend();

  WorkerServerOptions options_;
  std::string address_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  // Destroyed in the reverse order: the engine and its backend use the store client.
  std::unique_ptr<kvstore::GrpcStoreClient> store_;
  std::unique_ptr<cluster::MemberWatcher> stores_watcher_;  // null without etcd
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<grpc::Service> service_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace nosara::worker
