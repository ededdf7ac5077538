#include "kvstore/transport/ucx_connection.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"

namespace nosara::kvstore {

absl::StatusOr<std::unique_ptr<UcxConnection>> UcxConnection::Create(const UcxContext& context,
                                                                     std::string peer,
                                                                     const std::string& address,
                                                                     PeerDeath peer_death) {
  ASSIGN_OR_RETURN(UcxWorker worker, UcxWorker::Create(context));
  std::unique_ptr<UcxConnection> connection(
      new UcxConnection(std::move(worker), std::move(peer), peer_death));
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode =
      peer_death == PeerDeath::kReported ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
  params.err_handler.cb = &UcxConnection::OnError;
  params.err_handler.arg = connection.get();
  const ucs_status_t status =
      ucp_ep_create(connection->worker_.get(), &params, &connection->endpoint_);
  RETURN_IF_ERROR(Annotate(connection->ToStatus(status), "connecting"));
  return connection;
}

UcxConnection::~UcxConnection() {
  Abort([] { return true; });
}

void UcxConnection::OnError(void* self, ucp_ep_h endpoint, ucs_status_t status) {
  auto* const that = static_cast<UcxConnection*>(self);
  if (that->status_.ok()) that->status_ = that->ToStatus(status);
}

absl::Status UcxConnection::ToStatus(ucs_status_t status) const {
  if (status == UCS_OK) return absl::OkStatus();
  return UcxStatus(status, absl::StrCat("store ", peer_, ": UCX"));
}

bool UcxConnection::HasRemoteDma() const {
  // UCX 1.13 tells the transports of an endpoint in no other way than by printing them, one lane a
  // line: "lane[0]:  2:rc_mlx5/mlx5_0:1.0 md[1] ... rma_bw#0 am". What we do not recognise is taken
  // for a transport without such hardware, which is always safe.
  char* text = nullptr;
  size_t size = 0;
  FILE* const stream = open_memstream(&text, &size);
  if (stream == nullptr) return false;
  ucp_ep_print_info(endpoint_, stream);
  std::fclose(stream);
  bool found = false;
  for (const absl::string_view line : absl::StrSplit(absl::string_view(text, size), '\n')) {
    found |= absl::StrContains(line, "lane[") &&
             (absl::StrContains(line, ":rc_") || absl::StrContains(line, ":dc_"));
  }
  std::free(text);
  return found;
}

void UcxConnection::Abort(const std::function<bool()>& quiet) {
  if (endpoint_ == nullptr || peer_death_ == PeerDeath::kSilent) return;
  ucp_request_param_t params = {};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint_, &params);
  endpoint_ = nullptr;
  if (UCS_PTR_IS_PTR(request)) {
    while (ucp_request_check_status(request) == UCS_INPROGRESS) worker_.Progress();
    ucp_request_free(request);
  }
  // Local buffers may only be given back when UCX has let go of them: no way out but that.
  while (!quiet()) worker_.Progress();
}

absl::Status CheckWithinArena(const ArenaAddress& arena, const Transfer& transfer) {
  const uint64_t bytes = transfer.local.size();
  if (bytes <= arena.arena_bytes && transfer.offset <= arena.arena_bytes - bytes) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("store ", arena.name, ": bytes ", transfer.offset,
                                                 " to ", transfer.offset + bytes,
                                                 ": the arena has ", arena.arena_bytes));
}

}  // namespace nosara::kvstore
