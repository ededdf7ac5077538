#include <algorithm>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kvstore/transport/ucx_connection.h"
#include "kvstore/transport/ucx_messages.h"

namespace nosara::kvstore {
namespace {

/// Replies come from ucp_worker_progress(), so on the owning thread. Only that call writes into
/// landing buffers, so without a worker nobody does.
class UcxMessageEndpoint final : public UcxEndpoint {
 public:
  UcxMessageEndpoint(std::unique_ptr<UcxConnection> connection, const ArenaAddress& arena)
      : arena_(arena), connection_(std::move(connection)) {
    std::random_device random;
    client_ = (uint64_t{random()} << 32) | random();
  }
  ~UcxMessageEndpoint() override { Close(); }

  /// Registers the reply handlers and introduces us to the target.
  absl::Status Greet();

  void Post(Transfer* transfer) override;
  absl::Status status() const override {
    return connection_ != nullptr ? connection_->status() : closed_;
  }
  void Close() override;
  bool Progress() override { return connection_ != nullptr && connection_->worker().Progress(); }
  bool Arm() override { return connection_ == nullptr || connection_->worker().Arm(); }

 private:
  /// A message in UCX's hands; keeps the header alive until it has left.
  struct Message {
    UcxMessageEndpoint* endpoint = nullptr;
    UcxMessageHeader header;
  };
  /// A transfer: done when all replies are there and all messages have left.
  struct Operation {
    Transfer* transfer = nullptr;
    size_t replies_missing = 0;
    size_t messages_in_flight = 0;
    absl::Status status;
  };

  static ucs_status_t OnReply(void* self, const void* header, size_t header_bytes, void* data,
                              size_t bytes, const ucp_am_recv_param_t* param);
  static void OnSent(void* request, ucs_status_t status, void* message);
  void HandleReply(const UcxMessageHeader& header, const void* data, size_t bytes);
  absl::Status SetHandler(UcxMessageId id);
  void Send(UcxMessageId id, const UcxMessageHeader& header, absl::Span<const std::byte> payload);
  void FinishSend(Message* message, absl::Status status);
  void FinishIfDone(uint64_t operation);
  void AwaitAnswer();

  const ArenaAddress arena_;
  std::unique_ptr<UcxConnection> connection_;  // none once closed
  std::string own_address_;                    // payload of the greeting
  uint64_t client_ = 0;
  absl::Status closed_;
  uint64_t next_operation_ = 1;
  absl::flat_hash_map<uint64_t, Operation> operations_;
  size_t in_flight_ = 0;  // messages in UCX's hands
  bool answered_ = false;
  std::vector<std::unique_ptr<Message>> all_messages_;
  std::vector<Message*> free_messages_;
};

absl::Status UcxMessageEndpoint::SetHandler(UcxMessageId id) {
  ucp_am_handler_param_t params = {};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = id;
  params.flags = UCP_AM_FLAG_WHOLE_MSG;
  params.cb = &UcxMessageEndpoint::OnReply;
  params.arg = this;
  return connection_->ToStatus(
      ucp_worker_set_am_recv_handler(connection_->worker().get(), &params));
}

absl::Status UcxMessageEndpoint::Greet() {
  RETURN_IF_ERROR(SetHandler(kUcxReadReply));
  RETURN_IF_ERROR(SetHandler(kUcxWriteReply));
  ASSIGN_OR_RETURN(own_address_, connection_->worker().Address());
  UcxMessageHeader header;
  header.client = client_;
  Send(kUcxHello, header,
       absl::MakeConstSpan(reinterpret_cast<const std::byte*>(own_address_.data()),
                           own_address_.size()));
  return absl::OkStatus();
}

void UcxMessageEndpoint::Post(Transfer* transfer) {
  absl::Status refused = status();
  if (refused.ok()) refused = CheckWithinArena(arena_, *transfer);
  if (refused.ok() && transfer->region != nullptr &&
      static_cast<const UcxRegion*>(transfer->region)->type() != UCS_MEMORY_TYPE_HOST) {
    refused = absl::UnimplementedError("UCX messages: only into host memory");
  }
  if (!refused.ok() || transfer->local.empty()) {
    transfer->Done(std::move(refused));
    return;
  }
  const uint64_t number = next_operation_++;
  const size_t bytes = transfer->local.size();
  const size_t parts = (bytes + kUcxPartBytes - 1) / kUcxPartBytes;
  operations_[number] = {transfer, parts, parts, absl::OkStatus()};
  for (size_t position = 0; position < bytes; position += kUcxPartBytes) {
    UcxMessageHeader header;
    header.client = client_;
    header.operation = number;
    header.position = position;
    header.offset = transfer->offset + position;
    header.bytes = std::min(kUcxPartBytes, bytes - position);
    if (transfer->direction == Direction::kRead) {
      Send(kUcxRead, header, {});
    } else {
      Send(kUcxWrite, header, transfer->local.subspan(position, header.bytes));
    }
  }
}

void UcxMessageEndpoint::Send(UcxMessageId id, const UcxMessageHeader& header,
                              absl::Span<const std::byte> payload) {
  if (free_messages_.empty()) {
    all_messages_.push_back(std::make_unique<Message>());
    free_messages_.push_back(all_messages_.back().get());
  }
  Message* const message = free_messages_.back();
  free_messages_.pop_back();
  message->endpoint = this;
  message->header = header;
  ++in_flight_;
  ucp_request_param_t params = {};
  params.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  params.cb.send = &UcxMessageEndpoint::OnSent;
  params.user_data = message;
  params.flags = UCP_AM_SEND_FLAG_EAGER;
  const ucs_status_ptr_t request =
      ucp_am_send_nbx(connection_->endpoint(), id, &message->header, sizeof(message->header),
                      payload.data(), payload.size(), &params);
  if (!UCS_PTR_IS_PTR(request)) {
    FinishSend(message, connection_->ToStatus(UCS_PTR_STATUS(request)));
  }
}

void UcxMessageEndpoint::OnSent(void* request, ucs_status_t status, void* user_data) {
  ucp_request_free(request);
  auto* const message = static_cast<Message*>(user_data);
  UcxMessageEndpoint* const that = message->endpoint;
  that->FinishSend(message, that->connection_->ToStatus(status));
}

void UcxMessageEndpoint::FinishSend(Message* message, absl::Status status) {
  --in_flight_;
  const uint64_t number = message->header.operation;
  free_messages_.push_back(message);
  const auto found = operations_.find(number);
  if (found == operations_.end()) return;  // the greeting
  --found->second.messages_in_flight;
  if (!status.ok()) {
    // No reply will come for it.
    --found->second.replies_missing;
    if (found->second.status.ok()) found->second.status = std::move(status);
  }
  FinishIfDone(number);
}

ucs_status_t UcxMessageEndpoint::OnReply(void* self, const void* header, size_t header_bytes,
                                         void* data, size_t bytes,
                                         const ucp_am_recv_param_t* param) {
  UcxMessageHeader parsed;
  // Everything is sent eagerly; a peer that does otherwise is not ours, and gets no answer.
  if (header_bytes != sizeof(parsed) || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    return UCS_OK;
  }
  std::memcpy(&parsed, header, sizeof(parsed));
  static_cast<UcxMessageEndpoint*>(self)->HandleReply(parsed, data, bytes);
  return UCS_OK;
}

void UcxMessageEndpoint::HandleReply(const UcxMessageHeader& header, const void* data,
                                     size_t bytes) {
  if (header.client != client_) return;
  answered_ = true;
  const auto found = operations_.find(header.operation);
  if (found == operations_.end()) return;
  Operation& operation = found->second;
  if (operation.replies_missing == 0) return;
  --operation.replies_missing;
  const absl::Span<std::byte> local = operation.transfer->local;
  absl::Status status;
  if (header.error != 0) {
    status = absl::Status(static_cast<absl::StatusCode>(header.error),
                          absl::StrCat("store ", arena_.name, ": refused a transfer"));
  } else if (operation.transfer->direction == Direction::kRead) {
    if (header.position >= local.size() ||
        bytes != std::min(kUcxPartBytes, local.size() - header.position)) {
      status = absl::InternalError(absl::StrCat("store ", arena_.name, ": sent ", bytes,
                                                " bytes for position ", header.position));
    } else {
      std::memcpy(local.data() + header.position, data, bytes);
    }
  }
  if (operation.status.ok()) operation.status = std::move(status);
  FinishIfDone(header.operation);
}

void UcxMessageEndpoint::FinishIfDone(uint64_t number) {
  const auto found = operations_.find(number);
  if (found->second.replies_missing > 0 || found->second.messages_in_flight > 0) return;
  Operation operation = std::move(found->second);
  operations_.erase(found);
  operation.transfer->Done(std::move(operation.status));
}

void UcxMessageEndpoint::AwaitAnswer() {
  // UCX 1.13 ends the process of a peer that is still connecting back to us over TCP when we go
  // away (an assertion in ucp_request_send_state_ff). Once it has answered it has connected.
  constexpr absl::Duration kPatience = absl::Milliseconds(500);
  if (answered_ || !connection_->status().ok()) return;
  UcxMessageHeader header;
  header.client = client_;
  header.operation = next_operation_++;
  header.bytes = 1;
  Send(kUcxRead, header, {});
  const absl::Time end = absl::Now() + kPatience;
  while (!answered_ && connection_->status().ok() && absl::Now() < end) {
    connection_->worker().Progress();
  }
}

void UcxMessageEndpoint::Close() {
  if (connection_ == nullptr) return;
  AwaitAnswer();
  closed_ = connection_->status();
  if (closed_.ok()) {
    closed_ = absl::CancelledError(absl::StrCat("store ", arena_.name, ": endpoint is closed"));
  }
  connection_->Abort([this] { return in_flight_ == 0; });
  connection_.reset();
  for (auto& [number, operation] : std::exchange(operations_, {})) {
    operation.transfer->Done(operation.status.ok() ? closed_ : operation.status);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<UcxEndpoint>> CreateUcxMessageEndpoint(
    std::unique_ptr<UcxConnection> connection, const ArenaAddress& arena) {
  auto endpoint = std::make_unique<UcxMessageEndpoint>(std::move(connection), arena);
  RETURN_IF_ERROR(endpoint->Greet());
  return endpoint;
}

}  // namespace nosara::kvstore
