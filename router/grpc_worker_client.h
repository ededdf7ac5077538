// WorkerClient over gRPC.
#pragma once

#include <memory>

#include "router/worker_client.h"

namespace grpc {
class Channel;
}

namespace nosara::router {

/// A client over `channel`, which it shares.
std::unique_ptr<WorkerClient> MakeGrpcWorkerClient(std::shared_ptr<grpc::Channel> channel);

/// A channel to "host:port" that reconnects within 2 s of a worker's return.
std::shared_ptr<grpc::Channel> MakeWorkerChannel(const std::string& address);

}  // namespace nosara::router
