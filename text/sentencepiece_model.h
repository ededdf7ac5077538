// The SentencePiece library behind a header of the standard library alone: its own header declares
// absl::string_view as std::string_view and cannot be included together with Abseil.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace nosara::text {

/// A loaded SentencePiece model. Immutable, thread-safe.
class SentencePieceModel final {
 public:
  enum class Kind { kNormal, kUnknown, kControl, kByte, kUnused };

  /// Whether the space that some models put before a text (add_dummy_prefix) is added.
  enum class Prefix { kAsModel, kNone };

  /// Loads the content of a tokenizer.model; nullptr and the reason in `error` if it is broken.
  static std::unique_ptr<SentencePieceModel> Parse(const std::string& serialized,
                                                   std::string* error);
  ~SentencePieceModel();
  SentencePieceModel(const SentencePieceModel&) = delete;
  SentencePieceModel& operator=(const SentencePieceModel&) = delete;

  /// Appends the ids of `text` to `ids`; returns "" or what went wrong. Precondition: valid UTF-8.
  std::string Encode(std::string_view text, Prefix prefix, std::vector<int32_t>* ids) const;

  int size() const;

  /// Preconditions of both: 0 <= id < size().
  const std::string& Piece(int id) const;
  Kind KindOf(int id) const;

  /// -1 if there is no such piece.
  int Find(std::string_view piece) const;

  int unk_id() const;
  int bos_id() const;  // -1: none
  int eos_id() const;  // -1: none

  /// Whether the model puts a space before a text.
  bool has_prefix() const { return has_prefix_; }

 private:
  struct Processors;

  SentencePieceModel();

  std::unique_ptr<Processors> processors_;
  bool has_prefix_ = false;
};

}  // namespace nosara::text
