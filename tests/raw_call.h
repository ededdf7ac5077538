// Calls of services whose code we do not generate: health and reflection.
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <string>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace nosara::testing {

inline constexpr char kHealthCheck[] = "/grpc.health.v1.Health/Check";
/// Answers of kHealthCheck.
inline const std::string kServing("\x08\x01", 2);
inline const std::string kNotServing("\x08\x02", 2);

inline constexpr char kReflection[] =
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
/// Request of kReflection; the answer holds the names of the services.
inline const std::string kListServices("\x3a\x00", 2);

/// A unary exchange of raw bytes.
inline grpc::Status RawCall(const std::string& address, const std::string& method,
                            const std::string& request, std::string* response) {
  grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
  const grpc::Slice slice(request);
  const grpc::ByteBuffer request_bytes(&slice, 1);
  grpc::ByteBuffer response_bytes;
  absl::Notification done;
  grpc::Status result;
  stub.UnaryCall(&context, method, grpc::StubOptions(), &request_bytes, &response_bytes,
                 [&](grpc::Status status) {
                   result = std::move(status);
                   done.Notify();
                 });
  done.WaitForNotification();
  grpc::Slice answer;
  if (result.ok() && response_bytes.DumpToSingleSlice(&answer).ok()) {
    response->assign(reinterpret_cast<const char*>(answer.begin()), answer.size());
  }
  return result;
}

}  // namespace nosara::testing
