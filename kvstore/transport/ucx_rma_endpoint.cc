#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kvstore/transport/ucx_connection.h"

namespace nosara::kvstore {
namespace {

/// Completions come from ucp_worker_progress(), so on the owning thread.
class UcxRmaEndpoint final : public UcxEndpoint {
 public:
  UcxRmaEndpoint(std::unique_ptr<UcxConnection> connection, UcxRemoteKey key,
                 const ArenaAddress& arena)
      : arena_(arena), connection_(std::move(connection)), key_(std::move(key)) {}
  ~UcxRmaEndpoint() override { Close(); }

  void Post(Transfer* transfer) override;
  absl::Status status() const override {
    return connection_ != nullptr ? connection_->status() : closed_;
  }
  void Close() override;
  bool Progress() override {
    if (connection_ == nullptr) return false;
    const bool flushed = FlushWrites();
    return connection_->worker().Progress() || flushed;
  }
  bool Arm() override { return connection_ == nullptr || connection_->worker().Arm(); }

 private:
  /// A transfer in UCX's hands: what its callback gets.
  struct Pending {
    UcxRmaEndpoint* endpoint = nullptr;
    Transfer* transfer = nullptr;
  };

  static void OnTransfer(void* request, ucs_status_t status, void* pending);
  static void OnFlush(void* request, ucs_status_t status, void* self);
  /// Starts a flush for the puts that left since the last one.
  bool FlushWrites();
  void FinishTransfer(Pending* pending, absl::Status status);
  void FinishFlush(absl::Status status);
  Pending* NewPending(Transfer* transfer);

  const ArenaAddress arena_;
  std::unique_ptr<UcxConnection> connection_;  // none once closed
  std::optional<UcxRemoteKey> key_;
  absl::Status closed_;
  size_t outstanding_ = 0;  // requests in UCX's hands, the flush not counted
  bool flush_in_flight_ = false;
  bool abandoned_ = false;            // the worker ends: its callbacks complete nothing any more
  std::vector<Transfer*> unflushed_;  // puts that have left, remote completion unknown
  std::vector<Transfer*> flushing_;   // puts covered by the flush in flight
  std::vector<std::unique_ptr<Pending>> all_pending_;
  std::vector<Pending*> free_pending_;
};

UcxRmaEndpoint::Pending* UcxRmaEndpoint::NewPending(Transfer* transfer) {
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

void UcxRmaEndpoint::Post(Transfer* transfer) {
  absl::Status refused = status();
  if (refused.ok()) refused = CheckWithinArena(arena_, *transfer);
  if (!refused.ok()) {
    transfer->Done(std::move(refused));
    return;
  }
  Pending* const pending = NewPending(transfer);
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  params.cb.send = &UcxRmaEndpoint::OnTransfer;
  params.user_data = pending;
  if (const auto* region = static_cast<const UcxRegion*>(transfer->region); region != nullptr) {
    params.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    params.memh = region->handle();
    params.memory_type = region->type();
  }
  const uint64_t address = arena_.remote_address + transfer->offset;
  ucp_ep_h const endpoint = connection_->endpoint();
  std::byte* const local = transfer->local.data();
  const size_t bytes = transfer->local.size();
  const ucs_status_ptr_t request =
      transfer->direction == Direction::kRead
          ? ucp_get_nbx(endpoint, local, bytes, address, key_->get(), &params)
          : ucp_put_nbx(endpoint, local, bytes, address, key_->get(), &params);
  ++outstanding_;
  // Without a request there is no callback: it was completed, or failed, at once.
  if (!UCS_PTR_IS_PTR(request)) {
    FinishTransfer(pending, connection_->ToStatus(UCS_PTR_STATUS(request)));
  }
}

void UcxRmaEndpoint::OnTransfer(void* request, ucs_status_t status, void* user_data) {
  auto* const pending = static_cast<Pending*>(user_data);
  ucp_request_free(request);
  UcxRmaEndpoint* const that = pending->endpoint;
  if (!that->abandoned_) that->FinishTransfer(pending, that->connection_->ToStatus(status));
}

void UcxRmaEndpoint::FinishTransfer(Pending* pending, absl::Status status) {
  --outstanding_;
  Transfer* const transfer = std::exchange(pending->transfer, nullptr);
  free_pending_.push_back(pending);
  if (status.ok() && transfer->direction == Direction::kWrite) {
    unflushed_.push_back(transfer);
    return;
  }
  transfer->Done(std::move(status));
}

bool UcxRmaEndpoint::FlushWrites() {
  if (unflushed_.empty() || flush_in_flight_ || !connection_->status().ok()) return false;
  flushing_.swap(unflushed_);
  flush_in_flight_ = true;
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  params.cb.send = &UcxRmaEndpoint::OnFlush;
  params.user_data = this;
  const ucs_status_ptr_t request = ucp_ep_flush_nbx(connection_->endpoint(), &params);
  if (!UCS_PTR_IS_PTR(request)) FinishFlush(connection_->ToStatus(UCS_PTR_STATUS(request)));
  return true;
}

void UcxRmaEndpoint::OnFlush(void* request, ucs_status_t status, void* self) {
  ucp_request_free(request);
  auto* const that = static_cast<UcxRmaEndpoint*>(self);
  if (!that->abandoned_) that->FinishFlush(that->connection_->ToStatus(status));
}

void UcxRmaEndpoint::FinishFlush(absl::Status status) {
  flush_in_flight_ = false;
  for (Transfer* transfer : std::exchange(flushing_, {})) transfer->Done(status);
}

void UcxRmaEndpoint::Close() {
  if (connection_ == nullptr) return;
  closed_ = connection_->status();
  if (closed_.ok()) {
    closed_ = absl::CancelledError(absl::StrCat("store ", arena_.name, ": endpoint is closed"));
  }
  connection_->Abort([this] { return outstanding_ == 0 && !flush_in_flight_; });
  // Where nothing was completed, the end of the worker is what makes the buffers safe:
  // shared-memory transports copy within calls of Progress().
  abandoned_ = true;
  key_.reset();
  connection_.reset();
  for (const std::unique_ptr<Pending>& pending : all_pending_) {
    if (pending->transfer == nullptr) continue;
    --outstanding_;
    std::exchange(pending->transfer, nullptr)->Done(closed_);
  }
  CHECK(outstanding_ == 0);
  for (Transfer* transfer : std::exchange(flushing_, {})) transfer->Done(closed_);
  for (Transfer* transfer : std::exchange(unflushed_, {})) transfer->Done(closed_);
}

}  // namespace

absl::StatusOr<std::unique_ptr<UcxEndpoint>> CreateUcxRmaEndpoint(
    std::unique_ptr<UcxConnection> connection, const ArenaAddress& arena) {
  ASSIGN_OR_RETURN(UcxRemoteKey key, UcxRemoteKey::Create(connection->endpoint(), arena.ucx_rkey));
  return std::make_unique<UcxRmaEndpoint>(std::move(connection), std::move(key), arena);
}

}  // namespace nosara::kvstore
