// The passive side of UCX: makes an arena readable and writable by remote clients.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace nosara::kvstore {

/// Registers an arena with UCX, for one-sided accesses by hardware, and answers the messages of
/// clients without such hardware (ucx_messages.h) on a thread of its own. The thread sleeps while
/// nothing happens. Immutable after Create; thread-safe. The arena must outlive it.
///
/// A client may die or misbehave at any time: its endpoint is closed, requests outside the arena
/// are refused. (A client that makes UCX emulate ucp_get over TCP, as none of ours does, can still
/// end the process by dying: so does UCX.)
class UcxTarget final {
 public:
  /// `tls`: UCX transports; empty leaves the choice to UCX. UNAVAILABLE when UCX does not start
  /// with them.
  static absl::StatusOr<std::unique_ptr<UcxTarget>> Create(absl::Span<std::byte> arena,
                                                           const std::string& tls);
  UcxTarget(const UcxTarget&) = delete;
  UcxTarget& operator=(const UcxTarget&) = delete;
  /// Stops the thread; peers see the connection end.
  ~UcxTarget();

  /// Worker address, for clients to connect to.
  const std::string& address() const { return address_; }
  /// Packed remote key of the arena.
  const std::string& rkey() const { return rkey_; }

 private:
  class Impl;
  UcxTarget(std::unique_ptr<Impl> impl, std::string address, std::string rkey);

  const std::unique_ptr<Impl> impl_;
  const std::string address_;
  const std::string rkey_;
};

}  // namespace nosara::kvstore
