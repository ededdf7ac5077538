// ChatML: a conversation as one prompt.
//
//   <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n
//
// The released NOSA models and nosa-tiny are trained on this form. Content is encoded as plain
// text, so that nobody can open or close a turn by writing its markers into a message.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "text/tokenizer.h"

namespace nosara::text {

inline constexpr absl::string_view kTurnStart = "<|im_start|>";
inline constexpr absl::string_view kTurnEnd = "<|im_end|>";

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

/// Whether the prompt ends with the opening of an assistant's turn.
enum class GenerationPrompt { kAdd, kOmit };

/// INVALID_ARGUMENT if there is no message, a role is unknown or a content is not valid UTF-8;
/// names the message by its index.
absl::Status ValidateChat(absl::Span<const ChatMessage> messages);

/// The token ids of the conversation, with a BOS where the tokenizer adds one. Pure, thread-safe.
/// Errors of ValidateChat; FAILED_PRECONDITION if the tokenizer has no turn markers.
absl::StatusOr<std::vector<int32_t>> EncodeChat(
    const Tokenizer& tokenizer, absl::Span<const ChatMessage> messages,
    GenerationPrompt generation_prompt = GenerationPrompt::kAdd);

}  // namespace nosara::text
