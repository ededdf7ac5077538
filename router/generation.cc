#include "router/generation.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"
#include "base/retry_delay.h"
#include "base/status_macros.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;

// Levels by who must act: an operator (error, warning) or only the client (debug).
void LogEnd(const std::string& request_id, const absl::Status& status) {
  if (absl::IsInternal(status) || absl::IsDataLoss(status) || absl::IsUnknown(status)) {
    LogError("request {}: {}", request_id, status.ToString());
  } else if (absl::IsUnavailable(status)) {
    LogWarning("request {}: {}", request_id, status.ToString());
  } else {
    LogDebug("request {}: {}", request_id, status.ToString());
  }
}

uint64_t RandomBits() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

absl::StatusOr<ModelLimits> LimitsOf(const ClusterSnapshot& cluster, const std::string& model) {
  ModelLimits limits;
  for (const WorkerState& worker : cluster.workers) {
    if (!worker.Serves(model)) continue;
    if (worker.load.max_context_tokens > limits.max_context_tokens) {
      limits = {worker.load.max_context_tokens, worker.load.vocab_size};
    }
  }
  if (limits.max_context_tokens == 0) {
    return absl::UnavailableError(absl::StrCat("no worker is ready for model '", model, "' (",
                                               cluster.workers.size(), " known); safe to retry"));
  }
  return limits;
}

RouterCore::OpenRequest::OpenRequest(RouterCore* core) : core_(core) {
  absl::MutexLock lock(&core_->mu_);
  ++core_->open_requests_;
}

RouterCore::OpenRequest::~OpenRequest() {
  absl::MutexLock lock(&core_->mu_);
  --core_->open_requests_;
}

int RouterCore::open_requests() const {
  absl::MutexLock lock(&mu_);
  return open_requests_;
}

void RouterCore::AwaitIdle() const {
  const auto idle = [this] {
    mu_.AssertHeld();
    return open_requests_ == 0;
  };
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(&idle));
}

Generation::Generation(RouterCore* core, Sink* sink, RequestOrigin origin)
    : open_(core),
      core_(core),
      sink_(sink),
      origin_(std::move(origin)),
      arrival_(core->clock->Now()) {}

void Generation::Start(ReadRequest read_request) {
  if (core_->open_requests() > core_->max_open_requests) {
    return Fail(WithRetryDelay(
        absl::ResourceExhaustedError(absl::StrCat("the router has ", core_->max_open_requests,
                                                  " open requests, its limit; retry later")),
        core_->retry_delay));
  }
  const bool accepted =
      core_->pool->TrySubmit([self = shared_from_this(), read_request = std::move(read_request)] {
        self->Prepare(read_request);
      });
  if (!accepted) {
    Fail(WithRetryDelay(
        absl::ResourceExhaustedError("too many prompts wait to be tokenized; retry later"),
        core_->retry_delay));
  }
}

void Generation::Prepare(const ReadRequest& read_request) {
  {
    absl::MutexLock lock(&mu_);
    if (result_) return;  // cancelled while it waited
  }
  const absl::StatusOr<GenerateRequest> request = read_request();
  if (!request.ok()) return Fail(request.status());
  const absl::Status status = PrepareRequest(*request);
  if (!status.ok()) return Fail(status);
  Place();
}

absl::Status Generation::PrepareRequest(const GenerateRequest& request) {
  RETURN_IF_ERROR(ValidateRequest(request));
  ASSIGN_OR_RETURN(const ServedModel* const model, core_->models->Find(request.model()));
  ASSIGN_OR_RETURN(const ModelLimits limits, LimitsOf(core_->membership->Snapshot(), model->name));
  ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                   EncodePrompt(*model->tokenizer, request, limits));
  ExecuteContext context;
  context.request_id =
      request.request_id().empty() ? absl::StrFormat("%016x", RandomBits()) : request.request_id();
  context.model = model->name;
  context.seed = request.sampling().has_seed() ? request.sampling().seed() : RandomBits();
  context.limits = limits;
  context.end_token_ids = model->end_token_ids;
  ASSIGN_OR_RETURN(execute_, BuildExecuteRequest(request, prompt, context));

  {
    absl::MutexLock lock(&mu_);
    request_id_ = context.request_id;
  }
  facts_.model = model->name;
  facts_.prompt_tokens = static_cast<uint32_t>(prompt.size());
  facts_.context_tokens = facts_.prompt_tokens + execute_.max_tokens();

  StreamState::Config config;
  config.request_id = context.request_id;
  config.model = model->name;
  config.prompt_tokens = facts_.prompt_tokens;
  config.seed = context.seed;
  config.stop.assign(request.stop().begin(), request.stop().end());
  config.wants_logprobs = request.has_top_logprobs();
  config.arrival = arrival_;
  config.clock = core_->clock;
  state_ = std::make_unique<StreamState>(std::move(config), model->tokenizer.get());
  return absl::OkStatus();
}

void Generation::Place() {
  facts_.sequence = core_->placements.fetch_add(1, std::memory_order_relaxed);
  const ClusterSnapshot cluster = core_->membership->Snapshot();
  const std::optional<size_t> choice = core_->policy->Choose(facts_, cluster);
  if (!choice) {
    return Fail(absl::UnavailableError(absl::StrCat(
        "no worker is ready for model '", facts_.model, "' (", cluster.workers.size(), " known, ",
        facts_.excluded_addresses.size(), " refused the request",
        last_refusal_.empty() ? "" : ", the last: ", last_refusal_, "); safe to retry")));
  }
  worker_ = cluster.workers[*choice].handle;
  worker_id_ = cluster.workers[*choice].load.worker_id;
  worker_->OnOpened(facts_.prompt_tokens);
  const std::shared_ptr<WorkerCall> call =
      worker_->client().Execute(execute_, origin_.deadline, shared_from_this());
  bool cancelled = false;
  {
    absl::MutexLock lock(&mu_);
    call_ = call;
    cancelled = result_.has_value();
  }
  cancelled ? call->Cancel() : call->Next();
}

void Generation::OnWorkerEvent(const worker::v1::ExecuteResponse& event) {
  std::vector<GenerateResponse> responses;
  const absl::Status status = state_->OnWorkerEvent(event, &responses);
  if (!status.ok()) return Fail(Annotate(status, WorkerName()));
  std::shared_ptr<WorkerCall> call;
  bool next = false;
  bool cancel = false;
  {
    absl::MutexLock lock(&mu_);
    if (result_) return;  // cancelled, and the worker's call with it
    std::move(responses.begin(), responses.end(), std::back_inserter(queue_));
    call = call_;
    if (state_->finished()) {
      result_ = absl::OkStatus();
      cancel = !state_->worker_completed();
      next = !cancel;  // reads the end of the stream
    } else if (queue_.size() >= kMaxQueuedResponses) {
      read_paused_ = true;
    } else {
      next = true;
    }
  }
  Pump();
  if (cancel) call->Cancel();
  if (next) call->Next();
}

void Generation::OnWorkerDone(const absl::Status& status) {
  worker_->OnEnded(facts_.prompt_tokens);
  if (IsWorkerLost(status)) worker_->OnLost();
  {
    absl::MutexLock lock(&mu_);
    call_.reset();
    if (result_) return;
  }
  if (TakesOtherWorker(status)) {
    LogDebug("request {}: {} refused it: {}", execute_.request_id(), WorkerName(),
             status.ToString());
    facts_.excluded_addresses.push_back(worker_->address());
    last_refusal_ = absl::StrCat(WorkerName(), ": ", status.message());
    return Place();
  }
  Fail(EndOfWorker(status));
}

bool Generation::TakesOtherWorker(const absl::Status& status) const {
  const bool refused = absl::IsFailedPrecondition(status) || absl::IsUnavailable(status);
  return refused && !state_->started();
}

// What the client is told when the worker's stream ended without a Completed.
absl::Status Generation::EndOfWorker(const absl::Status& status) {
  const uint32_t tokens = state_->completion_tokens();
  if (status.ok()) {
    return absl::InternalError(
        absl::StrCat(WorkerName(), " ended its stream without completing it"));
  }
  if (IsWorkerLost(status)) {
    return absl::UnavailableError(absl::StrCat(WorkerName(), " was lost after ", tokens,
                                               " tokens; safe to retry (", status.message(), ")"));
  }
  if (absl::IsUnavailable(status)) {
    return absl::UnavailableError(absl::StrCat(WorkerName(), ": ", status.message(), " (after ",
                                               tokens, " tokens; safe to retry)"));
  }
  return Annotate(status, WorkerName());
}

std::string Generation::WorkerName() const {
  return absl::StrCat("worker ", worker_id_.empty() ? worker_->address() : worker_id_);
}

void Generation::Cancel() { Fail(absl::CancelledError("cancelled by the client")); }

void Generation::Fail(absl::Status status) {
  std::shared_ptr<WorkerCall> call;
  {
    absl::MutexLock lock(&mu_);
    if (result_ && !absl::IsCancelled(status)) return;
    // A cancelled request has nobody who would read what is queued.
    if (absl::IsCancelled(status)) queue_.clear();
    if (!result_) result_ = std::move(status);
    call = call_;
  }
  Pump();
  if (call) call->Cancel();
}

void Generation::OnWritten() {
  std::shared_ptr<WorkerCall> call;
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    if (read_paused_ && queue_.size() < kMaxQueuedResponses / 2 && !result_) {
      read_paused_ = false;
      call = call_;
    }
  }
  Pump();
  if (call) call->Next();
}

void Generation::Pump() {
  std::optional<GenerateResponse> response;
  absl::Status end;
  std::string request_id;
  {
    absl::MutexLock lock(&mu_);
    if (writing_ || sink_finished_) return;
    if (!queue_.empty()) {
      response = std::move(queue_.front());
      queue_.pop_front();
      writing_ = true;
    } else if (result_) {
      end = *result_;
      request_id = request_id_;
      sink_finished_ = true;
    } else {
      return;
    }
  }
  if (response) return sink_->Write(*response);
  LogEnd(request_id, end);
  sink_->Finish(end);
}

}  // namespace nosara::router
