// A whole KV store node: arena, control plane, data plane. What nosara-kvstore runs, and what a
// process that serves everything embeds.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "base/clock.h"
#include "kvstore/api/page_key.h"
#include "kvstore/server/eviction_policy.h"
#include "kvstore/server/kvstore_stats.h"

namespace grpc {
class Channel;
class Server;
}  // namespace grpc

namespace nosara::kvstore {

class Arena;
class KvStoreServiceImpl;
class UcxTarget;

struct KvStoreServerOptions {
  /// Address of the control plane, "host:port"; port 0 takes a free one. Empty: no socket, only
  /// InProcessChannel().
  std::string listen = "127.0.0.1:0";
  /// Memory for pages, in bytes.
  uint64_t arena_bytes = uint64_t{256} << 20;
  /// Folder of the arena file, in shared memory.
  std::string arena_folder = "/dev/shm";
  /// Name of this node, unique in its cluster; 1 to 255 characters.
  std::string node_id = "kvstore";
  /// How long a lease lives without renewal; at least 100 ms.
  absl::Duration lease_ttl = absl::Seconds(30);
  /// How long a slot whose writer has vanished is kept from reuse. Longer than a write can be on
  /// its way.
  absl::Duration quarantine = absl::Seconds(60);
  /// Which pages go when the store is full.
  EvictionKind eviction = EvictionKind::kS3Fifo;
  /// How much the pages of one namespace (model, layout and tenant) may take; 0: no limit. One that
  /// has reached this gives up its own idle pages for new ones, or is refused.
  uint64_t namespace_quota_bytes = 0;
  /// For these namespaces instead; 0: no limit.
  absl::flat_hash_map<PageKey, uint64_t> namespace_quotas_bytes;
  /// Data plane beside direct mapping.
  enum class Ucx { kOn, kOff };
  Ucx ucx = Ucx::kOn;
  /// UCX transports, in UCX's notation ("tcp", "sm,self,tcp"); empty: UCX chooses.
  std::string ucx_tls;
  /// For leases. Lives longer than the server.
  const Clock* clock = Clock::Real();

  /// INVALID_ARGUMENT names the field, its value and what is allowed.
  absl::Status Validate() const;
};

/// Thread-safe. Runs from Create() until Stop() or destruction.
class KvStoreServer final {
 public:
  /// Errors: those of Validate(); RESOURCE_EXHAUSTED (no room for the arena); UNAVAILABLE (cannot
  /// listen at the address, UCX does not start).
  static absl::StatusOr<std::unique_ptr<KvStoreServer>> Create(const KvStoreServerOptions& options);
  KvStoreServer(const KvStoreServer&) = delete;
  KvStoreServer& operator=(const KvStoreServer&) = delete;
  ~KvStoreServer();

  /// "host:port" that it listens on, with the real port; empty without a socket.
  const std::string& address() const { return address_; }
  uint64_t epoch() const { return epoch_; }
  const std::string& arena_path() const;

  /// Control plane without a socket, for clients in this process. Not after Stop().
  std::shared_ptr<grpc::Channel> InProcessChannel();
  /// The arena, for clients in this process; valid while the server lives.
  absl::Span<std::byte> arena() const;

  KvStoreStats Stats() const;

  /// What Create() took.
  struct Startup {
    absl::Duration map;
    absl::Duration allocate;
    absl::Duration register_memory;  // with UCX; zero without
    uint64_t huge_bytes = 0;         // of the arena, in huge pages
  };
  const Startup& startup() const { return startup_; }

  /// For tests: blocks until no page is being verified.
  void WaitForVerify();
  /// For tests: see PageIndex::CheckIntegrity().
  absl::Status CheckIntegrity() const;

  /// Ends running calls (at once: they are short), then the data plane. Idempotent.
  void Stop();

 private:
  KvStoreServer();
  void ExpireLoop(absl::Duration period);

  uint64_t epoch_ = 0;
  std::string address_;
  Startup startup_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<UcxTarget> ucx_;  // null without UCX
  std::unique_ptr<KvStoreServiceImpl> service_;
  std::unique_ptr<grpc::Server> server_;
  absl::Notification stop_;
  std::thread expire_thread_;
};

}  // namespace nosara::kvstore
