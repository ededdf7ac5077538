#include "text/chat_template.h"

#include <optional>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "text/utf8.h"

namespace nosara::text {
namespace {

constexpr absl::string_view kRoles[] = {"system", "user", "assistant"};

bool IsRole(absl::string_view role) {
  for (const absl::string_view known : kRoles) {
    if (role == known) return true;
  }
  return false;
}

absl::Status AppendText(const Tokenizer& tokenizer, absl::string_view text,
                        std::vector<int32_t>* ids) {
  EncodeOptions options;
  options.special_tokens = SpecialTokens::kAsText;
  options.position = TextPosition::kAfterSpecialToken;
  ASSIGN_OR_RETURN(const std::vector<int32_t> encoded, tokenizer.Encode(text, options));
  ids->insert(ids->end(), encoded.begin(), encoded.end());
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateChat(absl::Span<const ChatMessage> messages) {
  if (messages.empty()) {
    return absl::InvalidArgumentError("messages is empty; at least one message is needed");
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    if (!IsRole(messages[i].role)) {
      return absl::InvalidArgumentError(absl::StrCat("messages[", i, "].role is \"",
                                                     ReplaceInvalidUtf8(messages[i].role),
                                                     "\"; allowed: system, user, assistant"));
    }
    if (const std::optional<size_t> bad = FirstInvalidUtf8(messages[i].content)) {
      return absl::InvalidArgumentError(
          absl::StrCat("messages[", i, "].content is not valid UTF-8 at byte offset ", *bad));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const Tokenizer& tokenizer,
                                                absl::Span<const ChatMessage> messages,
                                                GenerationPrompt generation_prompt) {
  RETURN_IF_ERROR(ValidateChat(messages));
  const std::optional<int32_t> start = tokenizer.TokenId(kTurnStart);
  const std::optional<int32_t> end = tokenizer.TokenId(kTurnEnd);
  if (!start.has_value() || !end.has_value()) {
    return absl::FailedPreconditionError(absl::StrCat("the model's tokenizer has no ",
                                                      start.has_value() ? kTurnEnd : kTurnStart,
                                                      " token: it is not a chat model"));
  }
  std::vector<int32_t> ids;
  if (tokenizer.adds_bos()) ids.push_back(tokenizer.bos_id());
  for (size_t i = 0; i < messages.size(); ++i) {
    ids.push_back(*start);
    RETURN_IF_ERROR(Annotate(
        AppendText(tokenizer, absl::StrCat(messages[i].role, "\n", messages[i].content), &ids),
        absl::StrCat("messages[", i, "]")));
    ids.push_back(*end);
    RETURN_IF_ERROR(AppendText(tokenizer, "\n", &ids));
  }
  if (generation_prompt == GenerationPrompt::kAdd) {
    ids.push_back(*start);
    RETURN_IF_ERROR(AppendText(tokenizer, "assistant\n", &ids));
  }
  return ids;
}

}  // namespace nosara::text
