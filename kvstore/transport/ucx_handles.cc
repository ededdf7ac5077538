#include "kvstore/transport/ucx_handles.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nosara::kvstore {
namespace {

struct ConfigDeleter {
  void operator()(ucp_config_t* config) const { ucp_config_release(config); }
};

}  // namespace

absl::Status UcxStatus(ucs_status_t status, const std::string& what) {
  if (status == UCS_OK) return absl::OkStatus();
  const std::string message = absl::StrCat(what, ": ", ucs_status_string(status));
  switch (status) {
    case UCS_ERR_CANCELED:
      return absl::CancelledError(message);
    case UCS_ERR_NO_MEMORY:
      return absl::ResourceExhaustedError(message);
    case UCS_ERR_INVALID_PARAM:
      return absl::InvalidArgumentError(message);
    case UCS_ERR_UNSUPPORTED:
    case UCS_ERR_NOT_IMPLEMENTED:
      return absl::UnimplementedError(message);
    default:
      return absl::UnavailableError(message);
  }
}

absl::StatusOr<UcxContext> UcxContext::Create(const std::string& tls) {
  ucp_config_t* raw = nullptr;
  RETURN_IF_ERROR(UcxStatus(ucp_config_read(nullptr, nullptr, &raw), "UCX configuration"));
  const std::unique_ptr<ucp_config_t, ConfigDeleter> config(raw);
  if (!tls.empty()) {
    RETURN_IF_ERROR(UcxStatus(ucp_config_modify(config.get(), "TLS", tls.c_str()),
                              absl::StrCat("UCX transports '", tls, "'")));
  }
  // Records are tens of KiB: segments of that size more than double what TCP moves. UCX warns of
  // settings that no transport in use knows.
  if (tls.empty() || absl::StrContains(tls, "tcp") || absl::StrContains(tls, "all")) {
    for (const char* name : {"TX_SEG_SIZE", "RX_SEG_SIZE"}) {
      RETURN_IF_ERROR(UcxStatus(ucp_config_modify(config.get(), name, "64K"),
                                absl::StrCat("UCX setting ", name)));
    }
  }
  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  ucp_context_h context = nullptr;
  RETURN_IF_ERROR(UcxStatus(
      ucp_init(&params, config.get(), &context),
      absl::StrCat("starting UCX with transports '", tls.empty() ? "chosen by UCX" : tls, "'")));
  return UcxContext(context);
}

UcxContext::UcxContext(UcxContext&& other) noexcept
    : context_(std::exchange(other.context_, nullptr)) {}

UcxContext::~UcxContext() {
  if (context_ != nullptr) ucp_cleanup(context_);
}

bool UcxContext::SupportsCuda() const {
  ucp_context_attr_t attributes = {};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  return ucp_context_query(context_, &attributes) == UCS_OK &&
         (attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
}

absl::StatusOr<UcxWorker> UcxWorker::Create(const UcxContext& context) {
  ucp_worker_params_t params = {};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucp_worker_h worker = nullptr;
  RETURN_IF_ERROR(
      UcxStatus(ucp_worker_create(context.get(), &params, &worker), "making a UCX worker"));
  UcxWorker result(worker, -1);
  RETURN_IF_ERROR(
      UcxStatus(ucp_worker_get_efd(worker, &result.event_fd_), "event descriptor of UCX"));
  return result;
}

UcxWorker::UcxWorker(UcxWorker&& other) noexcept
    : worker_(std::exchange(other.worker_, nullptr)), event_fd_(other.event_fd_) {}

UcxWorker::~UcxWorker() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
}

absl::StatusOr<std::string> UcxWorker::Address() const {
  ucp_address_t* address = nullptr;
  size_t size = 0;
  RETURN_IF_ERROR(
      UcxStatus(ucp_worker_get_address(worker_, &address, &size), "address of the UCX worker"));
  std::string result(reinterpret_cast<const char*>(address), size);
  ucp_worker_release_address(worker_, address);
  return result;
}

absl::StatusOr<UcxMemory> UcxMemory::Create(const UcxContext& context, absl::Span<std::byte> memory,
                                            ucs_memory_type_t type) {
  ucp_mem_map_params_t params = {};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = memory.data();
  params.length = memory.size();
  params.memory_type = type;
  ucp_mem_h handle = nullptr;
  RETURN_IF_ERROR(UcxStatus(ucp_mem_map(context.get(), &params, &handle),
                            absl::StrCat("registering ", memory.size(), " bytes with UCX")));
  return UcxMemory(context.get(), handle);
}

UcxMemory::UcxMemory(UcxMemory&& other) noexcept
    : context_(other.context_), memory_(std::exchange(other.memory_, nullptr)) {}

UcxMemory::~UcxMemory() {
  if (memory_ != nullptr) ucp_mem_unmap(context_, memory_);
}

absl::StatusOr<std::string> UcxMemory::PackKey() const {
  void* buffer = nullptr;
  size_t size = 0;
  RETURN_IF_ERROR(UcxStatus(ucp_rkey_pack(context_, memory_, &buffer, &size), "UCX remote key"));
  std::string packed(static_cast<const char*>(buffer), size);
  ucp_rkey_buffer_release(buffer);
  return packed;
}

absl::StatusOr<UcxRemoteKey> UcxRemoteKey::Create(ucp_ep_h endpoint, const std::string& packed) {
  ucp_rkey_h key = nullptr;
  RETURN_IF_ERROR(
      UcxStatus(ucp_ep_rkey_unpack(endpoint, packed.data(), &key), "remote key of the arena"));
  return UcxRemoteKey(key);
}

UcxRemoteKey::UcxRemoteKey(UcxRemoteKey&& other) noexcept
    : key_(std::exchange(other.key_, nullptr)) {}

UcxRemoteKey::~UcxRemoteKey() {
  if (key_ != nullptr) ucp_rkey_destroy(key_);
}

}  // namespace nosara::kvstore
