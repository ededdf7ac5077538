// Text to token ids and back, as the checkpoint's tokenizer defines it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace nosara::text {

class SentencePieceModel;

/// What happens to the text of a special token (e.g. "<|im_end|>") inside a text.
enum class SpecialTokens {
  kAsText,  // it is text like any other: what a user wrote cannot act as a control token
  kParse,   // it becomes the special token
};

/// Where the encoded text stands. It decides about the space that some models put before a text.
enum class TextPosition {
  kStart,              // at the beginning of the sequence
  kAfterSpecialToken,  // right after a special token that the caller has placed
};

struct EncodeOptions {
  bool add_bos = false;  // puts bos_id() first; INVALID_ARGUMENT if the model has none
  SpecialTokens special_tokens = SpecialTokens::kAsText;
  TextPosition position = TextPosition::kStart;
};

/// A checkpoint's tokenizer: the SentencePiece model `tokenizer.model` and, where there is one,
/// `tokenizer_config.json` with the added tokens. Immutable, thread-safe.
///
/// Added tokens are found first, longest match at the leftmost place; the text between them goes
/// through SentencePiece. Their ids may lie inside the range of the pieces or after it. Special
/// are: the control pieces of the model, the added tokens marked special, and "<|im_start|>" and
/// "<|im_end|>" wherever they exist, because the chat template gives them their meaning.
class Tokenizer final {
 public:
  /// NOT_FOUND without `dir`/tokenizer.model, INVALID_ARGUMENT for a broken file; both name it.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& dir);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// INVALID_ARGUMENT if `text` is not valid UTF-8; the message has the byte offset. The empty text
  /// has no tokens, but for the BOS. Takes about a second per megabyte: a caller bounds the size.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              const EncodeOptions& options = {}) const;

  /// The text of a whole sequence, without special tokens, without the space that the model puts
  /// before every text; ill-formed bytes become U+FFFD. INVALID_ARGUMENT for an id outside
  /// [0, vocab_size).
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids) const;

  /// The bytes that one token adds to the output, possibly a part of a character: one byte for a
  /// byte-fallback piece, nothing for a special token or an id that has no token. The view lives
  /// as long as the tokenizer.
  absl::string_view TokenBytes(int32_t id) const;

  /// The token as it is written in the vocabulary, e.g. "▁the", "<0x0A>", "<|im_end|>"; "" for an
  /// id that has no token. For logs and log-probabilities.
  absl::string_view TokenText(int32_t id) const;

  /// The id of the token written like this in the vocabulary, special tokens included.
  std::optional<int32_t> TokenId(absl::string_view token_text) const;

  bool IsSpecial(int32_t id) const;

  /// One more than the largest id. A model's embedding may have more rows than that.
  int vocab_size() const { return static_cast<int>(tokens_.size()); }

  int32_t bos_id() const { return bos_id_; }  // -1: none
  int32_t eos_id() const { return eos_id_; }  // -1: none

  /// Whether the checkpoint wants a BOS before a text (tokenizer_config.json, add_bos_token;
  /// true where it is not said and there is a BOS).
  bool adds_bos() const { return adds_bos_; }

 private:
  struct Token {
    std::string text;   // as in the vocabulary
    std::string bytes;  // what it adds to the output
    bool special = false;
  };
  // A token that is looked for in the text before SentencePiece sees it.
  struct AddedToken {
    std::string text;
    int32_t id = -1;
    bool special = false;
    bool strip_left = false;   // swallows the white space before it
    bool strip_right = false;  // swallows the white space after it
  };
  struct Match {
    const AddedToken* token = nullptr;
    size_t begin = 0;
  };

  Tokenizer();

  absl::Status LoadPieces(const std::string& path);
  absl::Status LoadConfig(const std::string& path);
  absl::Status AddToken(AddedToken token);
  void FinishLoading();
  Match FindAddedToken(absl::string_view text, size_t from, SpecialTokens mode) const;
  absl::Status EncodePlain(absl::string_view text, TextPosition position,
                           std::vector<int32_t>* ids) const;
  void AppendAsCharacters(absl::string_view text, std::vector<int32_t>* ids) const;

  // Constant after Load.
  std::unique_ptr<SentencePieceModel> model_;
  std::vector<Token> tokens_;  // by id
  absl::flat_hash_map<std::string, int32_t> id_by_text_;
  std::vector<AddedToken> added_tokens_;                      // longest first
  std::array<std::vector<size_t>, 256> added_by_first_byte_;  // into added_tokens_, longest first
  int32_t bos_id_ = -1;
  int32_t eos_id_ = -1;
  bool adds_bos_ = false;
  bool prefix_after_special_ = true;  // "legacy" of tokenizer_config.json
};

}  // namespace nosara::text
