#include "router/router_service.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/byte_buffer.h>

#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/retry_delay.h"
#include "base/status_macros.h"
#include "nosara/inference/v1/inference.grpc.pb.h"
#include "router/request_parsing.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using inference::v1::InferenceService;

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  if (const std::optional<absl::Duration> delay = RetryDelay(status)) {
    context->AddTrailingMetadata(kRetryDelayMetadata, RetryDelayValue(*delay));
  }
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

std::string Metadata(const grpc::CallbackServerContext& context, const char* name) {
  const auto found = context.client_metadata().find(name);
  if (found == context.client_metadata().end()) return "";
  return std::string(found->second.data(), found->second.size());
}

RequestOrigin OriginOf(const grpc::CallbackServerContext& context) {
  RequestOrigin origin;
  origin.protocol = "grpc";
  origin.peer = context.peer();
  origin.authorization = Metadata(context, "authorization");
  origin.traceparent = Metadata(context, "traceparent");
  origin.tracestate = Metadata(context, "tracestate");
  const std::chrono::system_clock::time_point deadline = context.deadline();
  if (deadline != std::chrono::system_clock::time_point::max()) {
    origin.deadline = absl::FromChrono(deadline);
  }
  return origin;
}

// The bytes of a request; `bytes` must live as long as it is used.
absl::Status Parse(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::Slice slice;
  const grpc::Status status = bytes.DumpToSingleSlice(&slice);
  if (!status.ok()) return absl::InternalError(status.error_message());
  return ParseRequest(absl::string_view(reinterpret_cast<const char*>(slice.begin()), slice.size()),
                      message);
}

grpc::ByteBuffer Serialize(const google::protobuf::Message& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

// One Generate. Deletes itself when gRPC is done with it.
class GenerateReactor final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                              private Generation::Sink {
 public:
  GenerateReactor(RouterCore* core, grpc::CallbackServerContext* context,
                  const grpc::ByteBuffer* request)
      : context_(context),
        generation_(
            std::make_shared<Generation>(core, static_cast<Sink*>(this), OriginOf(*context))) {
    // gRPC keeps `request` until the call has finished; the pool's task runs before that, or finds
    // the request cancelled: it copies the (reference-counted) buffer to be independent of it.
    generation_->Start([bytes = *request]() -> absl::StatusOr<GenerateRequest> {
      GenerateRequest parsed;
      RETURN_IF_ERROR(Parse(bytes, &parsed));
      return parsed;
    });
  }

 private:
  void Write(const GenerateResponse& response) override {
    buffer_ = Serialize(response);
    StartWrite(&buffer_);
  }
  void Finish(const absl::Status& status) override {
    grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(ToGrpcStatus(status, context_));
  }

  void OnWriteDone(bool ok) override {
    if (!ok) generation_->Cancel();
    generation_->OnWritten();
  }
  void OnCancel() override { generation_->Cancel(); }
  void OnDone() override { delete this; }

  grpc::CallbackServerContext* const context_;
  const std::shared_ptr<Generation> generation_;
  grpc::ByteBuffer buffer_;  // being written
};

absl::StatusOr<inference::v1::TokenizeResponse> Tokenize(const RouterCore& core,
                                                         const grpc::ByteBuffer& bytes) {
  inference::v1::TokenizeRequest request;
  RETURN_IF_ERROR(Parse(bytes, &request));
  ASSIGN_OR_RETURN(const ServedModel* const model, core.models->Find(request.model()));
  ASSIGN_OR_RETURN(const ModelLimits limits, LimitsOf(core.membership->Snapshot(), model->name));
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                   EncodePrompt(*model->tokenizer, request, limits));
  inference::v1::TokenizeResponse response;
  response.mutable_token_ids()->Add(tokens.begin(), tokens.end());
  return response;
}

using ServiceBase = InferenceService::WithRawCallbackMethod_Generate<
    InferenceService::WithRawCallbackMethod_Tokenize<
        InferenceService::WithCallbackMethod_ListModels<InferenceService::Service>>>;

class RouterService final : public ServiceBase {
 public:
  explicit RouterService(RouterCore* core) : core_(core) {}

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override {
    return new GenerateReactor(core_, context, request);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    const bool accepted =
        core_->pool->TrySubmit([core = core_, context, request, response, reactor] {
          const auto result = nosara::router::Tokenize(*core, *request);
          if (result.ok()) *response = Serialize(*result);
          reactor->Finish(ToGrpcStatus(result.status(), context));
        });
    if (!accepted) {
      reactor->Finish(ToGrpcStatus(
          WithRetryDelay(
              absl::ResourceExhaustedError("too many prompts wait to be tokenized; retry later"),
              core_->retry_delay),
          context));
    }
    return reactor;
  }

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const inference::v1::ListModelsRequest* request,
                                       inference::v1::ListModelsResponse* response) override {
    const ClusterSnapshot cluster = core_->membership->Snapshot();
    for (const auto& [name, model] : core_->models->models()) {
      inference::v1::Model& listed = *response->add_models();
      listed.set_name(name);
      for (const WorkerState& worker : cluster.workers) {
        if (worker.Serves(name)) listed.set_ready_workers(listed.ready_workers() + 1);
      }
      const auto limits = LimitsOf(cluster, name);
      if (!limits.ok()) continue;
      listed.set_max_context_tokens(limits->max_context_tokens);
      listed.set_vocab_size(limits->vocab_size);
    }
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  RouterCore* const core_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeRouterService(RouterCore* core) {
  return std::make_unique<RouterService>(core);
}

}  // namespace nosara::router
