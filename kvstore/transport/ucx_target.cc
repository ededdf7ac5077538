#include "kvstore/transport/ucx_target.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kvstore/transport/arena_file.h"
#include "kvstore/transport/ucx_handles.h"
#include "kvstore/transport/ucx_messages.h"

namespace nosara::kvstore {
namespace {

/// Empty progress calls before the thread sleeps: some tens of microseconds, about what waking up
/// costs.
constexpr int kIdleSpins = 200;

}  // namespace

/// All but construction and destruction happens on thread_.
class UcxTarget::Impl final {
 public:
  Impl(UcxContext context, UcxWorker worker, UcxMemory memory, FileDescriptor wake,
       absl::Span<std::byte> arena)
      : arena_(arena),
        context_(std::move(context)),
        worker_(std::move(worker)),
        memory_(std::move(memory)),
        wake_(std::move(wake)) {}

  ~Impl() {
    if (!thread_.joinable()) return;
    // Release: nothing is published but the flag; the thread reads it after the wake-up.
    stop_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    CHECK(write(wake_.get(), &one, sizeof(one)) == sizeof(one));
    thread_.join();
  }

  absl::Status SetHandlers();
  void Start() {
    thread_ = std::thread([this] { Run(); });
  }

 private:
  struct Client {
    ucp_ep_h endpoint = nullptr;
    bool failed = false;
  };
  /// An endpoint that UCX is closing; its error callback may still hold the client.
  struct Closing {
    void* request = nullptr;
    std::unique_ptr<Client> client;
  };
  /// A message that came in, kept until it is safe to answer: outside of UCX's callbacks.
  struct Request {
    UcxMessageId id;
    UcxMessageHeader header;
    std::string address;  // kUcxHello
  };
  /// A reply in UCX's hands.
  struct Reply {
    Impl* target = nullptr;
    UcxMessageHeader header;
  };

  template <UcxMessageId kId>
  static ucs_status_t OnMessage(void* self, const void* header, size_t header_bytes, void* data,
                                size_t bytes, const ucp_am_recv_param_t* param);
  static void OnSent(void* request, ucs_status_t status, void* reply);
  static void OnError(void* client, ucp_ep_h endpoint, ucs_status_t status);
  void Receive(UcxMessageId id, const UcxMessageHeader& header, const void* data, size_t bytes);
  absl::Status SetHandler(UcxMessageId id, ucp_am_recv_callback_t callback);

  void Run();
  bool AnswerRequests();
  void Welcome(uint64_t id, const std::string& address);
  void Send(Client& client, UcxMessageId id, const UcxMessageHeader& header,
            absl::Span<const std::byte> payload);
  bool CloseFailedClients();
  void CloseClient(std::unique_ptr<Client> client);
  /// Ends close requests that are through.
  bool FinishClosing();
  bool WithinArena(const UcxMessageHeader& header) const {
    return header.bytes <= arena_.size() && header.offset <= arena_.size() - header.bytes;
  }

  const absl::Span<std::byte> arena_;
  UcxContext context_;
  UcxWorker worker_;
  UcxMemory memory_;
  FileDescriptor wake_;
  std::atomic<bool> stop_ = false;
  // By client id; the values stay where they are, UCX's error callback holds their addresses.
  absl::flat_hash_map<uint64_t, std::unique_ptr<Client>> clients_;
  std::vector<Request> requests_;
  std::vector<Closing> closing_;
  std::vector<std::unique_ptr<Reply>> all_replies_;
  std::vector<Reply*> free_replies_;
  std::thread thread_;
};

template <UcxMessageId kId>
ucs_status_t UcxTarget::Impl::OnMessage(void* self, const void* header, size_t header_bytes,
                                        void* data, size_t bytes,
                                        const ucp_am_recv_param_t* param) {
  UcxMessageHeader parsed;
  if (header_bytes == sizeof(parsed) && (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
    std::memcpy(&parsed, header, sizeof(parsed));
    static_cast<Impl*>(self)->Receive(kId, parsed, data, bytes);
  }
  return UCS_OK;
}

absl::Status UcxTarget::Impl::SetHandler(UcxMessageId id, ucp_am_recv_callback_t callback) {
  ucp_am_handler_param_t params = {};
  params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                      UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  params.id = id;
  params.flags = UCP_AM_FLAG_WHOLE_MSG;
  params.cb = callback;
  params.arg = this;
  return UcxStatus(ucp_worker_set_am_recv_handler(worker_.get(), &params), "UCX message handler");
}

absl::Status UcxTarget::Impl::SetHandlers() {
  RETURN_IF_ERROR(SetHandler(kUcxHello, &Impl::OnMessage<kUcxHello>));
  RETURN_IF_ERROR(SetHandler(kUcxRead, &Impl::OnMessage<kUcxRead>));
  return SetHandler(kUcxWrite, &Impl::OnMessage<kUcxWrite>);
}

void UcxTarget::Impl::Receive(UcxMessageId id, const UcxMessageHeader& header, const void* data,
                              size_t bytes) {
  Request request{id, header, {}};
  if (id == kUcxHello) {
    request.address.assign(static_cast<const char*>(data), bytes);
  } else if (!WithinArena(header) || (id == kUcxWrite && bytes != header.bytes)) {
    request.header.error = static_cast<uint64_t>(absl::StatusCode::kInvalidArgument);
  } else if (id == kUcxWrite) {
    // At once, because UCX takes the data back when this returns.
    std::memcpy(arena_.data() + header.offset, data, bytes);
  }
  requests_.push_back(std::move(request));
}

bool UcxTarget::Impl::AnswerRequests() {
  if (requests_.empty()) return false;
  const std::vector<Request> requests = std::exchange(requests_, {});
  for (const Request& request : requests) {
    const UcxMessageHeader& header = request.header;
    if (request.id == kUcxHello) {
      Welcome(header.client, request.address);
      continue;
    }
    const auto found = clients_.find(header.client);
    if (found == clients_.end() || found->second->failed) continue;  // nobody to answer
    if (request.id == kUcxRead && header.error == 0) {
      Send(*found->second, kUcxReadReply, header, arena_.subspan(header.offset, header.bytes));
    } else {
      Send(*found->second, request.id == kUcxRead ? kUcxReadReply : kUcxWriteReply, header, {});
    }
  }
  return true;
}

void UcxTarget::Impl::Welcome(uint64_t id, const std::string& address) {
  if (clients_.contains(id) || address.empty()) return;
  auto client = std::make_unique<Client>();
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &Impl::OnError;
  params.err_handler.arg = client.get();
  const ucs_status_t status = ucp_ep_create(worker_.get(), &params, &client->endpoint);
  if (status != UCS_OK) {
    LogWarning("UCX: a client cannot be answered: {}", ucs_status_string(status));
    return;
  }
  clients_.emplace(id, std::move(client));
}

void UcxTarget::Impl::Send(Client& client, UcxMessageId id, const UcxMessageHeader& header,
                           absl::Span<const std::byte> payload) {
  if (free_replies_.empty()) {
    all_replies_.push_back(std::make_unique<Reply>());
    free_replies_.push_back(all_replies_.back().get());
  }
  Reply* const reply = free_replies_.back();
  free_replies_.pop_back();
  reply->target = this;
  reply->header = header;
  ucp_request_param_t params = {};
  params.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  params.cb.send = &Impl::OnSent;
  params.user_data = reply;
  params.flags = UCP_AM_SEND_FLAG_EAGER;
  const ucs_status_ptr_t request =
      ucp_am_send_nbx(client.endpoint, id, &reply->header, sizeof(reply->header), payload.data(),
                      payload.size(), &params);
  // An error is the client's death, which the error callback tells too.
  if (!UCS_PTR_IS_PTR(request)) free_replies_.push_back(reply);
}

void UcxTarget::Impl::OnSent(void* request, ucs_status_t status, void* user_data) {
  ucp_request_free(request);
  auto* const reply = static_cast<Reply*>(user_data);
  reply->target->free_replies_.push_back(reply);
}

void UcxTarget::Impl::OnError(void* client, ucp_ep_h endpoint, ucs_status_t status) {
  // Closing is not allowed in here: CloseFailedClients() does it.
  static_cast<Client*>(client)->failed = true;
}

bool UcxTarget::Impl::CloseFailedClients() {
  bool closed = false;
  for (auto it = clients_.begin(); it != clients_.end();) {
    if (!it->second->failed) {
      ++it;
      continue;
    }
    CloseClient(std::move(it->second));
    clients_.erase(it++);
    closed = true;
  }
  return closed;
}

void UcxTarget::Impl::CloseClient(std::unique_ptr<Client> client) {
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(client->endpoint, &params);
  if (UCS_PTR_IS_PTR(request)) closing_.push_back({request, std::move(client)});
}

bool UcxTarget::Impl::FinishClosing() {
  return std::erase_if(closing_, [](const Closing& closing) {
           if (ucp_request_check_status(closing.request) == UCS_INPROGRESS) return false;
           ucp_request_free(closing.request);
           return true;
         }) > 0;
}

void UcxTarget::Impl::Run() {
  int idle = 0;
  while (!stop_.load(std::memory_order_acquire)) {
    bool active = worker_.Progress();
    active |= AnswerRequests();
    active |= CloseFailedClients();
    active |= FinishClosing();
    if (active) {
      idle = 0;
      continue;
    }
    if (++idle < kIdleSpins || !worker_.Arm()) continue;
    pollfd fds[2] = {{worker_.event_fd(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) {
      LogError("UCX thread: poll failed with errno {}", errno);
      break;
    }
    idle = 0;
  }
  for (auto& [id, client] : clients_) CloseClient(std::move(client));
  clients_.clear();
  while (!closing_.empty()) {
    worker_.Progress();
    FinishClosing();
  }
}

absl::StatusOr<std::unique_ptr<UcxTarget>> UcxTarget::Create(absl::Span<std::byte> arena,
                                                             const std::string& tls) {
  FileDescriptor wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return absl::ErrnoToStatus(errno, "eventfd");
  ASSIGN_OR_RETURN(UcxContext context, UcxContext::Create(tls));
  ASSIGN_OR_RETURN(UcxWorker worker, UcxWorker::Create(context));
  ASSIGN_OR_RETURN(UcxMemory memory, UcxMemory::Create(context, arena, UCS_MEMORY_TYPE_HOST));
  ASSIGN_OR_RETURN(std::string address, worker.Address());
  ASSIGN_OR_RETURN(std::string rkey, memory.PackKey());
  auto impl = std::make_unique<Impl>(std::move(context), std::move(worker), std::move(memory),
                                     std::move(wake), arena);
  RETURN_IF_ERROR(impl->SetHandlers());
  impl->Start();
  return std::unique_ptr<UcxTarget>(
      new UcxTarget(std::move(impl), std::move(address), std::move(rkey)));
}

UcxTarget::UcxTarget(std::unique_ptr<Impl> impl, std::string address, std::string rkey)
    : impl_(std::move(impl)), address_(std::move(address)), rkey_(std::move(rkey)) {}

UcxTarget::~UcxTarget() = default;

}  // namespace nosara::kvstore
