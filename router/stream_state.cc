#include "router/stream_state.h"

#include <algorithm>
#include <utility>

#include "text/utf8.h"

namespace nosara::router {

using inference::v1::GenerateResponse;
using worker::v1::ExecuteResponse;

StreamState::StreamState(Config config, const text::Tokenizer* tokenizer)
    : config_(std::move(config)),
      tokenizer_(tokenizer),
      detokenizer_(tokenizer),
      stop_matcher_(config_.stop) {}

absl::Status StreamState::OnWorkerEvent(const ExecuteResponse& event,
                                        std::vector<GenerateResponse>* responses) {
  if (finished_) return absl::OkStatus();
  if (event.event_case() == ExecuteResponse::kAccepted) {
    if (started_) return absl::InternalError("the worker accepted the request twice");
    started_ = true;
    cached_prompt_tokens_ = std::min(event.accepted().cached_tokens(), config_.prompt_tokens);
    auto& started = *responses->emplace_back().mutable_started();
    started.set_request_id(config_.request_id);
    started.set_model(config_.model);
    started.set_prompt_tokens(config_.prompt_tokens);
    started.set_seed(config_.seed);
    return absl::OkStatus();
  }
  if (!started_)
    return absl::InternalError("the worker sent output before it accepted the request");
  switch (event.event_case()) {
    case ExecuteResponse::kPrefillProgress:
      *responses->emplace_back().mutable_prefill_progress() = event.prefill_progress();
      break;
    case ExecuteResponse::kTokens:
      OnTokens(event.tokens(), responses);
      break;
    case ExecuteResponse::kCompleted:
      OnCompleted(event.completed(), responses);
      break;
    default:  // an event of a newer worker, which this router can do without
      break;
  }
  return absl::OkStatus();
}

void StreamState::OnTokens(const worker::v1::TokenChunk& tokens,
                           std::vector<GenerateResponse>* responses) {
  if (tokens.tokens().empty()) return;
  if (completion_tokens_ == 0) first_token_at_ = config_.clock->Now();
  auto& chunk = *responses->emplace_back().mutable_chunk();
  for (const worker::v1::Token& token : tokens.tokens()) {
    ++completion_tokens_;
    chunk.add_token_ids(token.id());
    if (config_.wants_logprobs) FillLogprob(token, chunk.add_logprobs());
    const text::StopMatcher::Result result =
        stop_matcher_.Push(detokenizer_.Push(static_cast<int32_t>(token.id())));
    chunk.mutable_text()->append(result.emit);
    if (result.matched) return FinishWithStopText(responses);
  }
}

void StreamState::OnCompleted(const worker::v1::Completed& completed,
                              std::vector<GenerateResponse>* responses) {
  worker_completed_ = true;
  const text::StopMatcher::Result tail = stop_matcher_.Push(detokenizer_.Finish());
  std::string rest = tail.emit;
  if (!tail.matched) rest += stop_matcher_.Flush();
  if (!rest.empty()) responses->emplace_back().mutable_chunk()->set_text(std::move(rest));

  auto& finished = *responses->emplace_back().mutable_finished();
  finished_ = true;
  finished.set_reason(tail.matched ? inference::v1::FINISH_REASON_STOP : completed.reason());
  finished.set_stop_text(stop_matcher_.matched_stop());
  *finished.mutable_usage() = completed.usage();
  *finished.mutable_cache() = completed.cache();
  SetTimes(&finished);
}

void StreamState::FinishWithStopText(std::vector<GenerateResponse>* responses) {
  auto& finished = *responses->emplace_back().mutable_finished();
  finished_ = true;
  finished.set_reason(inference::v1::FINISH_REASON_STOP);
  finished.set_stop_text(stop_matcher_.matched_stop());
  finished.mutable_usage()->set_prompt_tokens(config_.prompt_tokens);
  finished.mutable_usage()->set_completion_tokens(completion_tokens_);
  finished.mutable_usage()->set_cached_prompt_tokens(cached_prompt_tokens_);
  SetTimes(&finished);
}

void StreamState::SetTimes(inference::v1::Finished* finished) const {
  const absl::Time now = config_.clock->Now();
  finished->set_total_time_us(absl::ToInt64Microseconds(now - config_.arrival));
  const absl::Time first = completion_tokens_ == 0 ? now : first_token_at_;
  finished->set_time_to_first_token_us(absl::ToInt64Microseconds(first - config_.arrival));
}

std::string StreamState::DisplayText(uint32_t id) const {
  const auto token = static_cast<int32_t>(id);
  const absl::string_view bytes = tokenizer_->TokenBytes(token);
  if (bytes.empty()) return text::ReplaceInvalidUtf8(tokenizer_->TokenText(token));
  return text::ReplaceInvalidUtf8(bytes);
}

void StreamState::FillLogprob(const worker::v1::Token& token,
                              inference::v1::TokenLogprob* logprob) const {
  logprob->set_token_id(token.id());
  logprob->set_text(DisplayText(token.id()));
  logprob->set_logprob(token.logprob());
  for (const worker::v1::TopToken& other : token.top()) {
    auto& top = *logprob->add_top();
    top.set_token_id(other.id());
    top.set_text(DisplayText(other.id()));
    top.set_logprob(other.logprob());
  }
}

}  // namespace nosara::router
