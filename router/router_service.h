// The public gRPC service, as callback reactors.
#pragma once

#include <memory>

#include "router/generation.h"

namespace grpc {
class Service;
}

namespace nosara::router {

/// nosara.inference.v1.InferenceService over `core`, which outlives it. Its reactors never block:
/// parsing, validation and tokenization run in the core's pool. Requests are taken as raw bytes, so
/// that a string that is not UTF-8 gets an answer that names its field. Thread-safe.
std::unique_ptr<grpc::Service> MakeRouterService(RouterCore* core);

}  // namespace nosara::router
