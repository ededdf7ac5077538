#include "router/worker_client.h"

#include "absl/strings/cord.h"

namespace nosara::router {
namespace {

constexpr char kLostPayload[] = "nosara/worker-lost";

}  // namespace

absl::Status WorkerLostStatus(absl::string_view detail) {
  absl::Status status = absl::UnavailableError(detail);
  status.SetPayload(kLostPayload, absl::Cord());
  return status;
}

bool IsWorkerLost(const absl::Status& status) {
  return status.GetPayload(kLostPayload).has_value();
}

}  // namespace nosara::router
