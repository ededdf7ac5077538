#include "tests/kvstore/bench/ucx_bare_loop.h"

#include <memory>
#include <utility>

#include "base/clock.h"
#include "base/status_macros.h"
#include "kvstore/transport/ucx_handles.h"

namespace nosara::kvstore {
namespace {

struct EndpointDeleter {
  UcxWorker* worker = nullptr;
  void operator()(ucp_ep_h endpoint) const {
    ucp_request_param_t params = {};
    const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint, &params);
    if (!UCS_PTR_IS_PTR(request)) return;
    while (ucp_request_check_status(request) == UCS_INPROGRESS) worker->Progress();
    ucp_request_free(request);
  }
};

}  // namespace

absl::StatusOr<double> BareUcxGets(const ArenaAddress& arena, const std::string& tls, size_t bytes,
                                   const std::vector<uint64_t>& offsets, size_t depth,
                                   absl::Duration duration) {
  ASSIGN_OR_RETURN(const UcxContext context, UcxContext::Create(tls));
  ASSIGN_OR_RETURN(UcxWorker worker, UcxWorker::Create(context));
  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  params.address = reinterpret_cast<const ucp_address_t*>(arena.ucx_address.data());
  ucp_ep_h raw = nullptr;
  RETURN_IF_ERROR(UcxStatus(ucp_ep_create(worker.get(), &params, &raw), "bare UCX loop"));
  const std::unique_ptr<ucp_ep, EndpointDeleter> endpoint(raw, EndpointDeleter{&worker});
  ASSIGN_OR_RETURN(const UcxRemoteKey key, UcxRemoteKey::Create(raw, arena.ucx_rkey));

  std::vector<std::byte> landing(depth * bytes);
  std::vector<ucs_status_ptr_t> requests(depth, nullptr);
  ucp_request_param_t get = {};
  size_t next = 0;
  uint64_t done = 0;
  const absl::Time start = Clock::Real()->Now();
  absl::Time now = start;
  while (now - start < duration) {
    for (size_t i = 0; i < depth; ++i) {
      if (requests[i] != nullptr) {
        const ucs_status_t status = ucp_request_check_status(requests[i]);
        if (status == UCS_INPROGRESS) continue;
        ucp_request_free(std::exchange(requests[i], nullptr));
        RETURN_IF_ERROR(UcxStatus(status, "bare UCX get"));
        ++done;
      }
      const ucs_status_ptr_t request =
          ucp_get_nbx(raw, landing.data() + i * bytes, bytes, arena.remote_address + offsets[next],
                      key.get(), &get);
      next = (next + 1) % offsets.size();
      if (UCS_PTR_IS_ERR(request)) return UcxStatus(UCS_PTR_STATUS(request), "bare UCX get");
      if (UCS_PTR_IS_PTR(request)) {
        requests[i] = request;
      } else {
        ++done;
      }
    }
    worker.Progress();
    now = Clock::Real()->Now();
  }
  for (ucs_status_ptr_t request : requests) {
    if (request == nullptr) continue;
    while (ucp_request_check_status(request) == UCS_INPROGRESS) worker.Progress();
    ucp_request_free(request);
  }
  return static_cast<double>(done) / absl::ToDoubleSeconds(now - start);
}

}  // namespace nosara::kvstore
