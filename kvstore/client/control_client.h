// The gRPC side of one store: calls with deadlines, errors that name the store.
#pragma once

#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "nosara/kvstore/v1/kvstore.pb.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace nosara::kvstore {

/// Thread-safe. Each `done` runs exactly once, on a thread of gRPC, and must not block; it runs
/// within the deadline of the proto. Errors: the server's, with "store <name>: " before the
/// message, RESOURCE_EXHAUSTED with its RetryDelay(); UNAVAILABLE also when the store does not
/// answer in time; CANCELLED after Cancel().
class ControlClient final {
 public:
  template <typename Response>
  using Done = absl::AnyInvocable<void(absl::StatusOr<Response>) &&>;

  /// `channel` null: makes one to `address`.
  ControlClient(std::string address, std::shared_ptr<grpc::Channel> channel);
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;
  /// Waits until all calls have ended.
  ~ControlClient();

  void GetInfo(v1::GetInfoRequest request, Done<v1::GetInfoResponse> done);
  void Lookup(v1::LookupRequest request, Done<v1::LookupResponse> done);
  void Reserve(v1::ReserveRequest request, Done<v1::ReserveResponse> done);
  void Commit(v1::CommitRequest request, Done<v1::CommitResponse> done);
  void Renew(v1::RenewRequest request, Done<v1::RenewResponse> done);
  void Release(v1::ReleaseRequest request, Done<v1::ReleaseResponse> done);
  void Discard(v1::DiscardRequest request, Done<v1::DiscardResponse> done);

  /// Cancels all calls that run. Later ones run normally.
  void Cancel();
  /// Waits until no call runs.
  void WaitIdle();

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace nosara::kvstore
