// RAII over the handles of UCX. Only the ucx_* files of this folder include UCX.
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace nosara::kvstore {

/// `status` as ours, with `what` before UCX's own words. Trouble with a peer or a network is
/// UNAVAILABLE, cancellation CANCELLED.
absl::Status UcxStatus(ucs_status_t status, const std::string& what);

/// One UCX context for one-sided accesses and active messages, with wake-up. Used by one thread at
/// a time.
class UcxContext final {
 public:
  /// `tls`: transports in UCX's notation; empty leaves the choice to UCX (and to the environment).
  static absl::StatusOr<UcxContext> Create(const std::string& tls);
  UcxContext(UcxContext&& other) noexcept;
  UcxContext& operator=(UcxContext&&) = delete;
  ~UcxContext();

  ucp_context_h get() const { return context_; }
  /// True when UCX was built with CUDA and can reach device memory.
  bool SupportsCuda() const;

 private:
  explicit UcxContext(ucp_context_h context) : context_(context) {}
  ucp_context_h context_;
};

/// A worker: the object that makes progress. Used by one thread at a time.
class UcxWorker final {
 public:
  static absl::StatusOr<UcxWorker> Create(const UcxContext& context);
  UcxWorker(UcxWorker&& other) noexcept;
  UcxWorker& operator=(UcxWorker&&) = delete;
  ~UcxWorker();

  ucp_worker_h get() const { return worker_; }
  absl::StatusOr<std::string> Address() const;
  /// True when something happened.
  bool Progress() { return ucp_worker_progress(worker_) != 0; }
  /// Readable after Arm() returned true and something has happened since.
  int event_fd() const { return event_fd_; }
  /// False: there is work already, call Progress().
  bool Arm() { return ucp_worker_arm(worker_) == UCS_OK; }

 private:
  UcxWorker(ucp_worker_h worker, int event_fd) : worker_(worker), event_fd_(event_fd) {}
  ucp_worker_h worker_;
  int event_fd_;
};

/// A registered range of memory.
class UcxMemory final {
 public:
  static absl::StatusOr<UcxMemory> Create(const UcxContext& context, absl::Span<std::byte> memory,
                                          ucs_memory_type_t type);
  UcxMemory(UcxMemory&& other) noexcept;
  UcxMemory& operator=(UcxMemory&&) = delete;
  ~UcxMemory();

  ucp_mem_h get() const { return memory_; }
  /// What a peer needs to access the memory.
  absl::StatusOr<std::string> PackKey() const;

 private:
  UcxMemory(ucp_context_h context, ucp_mem_h memory) : context_(context), memory_(memory) {}
  ucp_context_h context_;
  ucp_mem_h memory_;
};

/// A peer's memory key, unpacked for one endpoint. Destroy before the endpoint.
class UcxRemoteKey final {
 public:
  static absl::StatusOr<UcxRemoteKey> Create(ucp_ep_h endpoint, const std::string& packed);
  UcxRemoteKey(UcxRemoteKey&& other) noexcept;
  UcxRemoteKey& operator=(UcxRemoteKey&&) = delete;
  ~UcxRemoteKey();

  ucp_rkey_h get() const { return key_; }

 private:
  explicit UcxRemoteKey(ucp_rkey_h key) : key_(key) {}
  ucp_rkey_h key_;
};

}  // namespace nosara::kvstore
