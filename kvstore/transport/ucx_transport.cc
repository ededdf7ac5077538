#include "kvstore/transport/ucx_transport.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/ucx_connection.h"
#include "kvstore/transport/ucx_handles.h"

namespace nosara::kvstore {
namespace {

/// Progresses its endpoints, each of which has a UCX worker; sleeps on all of them by epoll.
class UcxTransport final : public Transport {
 public:
  UcxTransport(UcxContext context, PeerDeath peer_death, FileDescriptor epoll)
      : context_(std::move(context)), peer_death_(peer_death), epoll_(std::move(epoll)) {}
  ~UcxTransport() override { CHECK(endpoints_.empty()); }

  Path path() const override { return Path::kUcx; }

  absl::StatusOr<std::unique_ptr<MemoryRegion>> Register(absl::Span<std::byte> memory,
                                                         MemoryKind kind) override {
    ucs_memory_type_t type = UCS_MEMORY_TYPE_HOST;
    if (kind == MemoryKind::kCuda) {
      if (!context_.SupportsCuda()) {
        return absl::UnimplementedError("UCX transport: this UCX has no support for CUDA memory");
      }
      type = UCS_MEMORY_TYPE_CUDA;
    }
    ASSIGN_OR_RETURN(UcxMemory registered, UcxMemory::Create(context_, memory, type));
    return std::make_unique<UcxRegion>(std::move(registered), type);
  }

  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override;

  bool Progress() override {
    bool active = false;
    for (UcxEndpoint* endpoint : endpoints_) active |= endpoint->Progress();
    return active;
  }
  int event_fd() const override { return epoll_.get(); }
  bool Arm() override {
    for (UcxEndpoint* endpoint : endpoints_) {
      if (!endpoint->Arm()) return false;
    }
    return true;
  }

 private:
  /// An endpoint that leaves endpoints_ when it goes.
  class Listed;

  const UcxContext context_;
  const PeerDeath peer_death_;
  const FileDescriptor epoll_;  // over the workers' descriptors
  std::vector<UcxEndpoint*> endpoints_;
};

class UcxTransport::Listed final : public Endpoint {
 public:
  Listed(UcxTransport* transport, std::unique_ptr<UcxEndpoint> endpoint)
      : transport_(transport), endpoint_(std::move(endpoint)) {
    transport_->endpoints_.push_back(endpoint_.get());
  }
  ~Listed() override { std::erase(transport_->endpoints_, endpoint_.get()); }

  void Post(Transfer* transfer) override { endpoint_->Post(transfer); }
  absl::Status status() const override { return endpoint_->status(); }
  void Close() override { endpoint_->Close(); }

 private:
  UcxTransport* const transport_;
  const std::unique_ptr<UcxEndpoint> endpoint_;
};

absl::StatusOr<std::unique_ptr<Endpoint>> UcxTransport::Connect(const ArenaAddress& arena) {
  if (arena.ucx_address.empty() || arena.ucx_rkey.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("store ", arena.name, ": does not offer UCX"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<UcxConnection> connection,
                   UcxConnection::Create(context_, arena.name, arena.ucx_address, peer_death_));
  // Leaves the set by itself when the worker closes its descriptor.
  epoll_event event = {};
  event.events = EPOLLIN;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection->worker().event_fd(), &event) != 0) {
    return absl::ErrnoToStatus(errno, "epoll_ctl");
  }
  std::unique_ptr<UcxEndpoint> endpoint;
  if (peer_death_ == PeerDeath::kSilent || connection->HasRemoteDma()) {
    ASSIGN_OR_RETURN(endpoint, CreateUcxRmaEndpoint(std::move(connection), arena));
  } else {
    ASSIGN_OR_RETURN(endpoint, CreateUcxMessageEndpoint(std::move(connection), arena));
  }
  return std::make_unique<Listed>(this, std::move(endpoint));
}

/// True for lists of shared-memory transports only.
bool IsSharedMemoryOnly(const std::string& tls) {
  if (tls.empty()) return false;
  for (const absl::string_view name : absl::StrSplit(tls, ',')) {
    if (name != "sm" && name != "shm" && name != "self" && name != "posix" && name != "sysv" &&
        name != "cma" && name != "knem" && name != "xpmem") {
      return false;
    }
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const std::string& tls) {
  FileDescriptor epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll.valid()) return absl::ErrnoToStatus(errno, "epoll_create1");
  ASSIGN_OR_RETURN(UcxContext context, UcxContext::Create(tls));
  return std::make_unique<UcxTransport>(
      std::move(context), IsSharedMemoryOnly(tls) ? PeerDeath::kSilent : PeerDeath::kReported,
      std::move(epoll));
}

}  // namespace nosara::kvstore
