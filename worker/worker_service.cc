#include "worker/worker_service.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <deque>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/retry_delay.h"
#include "nosara/worker/v1/worker.grpc.pb.h"

namespace nosara::worker {
namespace {

constexpr absl::Duration kRetryDelay = absl::Seconds(1);

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

/// What a router needs to know of errors that are between worker and store: pages that were lost
/// are no fault of the request, which can be sent again.
absl::Status ToPublic(const absl::Status& status) {
  if (absl::IsAborted(status) || absl::IsDataLoss(status) || absl::IsNotFound(status)) {
    return absl::UnavailableError(absl::StrCat("cached pages were lost: ", status.message()));
  }
  return status;
}

v1::Token TokenToProto(const SampledToken& token) {
  v1::Token proto;
  proto.set_id(token.id);
  proto.set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top) {
    v1::TopToken* top = proto.add_top();
    top->set_id(id);
    top->set_logprob(logprob);
  }
  return proto;
}

void CacheToProto(const CacheCounters& cache, int64_t pages_written,
                  inference::v1::CacheStats* proto) {
  proto->set_records_selected(cache.records_selected);
  proto->set_records_resident(cache.records_resident);
  proto->set_records_fetched(cache.records_fetched);
  proto->set_bytes_fetched(cache.bytes_fetched);
  proto->set_records_by_mapped(cache.records_by_mapped);
  proto->set_records_by_in_process(cache.records_by_in_process);
  proto->set_records_by_ucx(cache.records_by_ucx);
  proto->set_pages_written(pages_written);
}

absl::StatusOr<Request> RequestFromProto(const v1::ExecuteRequest& proto,
                                         const std::string& model) {
  if (!proto.model().empty() && proto.model() != model) {
    return absl::NotFoundError(
        absl::StrCat("model '", proto.model(), "': this worker serves '", model, "'"));
  }
  Request request;
  request.request_id = proto.request_id();
  request.prompt.assign(proto.prompt_tokens().begin(), proto.prompt_tokens().end());
  request.generated.assign(proto.generated_tokens().begin(), proto.generated_tokens().end());
  request.stop_token_ids.assign(proto.stop_token_ids().begin(), proto.stop_token_ids().end());
  request.max_tokens = proto.max_tokens();
  request.cache_salt = proto.cache_salt();
  const v1::Sampling& sampling = proto.sampling();
  request.sampling.temperature = sampling.temperature();
  request.sampling.top_k = static_cast<int>(sampling.top_k());
  request.sampling.top_p = sampling.top_p();
  request.sampling.min_p = sampling.min_p();
  request.sampling.repetition_penalty = sampling.repetition_penalty();
  request.sampling.presence_penalty = sampling.presence_penalty();
  request.sampling.frequency_penalty = sampling.frequency_penalty();
  request.sampling.seed = sampling.seed();
  request.sampling.top_logprobs =
      proto.has_top_logprobs() ? static_cast<int>(proto.top_logprobs()) : -1;
  // The router validates for people; these bounds keep the engine's arithmetic defined.
  const auto within = [](const char* field, float value, float low, float high) {
    return value >= low && value <= high
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat("sampling.", field, " = ", value,
                                                         ": must be ", low, " to ", high));
  };
  for (const absl::Status& status :
       {within("temperature", sampling.temperature(), 0, 100),
        within("top_k", static_cast<float>(sampling.top_k()), 0, 1 << 24),
        within("top_p", sampling.top_p(), 1e-6f, 1), within("min_p", sampling.min_p(), 0, 1),
        within("repetition_penalty", sampling.repetition_penalty(), 1e-3f, 10),
        within("presence_penalty", sampling.presence_penalty(), -2, 2),
        within("frequency_penalty", sampling.frequency_penalty(), -2, 2),
        within("top_logprobs", static_cast<float>(proto.top_logprobs()), 0, 20)}) {
    if (!status.ok()) return status;
  }
  return request;
}

/// One stream: a sink of the engine on one side, a reactor of gRPC on the other. Keeps itself alive
/// until gRPC is done with it; the engine may hold it longer.
class ExecuteStream final : public grpc::ServerWriteReactor<v1::ExecuteResponse>,
                            public RequestSink {
 public:
  static ExecuteStream* Start(Engine* engine, const std::string& model,
                              grpc::CallbackServerContext* context,
                              const v1::ExecuteRequest* proto) {
    auto stream = std::shared_ptr<ExecuteStream>(new ExecuteStream(engine, context));
    ExecuteStream* const raw = stream.get();
    {
      absl::MutexLock lock(&raw->mu_);
      raw->self_ = stream;
    }
    absl::StatusOr<Request> request = RequestFromProto(*proto, model);
    if (!request.ok()) {
      raw->OnFailed(request.status());
      return raw;
    }
    const auto deadline = context->deadline();
    if (deadline != std::chrono::system_clock::time_point::max()) {
      request->deadline = Clock::Real()->Now() + (absl::FromChrono(deadline) - absl::Now());
    }
    const absl::StatusOr<RequestHandle> handle = engine->Submit(*std::move(request), stream);
    if (!handle.ok()) {
      raw->OnFailed(handle.status());
      return raw;
    }
    bool cancelled;
    {
      absl::MutexLock lock(&raw->mu_);
      raw->handle_ = *handle;
      cancelled = raw->cancelled_;
    }
    if (cancelled) engine->Cancel(*handle);
    return raw;
  }

  // From the engine.
  void OnAccepted(int64_t cached_tokens) override {
    v1::ExecuteResponse response;
    response.mutable_accepted()->set_cached_tokens(cached_tokens);
    Send(std::move(response));
  }
  void OnPrefillProgress(int64_t done_tokens, int64_t total_tokens) override {
    v1::ExecuteResponse response;
    response.mutable_prefill_progress()->set_done_tokens(done_tokens);
    response.mutable_prefill_progress()->set_total_tokens(total_tokens);
    Send(std::move(response));
  }
  void OnToken(const SampledToken& token) override {
    v1::ExecuteResponse response;
    *response.mutable_tokens()->add_tokens() = TokenToProto(token);
    Send(std::move(response));
  }
  void OnCompleted(const Completion& completion) override {
    v1::ExecuteResponse response;
    v1::Completed* completed = response.mutable_completed();
    completed->set_reason(completion.reason == FinishReason::kStop
                              ? inference::v1::FINISH_REASON_STOP
                              : inference::v1::FINISH_REASON_LENGTH);
    completed->mutable_usage()->set_prompt_tokens(completion.prompt_tokens);
    completed->mutable_usage()->set_completion_tokens(completion.completion_tokens);
    completed->mutable_usage()->set_cached_prompt_tokens(completion.cached_prompt_tokens);
    CacheToProto(completion.cache, completion.pages_written, completed->mutable_cache());
    Send(std::move(response));
    End(grpc::Status::OK);
  }
  void OnFailed(const absl::Status& status) override {
    const absl::Status told = ToPublic(status);
    LogInfo("request failed: {}", told.ToString());
    if (absl::IsResourceExhausted(told)) {
      absl::MutexLock lock(&mu_);
      if (context_ != nullptr && !finished_) {
        context_->AddTrailingMetadata(kRetryDelayMetadata, RetryDelayValue(kRetryDelay));
      }
    }
    End(ToGrpc(told));
  }

  // From gRPC.
  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      if (!ok) pending_.clear();  // the peer is gone; OnCancel follows
    }
    Continue();
  }
  void OnCancel() override {
    RequestHandle handle;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      handle = handle_;
    }
    if (handle.value != 0) engine_->Cancel(handle);
    End(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    std::shared_ptr<ExecuteStream> self;  // let go after the lock
    absl::MutexLock lock(&mu_);
    context_ = nullptr;
    self = std::move(self_);
  }

 private:
  ExecuteStream(Engine* engine, grpc::CallbackServerContext* context)
      : engine_(engine), context_(context) {}

  void Send(v1::ExecuteResponse response) {
    {
      absl::MutexLock lock(&mu_);
      if (end_.has_value()) return;
      pending_.push_back(std::move(response));
    }
    Continue();
  }

  void End(grpc::Status status) {
    {
      absl::MutexLock lock(&mu_);
      if (end_.has_value()) return;
      end_ = std::move(status);
    }
    Continue();
  }

  /// Writes the next message, or finishes after the last. Calls gRPC outside the lock, which may
  /// call back at once; `writing_` and `finished_` keep the calls apart.
  void Continue() {
    enum class Next { kNothing, kWrite, kFinish } next = Next::kNothing;
    {
      absl::MutexLock lock(&mu_);
      if (writing_ || finished_) return;
      if (!pending_.empty()) {
        current_ = std::move(pending_.front());
        pending_.pop_front();
        writing_ = true;
        next = Next::kWrite;
      } else if (end_.has_value()) {
        finished_ = true;
        next = Next::kFinish;
      }
    }
    if (next == Next::kWrite) StartWrite(&current_);
    if (next == Next::kFinish) Finish(*end_);
  }

  Engine* const engine_;

  absl::Mutex mu_;
  grpc::CallbackServerContext* context_ ABSL_GUARDED_BY(mu_);  // null once gRPC is done
  RequestHandle handle_ ABSL_GUARDED_BY(mu_);
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  v1::ExecuteResponse current_;  // the write in flight's
  std::deque<v1::ExecuteResponse> pending_ ABSL_GUARDED_BY(mu_);
  std::optional<grpc::Status> end_;  // set once, under mu_
  std::shared_ptr<ExecuteStream> self_ ABSL_GUARDED_BY(mu_);
};

class WorkerServiceImpl final : public v1::WorkerService::CallbackService {
 public:
  WorkerServiceImpl(Engine* engine, const kvstore::StoreClient* store, WorkerIdentity identity)
      : engine_(engine), store_(store), identity_(std::move(identity)) {}

  grpc::ServerWriteReactor<v1::ExecuteResponse>* Execute(
      grpc::CallbackServerContext* context, const v1::ExecuteRequest* request) override {
    return ExecuteStream::Start(engine_, identity_.model, context, request);
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override {
    engine_->Drain();
    const EngineLoad load = engine_->load();
    LogInfo("draining: {} requests", load.running_requests + load.queued_requests);
    response->set_requests(load.running_requests + load.queued_requests);
    return FinishNow(context);
  }

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request,
                                    v1::GetLoadResponse* response) override {
    const ModelConfig& config = engine_->backend().config();
    const EngineLoad load = engine_->load();
    response->set_worker_id(identity_.worker_id);
    response->set_epoch(identity_.epoch);
    response->set_model(identity_.model);
    response->set_model_fingerprint(engine_->backend().model_fingerprint());
    response->set_max_context_tokens(config.max_position_embeddings);
    response->set_vocab_size(config.vocab_size);
    response->set_running_requests(load.running_requests);
    response->set_queued_requests(load.queued_requests);
    response->set_pending_prefill_tokens(load.pending_prefill_tokens);
    response->set_running_tokens(load.running_tokens);
    response->set_draining(load.draining);
    CacheToProto(load.cache, load.pages_written, response->mutable_cache());
    response->set_recoveries(load.recoveries);
    response->set_recomputed_tokens(load.recomputed_tokens);
    const kvstore::ClientStats stores = store_->stats();
    response->set_reads_failed_over(stores.reads_failed_over);
    response->set_copies_missing(stores.copies_missing);
    response->set_pages_discarded(stores.pages_discarded);
    response->set_copies_repaired(stores.copies_repaired);
    for (std::string& address : store_->UnreachableStores()) {
      response->add_unreachable_stores(std::move(address));
    }
    return FinishNow(context);
  }

 private:
  static grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  Engine* const engine_;
  const kvstore::StoreClient* const store_;
  const WorkerIdentity identity_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeWorkerService(Engine* engine, const kvstore::StoreClient* store,
                                                 WorkerIdentity identity) {
  return std::make_unique<WorkerServiceImpl>(engine, store, std::move(identity));
}

}  // namespace nosara::worker
