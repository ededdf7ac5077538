#include "router/request_validation.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "text/chat_template.h"
#include "text/utf8.h"

namespace nosara::router {
namespace {

using inference::v1::ChatPrompt;
using inference::v1::GenerateRequest;
using inference::v1::SamplingParams;
using inference::v1::TokenizeRequest;

enum class LowerBound { kIncluded, kExcluded };

// Comparisons are written so that NaN fails them.
absl::Status CheckRange(absl::string_view field, float value, float low, float high,
                        LowerBound bound = LowerBound::kIncluded) {
  const bool above = bound == LowerBound::kIncluded ? value >= low : value > low;
  if (above && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, " is not in the range ",
                   bound == LowerBound::kIncluded ? "from " : "above ", low, " to ", high));
}

absl::Status ValidateSampling(const SamplingParams& sampling) {
  if (sampling.has_temperature()) {
    RETURN_IF_ERROR(CheckRange("sampling.temperature", sampling.temperature(), 0, 100));
  }
  if (sampling.has_top_p()) {
    RETURN_IF_ERROR(CheckRange("sampling.top_p", sampling.top_p(), 0, 1, LowerBound::kExcluded));
  }
  if (sampling.has_min_p()) {
    RETURN_IF_ERROR(CheckRange("sampling.min_p", sampling.min_p(), 0, 1));
  }
  if (sampling.has_repetition_penalty()) {
    RETURN_IF_ERROR(CheckRange("sampling.repetition_penalty", sampling.repetition_penalty(), 0, 10,
                               LowerBound::kExcluded));
  }
  if (sampling.has_presence_penalty()) {
    RETURN_IF_ERROR(CheckRange("sampling.presence_penalty", sampling.presence_penalty(), -2, 2));
  }
  if (sampling.has_frequency_penalty()) {
    RETURN_IF_ERROR(CheckRange("sampling.frequency_penalty", sampling.frequency_penalty(), -2, 2));
  }
  return absl::OkStatus();
}

absl::Status CheckUtf8(absl::string_view field, absl::string_view value) {
  const std::optional<size_t> offset = text::FirstInvalidUtf8(value);
  if (!offset) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": not valid UTF-8 at byte ", *offset, " of ", value.size()));
}

absl::Status ValidateStops(const GenerateRequest& request) {
  if (request.stop_size() > kMaxStopStrings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "stop: ", request.stop_size(), " stop texts; at most ", kMaxStopStrings, " are allowed"));
  }
  for (int i = 0; i < request.stop_size(); ++i) {
    const std::string& stop = request.stop(i);
    const std::string field = absl::StrCat("stop[", i, "]");
    if (stop.empty() || stop.size() > kMaxStopBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          field, ": ", stop.size(), " bytes; must have 1 to ", kMaxStopBytes, " bytes"));
    }
    RETURN_IF_ERROR(CheckUtf8(field, stop));
  }
  if (request.stop_token_ids_size() > kMaxStopTokenIds) {
    return absl::InvalidArgumentError(
        absl::StrCat("stop_token_ids: ", request.stop_token_ids_size(), " ids; at most ",
                     kMaxStopTokenIds, " are allowed"));
  }
  return absl::OkStatus();
}

absl::Status ValidateRequestId(absl::string_view id) {
  if (id.size() > kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("request_id: ", id.size(), " bytes; at most ",
                                                   kMaxRequestIdBytes, " are allowed"));
  }
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c <= 0x7e; });
  if (!printable) {
    return absl::InvalidArgumentError("request_id: only printable ASCII characters are allowed");
  }
  return absl::OkStatus();
}

absl::Status CheckTextBytes(absl::string_view field, uint64_t bytes, const ModelLimits& limits) {
  const uint64_t most = kMaxBytesPerToken * limits.max_context_tokens;
  if (bytes <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      field, ": ", bytes, " bytes of text; at most ", most, " bytes (", kMaxBytesPerToken,
      " for each token of the model's context of ", limits.max_context_tokens, ") are allowed"));
}

absl::StatusOr<std::vector<int32_t>> EncodeText(const text::Tokenizer& tokenizer,
                                                const std::string& value,
                                                const ModelLimits& limits) {
  if (value.empty()) return absl::InvalidArgumentError("text: empty; a prompt needs text");
  RETURN_IF_ERROR(CheckTextBytes("text", value.size(), limits));
  text::EncodeOptions options;
  options.add_bos = tokenizer.adds_bos();
  auto tokens = tokenizer.Encode(value, options);
  if (!tokens.ok()) return Annotate(tokens.status(), "text");
  return tokens;
}

absl::StatusOr<std::vector<int32_t>> EncodeMessages(const text::Tokenizer& tokenizer,
                                                    const ChatPrompt& chat,
                                                    const ModelLimits& limits) {
  if (chat.messages().empty()) {
    return absl::InvalidArgumentError("chat.messages: empty; at least one message is needed");
  }
  uint64_t bytes = 0;
  std::vector<text::ChatMessage> messages;
  messages.reserve(chat.messages_size());
  for (const auto& message : chat.messages()) {
    // Each message costs some tokens for its markers, however short it is.
    bytes += message.content().size() + kMaxBytesPerToken;
    RETURN_IF_ERROR(CheckTextBytes("chat.messages", bytes, limits));
    messages.push_back({message.role(), message.content()});
  }
  auto tokens = text::EncodeChat(tokenizer, messages);
  if (!tokens.ok()) return Annotate(tokens.status(), "chat");
  return tokens;
}

absl::StatusOr<std::vector<int32_t>> CheckTokenIds(const inference::v1::TokenIds& token_ids,
                                                   const ModelLimits& limits) {
  if (token_ids.ids().empty()) {
    return absl::InvalidArgumentError("token_ids.ids: empty; at least one id is needed");
  }
  std::vector<int32_t> tokens;
  tokens.reserve(token_ids.ids_size());
  for (int i = 0; i < token_ids.ids_size(); ++i) {
    if (token_ids.ids(i) >= limits.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token_ids.ids[", i, "]: ", token_ids.ids(i),
                                                     " is not in the range from 0 to ",
                                                     limits.vocab_size - 1));
    }
    tokens.push_back(static_cast<int32_t>(token_ids.ids(i)));
  }
  return tokens;
}

absl::StatusOr<uint32_t> OutputTokens(const GenerateRequest& request, size_t prompt_tokens,
                                      uint32_t max_context_tokens) {
  if (prompt_tokens >= max_context_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: ", prompt_tokens, " tokens; the model's context of ",
                     max_context_tokens, " tokens allows at most ", max_context_tokens - 1));
  }
  const uint32_t left = max_context_tokens - static_cast<uint32_t>(prompt_tokens);
  if (!request.has_max_tokens()) return std::min(kDefaultMaxTokens, left);
  if (request.max_tokens() > left) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_tokens: ", request.max_tokens(), "; the model's context of ", max_context_tokens,
        " tokens leaves at most ", left, " after a prompt of ", prompt_tokens));
  }
  return request.max_tokens();
}

}  // namespace

absl::Status ValidateRequest(const GenerateRequest& request) {
  if (request.prompt_case() == GenerateRequest::PROMPT_NOT_SET) {
    return absl::InvalidArgumentError("prompt: missing; one of text, chat, token_ids is needed");
  }
  RETURN_IF_ERROR(ValidateSampling(request.sampling()));
  if (request.has_max_tokens() && request.max_tokens() == 0) {
    return absl::InvalidArgumentError("max_tokens: 0; must be 1 or more");
  }
  RETURN_IF_ERROR(ValidateStops(request));
  if (request.has_top_logprobs() && request.top_logprobs() > kMaxTopLogprobs) {
    return absl::InvalidArgumentError(absl::StrCat("top_logprobs: ", request.top_logprobs(),
                                                   " is not in the range from 0 to ",
                                                   kMaxTopLogprobs));
  }
  return ValidateRequestId(request.request_id());
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Tokenizer& tokenizer,
                                                  const GenerateRequest& request,
                                                  const ModelLimits& limits) {
  switch (request.prompt_case()) {
    case GenerateRequest::kText:
      return EncodeText(tokenizer, request.text(), limits);
    case GenerateRequest::kChat:
      return EncodeMessages(tokenizer, request.chat(), limits);
    case GenerateRequest::kTokenIds:
      return CheckTokenIds(request.token_ids(), limits);
    case GenerateRequest::PROMPT_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("prompt: missing; one of text, chat, token_ids is needed");
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Tokenizer& tokenizer,
                                                  const TokenizeRequest& request,
                                                  const ModelLimits& limits) {
  switch (request.input_case()) {
    case TokenizeRequest::kText:
      return EncodeText(tokenizer, request.text(), limits);
    case TokenizeRequest::kChat:
      return EncodeMessages(tokenizer, request.chat(), limits);
    case TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("input: missing; one of text, chat is needed");
}

absl::StatusOr<worker::v1::ExecuteRequest> BuildExecuteRequest(
    const GenerateRequest& request, absl::Span<const int32_t> prompt_tokens,
    const ExecuteContext& context) {
  ASSIGN_OR_RETURN(const uint32_t max_tokens,
                   OutputTokens(request, prompt_tokens.size(), context.limits.max_context_tokens));
  worker::v1::ExecuteRequest execute;
  execute.set_request_id(context.request_id);
  execute.set_model(context.model);
  execute.mutable_prompt_tokens()->Add(prompt_tokens.begin(), prompt_tokens.end());
  execute.set_max_tokens(max_tokens);

  const SamplingParams& from = request.sampling();
  worker::v1::Sampling& sampling = *execute.mutable_sampling();
  sampling.set_temperature(from.has_temperature() ? from.temperature() : 1.0f);
  sampling.set_top_k(from.top_k());
  sampling.set_top_p(from.has_top_p() ? from.top_p() : 1.0f);
  sampling.set_min_p(from.min_p());
  sampling.set_repetition_penalty(from.has_repetition_penalty() ? from.repetition_penalty() : 1.0f);
  sampling.set_presence_penalty(from.presence_penalty());
  sampling.set_frequency_penalty(from.frequency_penalty());
  sampling.set_seed(context.seed);

  for (int i = 0; i < request.stop_token_ids_size(); ++i) {
    if (request.stop_token_ids(i) >= context.limits.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("stop_token_ids[", i, "]: ", request.stop_token_ids(i),
                       " is not in the range from 0 to ", context.limits.vocab_size - 1));
    }
    execute.add_stop_token_ids(request.stop_token_ids(i));
  }
  if (!request.ignore_eos()) {
    execute.mutable_stop_token_ids()->Add(context.end_token_ids.begin(),
                                          context.end_token_ids.end());
  }
  if (request.has_top_logprobs()) execute.set_top_logprobs(request.top_logprobs());
  return execute;
}

}  // namespace nosara::router
