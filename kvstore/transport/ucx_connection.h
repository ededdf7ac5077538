// One UCX endpoint with a worker of its own, so that it can be ended whatever its peer does,
// without touching others.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvstore/transport/transport.h"
#include "kvstore/transport/ucx_handles.h"

namespace nosara::kvstore {

/// How the death of a peer shows.
enum class PeerDeath {
  kReported,  // UCX tells, and a forced close completes all requests
  kSilent,    // shared memory: UCX cannot tell, only the end of the worker ends requests
};

/// Used by one thread.
class UcxConnection final {
 public:
  /// `peer` is for messages, `address` the peer's worker address.
  static absl::StatusOr<std::unique_ptr<UcxConnection>> Create(const UcxContext& context,
                                                               std::string peer,
                                                               const std::string& address,
                                                               PeerDeath peer_death);
  UcxConnection(const UcxConnection&) = delete;
  UcxConnection& operator=(const UcxConnection&) = delete;
  ~UcxConnection();

  UcxWorker& worker() { return worker_; }
  ucp_ep_h endpoint() const { return endpoint_; }
  /// OK until UCX reports that the peer is gone.
  const absl::Status& status() const { return status_; }
  /// `status` as ours, naming the peer.
  absl::Status ToStatus(ucs_status_t status) const;

  /// True when reads and writes go by hardware, without the peer's processor.
  bool HasRemoteDma() const;

  /// Closes the endpoint by force if that is possible and progresses until `quiet()`: then UCX has
  /// completed, with an error, all requests. Where deaths are silent nothing is completed: what is
  /// open ends with this object.
  void Abort(const std::function<bool()>& quiet);

 private:
  UcxConnection(UcxWorker worker, std::string peer, PeerDeath peer_death)
      : worker_(std::move(worker)), peer_(std::move(peer)), peer_death_(peer_death) {}
  static void OnError(void* self, ucp_ep_h endpoint, ucs_status_t status);

  UcxWorker worker_;
  const std::string peer_;
  const PeerDeath peer_death_;
  ucp_ep_h endpoint_ = nullptr;
  absl::Status status_;
};

/// An endpoint that UcxTransport progresses.
class UcxEndpoint : public Endpoint {
 public:
  virtual bool Progress() = 0;
  virtual bool Arm() = 0;
};

/// Reads and writes by ucp_get and ucp_put: hardware where there is any, shared memory.
absl::StatusOr<std::unique_ptr<UcxEndpoint>> CreateUcxRmaEndpoint(
    std::unique_ptr<UcxConnection> connection, const ArenaAddress& arena);

/// Reads and writes by active messages that the target answers (ucx_messages.h).
absl::StatusOr<std::unique_ptr<UcxEndpoint>> CreateUcxMessageEndpoint(
    std::unique_ptr<UcxConnection> connection, const ArenaAddress& arena);

/// A registration with UCX.
class UcxRegion final : public MemoryRegion {
 public:
  UcxRegion(UcxMemory memory, ucs_memory_type_t type) : memory_(std::move(memory)), type_(type) {}
  ucp_mem_h handle() const { return memory_.get(); }
  ucs_memory_type_t type() const { return type_; }

 private:
  const UcxMemory memory_;
  const ucs_memory_type_t type_;
};

/// INVALID_ARGUMENT when the transfer leaves the arena.
absl::Status CheckWithinArena(const ArenaAddress& arena, const Transfer& transfer);

}  // namespace nosara::kvstore
