// Transport over UCX: RDMA where there is any, shared memory or TCP elsewhere.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/transport/transport.h"

namespace nosara::kvstore {

/// `tls`: transports in UCX's notation ("tcp", "sm,self,tcp"); empty leaves the choice to UCX.
/// UNAVAILABLE when UCX does not start with these transports.
///
/// How the bytes travel: with RDMA hardware by ucp_get and ucp_put (puts of one turn share one
/// flush, so that a write completes when the target has it); by active messages over everything
/// else that can tell the death of a peer, that is TCP (why: ucx_messages.h). When `tls` names
/// shared-memory transports only, which cannot tell, again by ucp_get and ucp_put: then only the
/// caller's own timeout and Close() end what is in flight to a dead peer. When it names others too,
/// UCX 1.13 leaves shared memory aside.
absl::StatusOr<std::unique_ptr<Transport>> CreateUcxTransport(const std::string& tls);

}  // namespace nosara::kvstore
