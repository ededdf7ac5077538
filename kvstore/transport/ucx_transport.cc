#include "kvstore/transport/ucx_transport.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/ucx_handles.h"

namespace nosara::kvstore {
namespace {

class UcxRegion final : public MemoryRegion {
 public:
  UcxRegion(UcxMemory memory, ucs_memory_type_t type) : memory_(std::move(memory)), type_(type) {}
  ucp_mem_h handle() const { return memory_.get(); }
  ucs_memory_type_t type() const { return type_; }

 private:
  const UcxMemory memory_;
  const ucs_memory_type_t type_;
};

class UcxTransport;

/// How the death of a peer shows.
enum class PeerDeath {
  /// UCX tells, and a forced close completes all requests.
  kReported,
  /// UCX's shared-memory transports cannot tell; only the end of the worker ends requests.
  kSilent,
};

/// Connection to one arena, with a worker of its own: so that it can be ended whatever its peer
/// does without touching the others. Completions come from ucp_worker_progress(), so on the owning
/// thread.
class UcxEndpoint final : public Endpoint {
 public:
  static absl::StatusOr<std::unique_ptr<Endpoint>> Create(UcxTransport* transport, UcxWorker worker,
                                                          PeerDeath peer_death,
                                                          const ArenaAddress& arena);
  ~UcxEndpoint() override;

  void Post(Transfer* transfer) override;
  absl::Status status() const override { return status_; }
  void Close() override;

  bool Progress() {
    const bool flushed = FlushWrites();
    return worker_.has_value() && (worker_->Progress() || flushed);
  }
  bool Arm() { return !worker_.has_value() || worker_->Arm(); }

 private:
  /// A transfer in UCX's hands: what its callback gets.
  struct Pending {
    UcxEndpoint* endpoint = nullptr;
    Transfer* transfer = nullptr;
  };

  UcxEndpoint(UcxTransport* transport, UcxWorker worker, PeerDeath peer_death,
              const ArenaAddress& arena)
      : transport_(transport), peer_death_(peer_death), arena_(arena), worker_(std::move(worker)) {}
  /// Starts a flush for the puts that left since the last one.
  bool FlushWrites();
  void CloseByForce();
  void CloseWithWorker();
  static void OnError(void* self, ucp_ep_h endpoint, ucs_status_t status);
  static void OnTransfer(void* request, ucs_status_t status, void* pending);
  static void OnFlush(void* request, ucs_status_t status, void* self);
  void FinishTransfer(Pending* pending, ucs_status_t status);
  void FinishFlush(ucs_status_t status);
  absl::Status ToStatus(ucs_status_t status) const;
  Pending* NewPending(Transfer* transfer);

  UcxTransport* const transport_;
  const PeerDeath peer_death_;
  const ArenaAddress arena_;
  std::optional<UcxWorker> worker_;  // none once closed
  ucp_ep_h endpoint_ = nullptr;
  std::optional<UcxRemoteKey> key_;
  absl::Status status_;
  size_t outstanding_ = 0;  // requests in UCX's hands, the flush not counted
  bool flush_in_flight_ = false;
  bool abandoned_ = false;  // the worker ends: its callbacks must not complete anything twice
  std::vector<Transfer*> unflushed_;  // puts that have left, remote completion unknown
  std::vector<Transfer*> flushing_;   // puts covered by the flush in flight
  std::vector<std::unique_ptr<Pending>> all_pending_;
  std::vector<Pending*> free_pending_;
};

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

  absl::StatusOr<std::unique_ptr<Endpoint>> Connect(const ArenaAddress& arena) override {
    if (arena.ucx_address.empty() || arena.ucx_rkey.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("store ", arena.name, ": does not offer UCX"));
    }
    ASSIGN_OR_RETURN(UcxWorker worker, UcxWorker::Create(context_));
    // Leaves the set by itself when the worker closes its descriptor.
    epoll_event event = {};
    event.events = EPOLLIN;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, worker.event_fd(), &event) != 0) {
      return absl::ErrnoToStatus(errno, "epoll_ctl");
    }
    return UcxEndpoint::Create(this, std::move(worker), peer_death_, arena);
  }

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

  void Add(UcxEndpoint* endpoint) { endpoints_.push_back(endpoint); }
  void Remove(UcxEndpoint* endpoint) {
    endpoints_.erase(std::remove(endpoints_.begin(), endpoints_.end(), endpoint), endpoints_.end());
  }

 private:
  const UcxContext context_;
  const PeerDeath peer_death_;
  const FileDescriptor epoll_;  // over the workers' descriptors
  std::vector<UcxEndpoint*> endpoints_;
};

absl::StatusOr<std::unique_ptr<Endpoint>> UcxEndpoint::Create(UcxTransport* transport,
                                                              UcxWorker worker,
                                                              PeerDeath peer_death,
                                                              const ArenaAddress& arena) {
  std::unique_ptr<UcxEndpoint> endpoint(
      new UcxEndpoint(transport, std::move(worker), peer_death, arena));
  transport->Add(endpoint.get());
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(arena.ucx_address.data());
  params.err_mode =
      peer_death == PeerDeath::kReported ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
  params.err_handler.cb = &UcxEndpoint::OnError;
  params.err_handler.arg = endpoint.get();
  RETURN_IF_ERROR(UcxStatus(ucp_ep_create(endpoint->worker_->get(), &params, &endpoint->endpoint_),
                            absl::StrCat("store ", arena.name, ": connecting by UCX")));
  ASSIGN_OR_RETURN(UcxRemoteKey key, UcxRemoteKey::Create(endpoint->endpoint_, arena.ucx_rkey));
  endpoint->key_.emplace(std::move(key));
  return endpoint;
}

UcxEndpoint::~UcxEndpoint() {
  Close();
  transport_->Remove(this);
}

absl::Status UcxEndpoint::ToStatus(ucs_status_t status) const {
  return UcxStatus(status, absl::StrCat("store ", arena_.name, ": UCX"));
}

void UcxEndpoint::OnError(void* self, ucp_ep_h endpoint, ucs_status_t status) {
  auto* const that = static_cast<UcxEndpoint*>(self);
  if (that->status_.ok()) that->status_ = that->ToStatus(status);
}

UcxEndpoint::Pending* UcxEndpoint::NewPending(Transfer* transfer) {
  if (free_pending_.empty()) {
    all_pending_.push_back(std::make_unique<Pending>());
    free_pending_.push_back(all_pending_.back().get());
  }
  Pending* const pending = free_pending_.back();
  free_pending_.pop_back();
  pending->endpoint = this;
  pending->transfer = transfer;
  return pending;
}

void UcxEndpoint::Post(Transfer* transfer) {
  if (!status_.ok()) {
    transfer->Done(status_);
    return;
  }
  const uint64_t bytes = transfer->local.size();
  if (bytes > arena_.arena_bytes || transfer->offset > arena_.arena_bytes - bytes) {
    transfer->Done(absl::InvalidArgumentError(
        absl::StrCat("store ", arena_.name, ": bytes ", transfer->offset, " to ",
                     transfer->offset + bytes, ": the arena has ", arena_.arena_bytes)));
    return;
  }
  Pending* const pending = NewPending(transfer);
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  params.cb.send = &UcxEndpoint::OnTransfer;
  params.user_data = pending;
  if (const auto* region = static_cast<const UcxRegion*>(transfer->region); region != nullptr) {
    params.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    params.memh = region->handle();
    params.memory_type = region->type();
  }
  const uint64_t address = arena_.remote_address + transfer->offset;
  const ucs_status_ptr_t request =
      transfer->direction == Direction::kRead
          ? ucp_get_nbx(endpoint_, transfer->local.data(), bytes, address, key_->get(), &params)
          : ucp_put_nbx(endpoint_, transfer->local.data(), bytes, address, key_->get(), &params);
  ++outstanding_;
  // Without a request there is no callback: it was completed, or failed, at once.
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    FinishTransfer(pending, UCS_PTR_STATUS(request));
  }
}

void UcxEndpoint::OnTransfer(void* request, ucs_status_t status, void* user_data) {
  auto* const pending = static_cast<Pending*>(user_data);
  ucp_request_free(request);
  if (pending->endpoint->abandoned_) return;
  pending->endpoint->FinishTransfer(pending, status);
}

void UcxEndpoint::FinishTransfer(Pending* pending, ucs_status_t status) {
  --outstanding_;
  Transfer* const transfer = std::exchange(pending->transfer, nullptr);
  free_pending_.push_back(pending);
  if (status == UCS_OK && transfer->direction == Direction::kWrite) {
    unflushed_.push_back(transfer);
    return;
  }
  transfer->Done(ToStatus(status));
}

bool UcxEndpoint::FlushWrites() {
  if (unflushed_.empty() || flush_in_flight_ || endpoint_ == nullptr || !status_.ok()) return false;
  flushing_.swap(unflushed_);
  flush_in_flight_ = true;
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  params.cb.send = &UcxEndpoint::OnFlush;
  params.user_data = this;
  const ucs_status_ptr_t request = ucp_ep_flush_nbx(endpoint_, &params);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) FinishFlush(UCS_PTR_STATUS(request));
  return true;
}

void UcxEndpoint::OnFlush(void* request, ucs_status_t status, void* self) {
  ucp_request_free(request);
  auto* const that = static_cast<UcxEndpoint*>(self);
  if (!that->abandoned_) that->FinishFlush(status);
}

void UcxEndpoint::FinishFlush(ucs_status_t status) {
  flush_in_flight_ = false;
  const std::vector<Transfer*> flushed = std::exchange(flushing_, {});
  const absl::Status result = ToStatus(status);
  for (Transfer* transfer : flushed) transfer->Done(result);
}

void UcxEndpoint::Close() {
  if (!worker_.has_value()) return;
  if (status_.ok()) {
    status_ = absl::CancelledError(absl::StrCat("store ", arena_.name, ": endpoint is closed"));
  }
  if (endpoint_ != nullptr && peer_death_ == PeerDeath::kReported) CloseByForce();
  CloseWithWorker();
  for (Transfer* transfer : std::exchange(unflushed_, {})) transfer->Done(status_);
}

/// Completes every request with an error. Only then is it safe to give the landing buffers back, so
/// there is no way out of these loops but that.
void UcxEndpoint::CloseByForce() {
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &params);
  if (UCS_PTR_IS_PTR(request)) {
    while (ucp_request_check_status(request) == UCS_INPROGRESS) worker_->Progress();
    ucp_request_free(request);
  }
  while (outstanding_ > 0 || flush_in_flight_) worker_->Progress();
}

/// Without its worker nothing of this endpoint touches memory any more: the transports that are
/// closed this way copy within calls of Progress().
void UcxEndpoint::CloseWithWorker() {
  abandoned_ = true;
  key_.reset();
  worker_.reset();
  endpoint_ = nullptr;
  for (const std::unique_ptr<Pending>& pending : all_pending_) {
    if (pending->transfer == nullptr) continue;
    --outstanding_;
    std::exchange(pending->transfer, nullptr)->Done(status_);
  }
  CHECK(outstanding_ == 0);
  for (Transfer* transfer : std::exchange(flushing_, {})) transfer->Done(status_);
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
