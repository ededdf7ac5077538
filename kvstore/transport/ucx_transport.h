// Transport over UCX: RDMA where there is any, shared memory or TCP elsewhere.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// `tls`: transports in UCX's notation ("tcp", "sm,self,tcp"); empty leaves the choice to UCX.
/// When it names shared-memory transports only ("sm,self"), UCX cannot tell that a peer has died:
/// then only the caller's own timeout and Close() end what is in flight. When it names others too,
/// UCX of this version leaves shared memory aside, because it can tell nothing there.
/// Writes complete when the target has them: puts of one turn share one flush.
/// UNAVAILABLE when UCX does not start with these transports.
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const std::string& tls);

}  // namespace nosara::kvstore
