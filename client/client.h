// The C++ client library of Nosara.
//
//   auto client = nosara::client::Client::Connect("127.0.0.1:50050");
//   nosara::inference::v1::GenerateRequest request;
//   request.set_text("Once upon a time");
//   absl::Status status = (*client)->Generate(request, [](const auto& event) {
//     std::cout << event.chunk().text() << std::flush;
//     return nosara::client::Continue::kYes;
//   });
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "nosara/inference/v1/inference.pb.h"

namespace grpc {
class Channel;
}

namespace nosara::client {

/// What a callback wants: more of the stream, or its end.
enum class Continue { kYes, kNo };

/// A connection to a router. Thread-safe: any number of calls at a time. Calls block.
///
/// Errors: those of inference.proto, with the router's message. An UNAVAILABLE error of a router
/// that does not answer names its address. RetryDelay() of base/retry_delay.h tells when to try
/// again.
class Client final {
 public:
  /// "host:port" of a router. Connects lazily: a router that is not there shows at the first call.
  /// INVALID_ARGUMENT for an empty address.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& address);
  /// Over a channel that exists, e.g. within the process; `name` is for messages.
  static std::unique_ptr<Client> Over(std::shared_ptr<grpc::Channel> channel, std::string name);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  /// Called with each event, in the order of inference.proto, on the caller's thread.
  using OnEvent = std::function<Continue(const inference::v1::GenerateResponse&)>;

  /// Runs one generation. OK after Finished; CANCELLED after kNo; DEADLINE_EXCEEDED after
  /// `timeout`.
  absl::Status Generate(const inference::v1::GenerateRequest& request, const OnEvent& on_event,
                        absl::Duration timeout = absl::InfiniteDuration());

  absl::StatusOr<inference::v1::TokenizeResponse> Tokenize(
      const inference::v1::TokenizeRequest& request, absl::Duration timeout = absl::Seconds(5));

  absl::StatusOr<std::vector<inference::v1::Model>> ListModels(
      absl::Duration timeout = absl::Seconds(2));

 private:
  class Impl;
  explicit Client(std::unique_ptr<Impl> impl);

  const std::unique_ptr<Impl> impl_;
};

/// Whether `status` means that no server answered, as against an error that a server sent.
bool IsNoServer(const absl::Status& status);

}  // namespace nosara::client
