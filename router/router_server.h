// The router as a server: gRPC API, health, reflection, drain.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace grpc {
class Channel;
class Server;
class Service;
}  // namespace grpc

namespace nosara::router {

class RouterCore;

struct RouterServerOptions {
  // "host:port" to listen on; port 0: any free one.
  std::string listen = "127.0.0.1:50050";
  // Workers as "host:port".
  std::vector<std::string> worker_addresses;
  // Workers as (name in logs, channel), e.g. in the same process; besides worker_addresses.
  std::vector<std::pair<std::string, std::shared_ptr<grpc::Channel>>> worker_channels;
  // Models as "name=directory with the tokenizer"; at least one.
  std::vector<std::string> models;
  // Name of the routing policy, see MakeRoutingPolicy.
  std::string policy = "least_loaded";
  // How often workers are asked for their load, and when a report is old; 10 ms or more.
  absl::Duration poll_interval = absl::Milliseconds(500);
  absl::Duration stale_after = absl::Seconds(2);
  // Largest request, in bytes; larger ones get RESOURCE_EXHAUSTED from gRPC. 1 KiB to 1 GiB.
  int max_message_bytes = 16 << 20;
  // Streams of one connection at a time; further ones wait at the client. 1 or more.
  int max_streams_per_connection = 1024;
  // Generations at a time; further ones get RESOURCE_EXHAUSTED. 1 or more.
  int max_open_requests = 4096;
  // Threads that tokenize, and prompts that may wait for them; 1 or more.
  int text_threads = 2;
  int text_queue = 256;
  // What clients are told to wait when the router itself is full.
  absl::Duration retry_delay = absl::Seconds(1);

  /// INVALID_ARGUMENT names the field, the value and what is allowed.
  absl::Status Validate() const;
};

/// A running router. Thread-safe.
///
/// Health (grpc.health.v1, of "" and of "nosara.inference.v1.InferenceService"): SERVING while at
/// least one worker can be used and the router does not drain.
class RouterServer final {
 public:
  /// Loads the tokenizers and listens. INVALID_ARGUMENT for bad options; UNAVAILABLE when the
  /// address cannot be listened on; errors of Tokenizer::Load. Workers need not be there yet.
  static absl::StatusOr<std::unique_ptr<RouterServer>> Create(RouterServerOptions options);
  /// Shutdown without a drain.
  ~RouterServer();
  RouterServer(const RouterServer&) = delete;
  RouterServer& operator=(const RouterServer&) = delete;

  /// The port that it listens on.
  int port() const { return port_; }
  /// "host:port" that it listens on.
  std::string address() const;

  /// A connection within the process; not after Shutdown.
  std::shared_ptr<grpc::Channel> InProcessChannel();

  /// Waits until at least `workers` workers can be used, or for `timeout`; true if they can.
  bool AwaitWorkers(int workers, absl::Duration timeout);

  /// Blocks until Shutdown has ended.
  void Wait() ABSL_LOCKS_EXCLUDED(mu_);

  /// Drains: no new request is taken, running ones go on for at most `drain_timeout` and are
  /// cancelled then. Blocks until all have ended. Idempotent.
  void Shutdown(absl::Duration drain_timeout) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  class HealthReporter;

  RouterServer();
  absl::Status Start(const RouterServerOptions& options);

  // Constant after Create.
  std::unique_ptr<RouterCore> core_;
  std::shared_ptr<HealthReporter> health_;
  std::unique_ptr<grpc::Service> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string host_;
  int port_ = 0;

  absl::Mutex mu_;
  bool shutting_down_ ABSL_GUARDED_BY(mu_) = false;
  bool shut_down_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace nosara::router
