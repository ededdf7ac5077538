#include "client/client.h"

#include <grpc/grpc.h>
#include <grpcpp/grpcpp.h>

#include <mutex>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "base/retry_delay.h"
#include "nosara/inference/v1/inference.grpc.pb.h"

namespace nosara::client {
namespace {

constexpr char kNoServerPayload[] = "nosara/no-server";

// Never undone: when its last object dies, gRPC waits up to 10 s for a poller of its own, and a
// command would hang before it exits.
void KeepGrpcRunning() {
  static std::once_flag once;
  std::call_once(once, grpc_init);
}

void SetTimeout(grpc::ClientContext& context, absl::Duration timeout) {
  if (timeout != absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  }
}

}  // namespace

class Client::Impl final {
 public:
  Impl(std::shared_ptr<grpc::Channel> channel, std::string name)
      : channel(std::move(channel)),
        name(std::move(name)),
        stub(inference::v1::InferenceService::NewStub(this->channel)) {}

  absl::Status ToStatus(const grpc::Status& status, const grpc::ClientContext& context) const {
    if (status.ok()) return absl::OkStatus();
    // gRPC has one code for both; only the channel knows whether anybody was there.
    const bool no_server = status.error_code() == grpc::StatusCode::UNAVAILABLE &&
                           channel->GetState(false) == GRPC_CHANNEL_TRANSIENT_FAILURE;
    if (no_server) {
      absl::Status result = absl::UnavailableError(
          absl::StrCat("no server answers at ", name, " (", status.error_message(), ")"));
      result.SetPayload(kNoServerPayload, absl::Cord());
      return result;
    }
    absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
    const auto& trailer = context.GetServerTrailingMetadata();
    if (const auto delay = trailer.find(kRetryDelayMetadata); delay != trailer.end()) {
      result = WithRetryDelay(std::move(result),
                              absl::string_view(delay->second.data(), delay->second.size()));
    }
    return result;
  }

  const std::shared_ptr<grpc::Channel> channel;
  const std::string name;
  const std::unique_ptr<inference::v1::InferenceService::Stub> stub;
};

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& address) {
  KeepGrpcRunning();
  if (address.empty()) return absl::InvalidArgumentError("address: empty; must be host:port");
  return Over(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()), address);
}

std::unique_ptr<Client> Client::Over(std::shared_ptr<grpc::Channel> channel, std::string name) {
  KeepGrpcRunning();
  return std::unique_ptr<Client>(
      new Client(std::make_unique<Impl>(std::move(channel), std::move(name))));
}

absl::Status Client::Generate(const inference::v1::GenerateRequest& request,
                              const OnEvent& on_event, absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  const auto reader = impl_->stub->Generate(&context, request);
  inference::v1::GenerateResponse event;
  bool stopped = false;
  bool finished = false;
  while (reader->Read(&event)) {
    if (stopped) continue;
    finished = event.has_finished();
    if (on_event(event) == Continue::kNo) {
      stopped = true;
      context.TryCancel();
    }
  }
  const grpc::Status status = reader->Finish();
  if (stopped && !finished) return absl::CancelledError("stopped by the caller");
  if (finished) return absl::OkStatus();
  if (status.ok()) return absl::InternalError("the stream ended without a Finished");
  return impl_->ToStatus(status, context);
}

absl::StatusOr<inference::v1::TokenizeResponse> Client::Tokenize(
    const inference::v1::TokenizeRequest& request, absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  inference::v1::TokenizeResponse response;
  const grpc::Status status = impl_->stub->Tokenize(&context, request, &response);
  if (!status.ok()) return impl_->ToStatus(status, context);
  return response;
}

absl::StatusOr<std::vector<inference::v1::Model>> Client::ListModels(absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  inference::v1::ListModelsResponse response;
  const grpc::Status status = impl_->stub->ListModels(&context, {}, &response);
  if (!status.ok()) return impl_->ToStatus(status, context);
  return std::vector<inference::v1::Model>(response.models().begin(), response.models().end());
}

bool IsNoServer(const absl::Status& status) {
  return status.GetPayload(kNoServerPayload).has_value();
}

}  // namespace nosara::client
