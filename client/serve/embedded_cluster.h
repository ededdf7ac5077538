// KV store, worker and router in one process.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/server/kvstore_server.h"
#include "router/router_server.h"
#include "worker/worker_server.h"

namespace nosara::client {

struct EmbeddedClusterOptions {
  // Address of the router, "host:port"; port 0: any free one. Store and worker have none: they are
  // reached within the process.
  std::string listen = "127.0.0.1:50050";
  // Folder of the model, and the name that requests ask for.
  std::string model_dir;
  std::string model_name;
  // Memory for pages of the KV cache in shared memory, bytes.
  uint64_t arena_bytes = uint64_t{256} << 20;
  std::string arena_folder = "/dev/shm";
  // Blocks of a sequence that the worker keeps per layer and KV head; 0: all, -1: the fewest that
  // the model allows.
  int slots_per_head = 0;
  // Compute threads, 1 or more.
  int threads = 2;
  // Memory of the worker for all sequences, bytes.
  int64_t cache_bytes = int64_t{4} << 30;
};

/// Owns the three servers; the bytes between worker and store never leave the process. Thread-safe
/// as they are.
class EmbeddedCluster final {
 public:
  /// Returns when requests are served. Errors of the three servers; UNAVAILABLE when the worker
  /// does not get ready.
  static absl::StatusOr<std::unique_ptr<EmbeddedCluster>> Create(
      const EmbeddedClusterOptions& options);
  ~EmbeddedCluster() { Shutdown(absl::ZeroDuration()); }
  EmbeddedCluster(const EmbeddedCluster&) = delete;
  EmbeddedCluster& operator=(const EmbeddedCluster&) = delete;

  /// "host:port" of the router.
  std::string address() const { return router_->address(); }
  router::RouterServer& router() { return *router_; }
  /// One line about the worker.
  std::string Describe() const { return worker_->Describe(); }

  /// Running requests go on for at most `drain_timeout`. Idempotent.
  void Shutdown(absl::Duration drain_timeout);

 private:
  EmbeddedCluster() = default;

  // In the order of who uses whom: each one only those above it.
  std::unique_ptr<kvstore::KvStoreServer> store_;
  std::unique_ptr<worker::WorkerServer> worker_;
  std::unique_ptr<router::RouterServer> router_;
};

}  // namespace nosara::client
