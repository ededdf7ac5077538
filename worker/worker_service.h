// The gRPC face of an engine: nosara.worker.v1.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kvstore/api/store_client.h"
#include "worker/engine/engine.h"

namespace grpc {
class Service;
}  // namespace grpc

namespace nosara::worker {

/// What GetLoad tells of the worker beside its load.
struct WorkerIdentity {
  std::string worker_id;
  std::string model;
  uint64_t epoch = 0;
};

/// The service on `engine`, whose store client is `store`; both must outlive it. Its streams never
/// block the engine thread: what a slow reader has not taken waits in the stream, at most
/// max_tokens messages.
std::unique_ptr<grpc::Service> MakeWorkerService(Engine* engine, const kvstore::StoreClient* store,
                                                 WorkerIdentity identity);

}  // namespace nosara::worker
