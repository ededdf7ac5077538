// Transport over UCX: RDMA where there is any, shared memory or TCP elsewhere.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// `tls`: transports in UCX's notation ("tcp", "sm,self,tcp"); empty leaves the choice to UCX.
/// Writes complete when the target has them: puts of one turn share one flush.
/// UNAVAILABLE when UCX does not start with these transports.
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const std::string& tls);

}  // namespace nosara::kvstore
