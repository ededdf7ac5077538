// From what a client asks to what a worker runs, or a reason why not.
//
// Pure functions. Every INVALID_ARGUMENT names the field, its value and what is allowed; the ranges
// are those of inference.proto.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "nosara/inference/v1/inference.pb.h"
#include "nosara/worker/v1/worker.pb.h"
#include "text/tokenizer.h"

namespace nosara::router {

inline constexpr uint32_t kDefaultMaxTokens = 256;
inline constexpr int kMaxStopStrings = 16;
inline constexpr int kMaxStopBytes = 1024;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr uint32_t kMaxTopLogprobs = 20;
inline constexpr int kMaxRequestIdBytes = 128;
/// No text of a prompt that fits the context has more bytes per token than this, but for
/// pathological ones; longer texts are refused before they cost a tokenization.
inline constexpr uint64_t kMaxBytesPerToken = 16;

/// What the workers of a model say about it.
struct ModelLimits {
  uint32_t max_context_tokens = 0;
  uint32_t vocab_size = 0;
};

/// Everything that can be said without the model: sampling, stops, presence of a prompt.
absl::Status ValidateRequest(const inference::v1::GenerateRequest& request);

/// The prompt as tokens: text and chat through `tokenizer`, with the BOS where the model wants one;
/// token ids as they are. INVALID_ARGUMENT for an empty prompt, text that is not UTF-8, more text
/// than kMaxBytesPerToken bytes for each token of the context, an unknown role, an id outside the
/// vocabulary. Takes time in proportion to the text: not for a gRPC thread.
absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Tokenizer& tokenizer,
                                                  const inference::v1::GenerateRequest& request,
                                                  const ModelLimits& limits);
absl::StatusOr<std::vector<int32_t>> EncodePrompt(const text::Tokenizer& tokenizer,
                                                  const inference::v1::TokenizeRequest& request,
                                                  const ModelLimits& limits);

/// What is decided outside the request.
struct ExecuteContext {
  std::string request_id;
  std::string model;
  uint64_t seed = 0;
  ModelLimits limits;
  absl::Span<const uint32_t> end_token_ids;  // of the model
};

/// The worker's request, every default filled in. Precondition: ValidateRequest(request) is OK.
/// INVALID_ARGUMENT if prompt and max_tokens do not fit the context, or a stop token is outside the
/// vocabulary.
absl::StatusOr<worker::v1::ExecuteRequest> BuildExecuteRequest(
    const inference::v1::GenerateRequest& request, absl::Span<const int32_t> prompt_tokens,
    const ExecuteContext& context);

}  // namespace nosara::router
