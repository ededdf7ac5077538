// A SentencePiece model, through the SentencePiece library in its module.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

struct NosaraSentencePieceApi;

namespace nosara::text {

/// A loaded SentencePiece model. Immutable, thread-safe.
class SentencePieceModel final {
 public:
  enum class Kind { kNormal, kUnknown, kControl, kByte, kUnused };

  /// Whether the space that some models put before a text (add_dummy_prefix) is added.
  enum class Prefix { kAsModel, kNone };

  /// Loads the content of a tokenizer.model; nullptr and the reason in `error` if it is broken, or
  /// if the module libnosara_sentencepiece.so, which belongs to our programs, cannot be loaded.
  static std::unique_ptr<SentencePieceModel> Parse(const std::string& serialized,
                                                   std::string* error);
  ~SentencePieceModel();
  SentencePieceModel(const SentencePieceModel&) = delete;
  SentencePieceModel& operator=(const SentencePieceModel&) = delete;

  /// Appends the ids of `text` to `ids`; returns "" or what went wrong. Precondition: valid UTF-8.
  std::string Encode(std::string_view text, Prefix prefix, std::vector<int32_t>* ids) const;

  int size() const { return static_cast<int>(pieces_.size()); }

  /// Preconditions of both: 0 <= id < size().
  const std::string& Piece(int id) const { return pieces_[id]; }
  Kind KindOf(int id) const { return kinds_[id]; }

  /// -1 if there is no such piece.
  int Find(std::string_view piece) const;

  int unk_id() const { return unk_id_; }
  int bos_id() const { return bos_id_; }  // -1: none
  int eos_id() const { return eos_id_; }  // -1: none

  /// Whether the model puts a space before a text.
  bool has_prefix() const { return has_prefix_; }

 private:
  SentencePieceModel(const NosaraSentencePieceApi* api, void* model);

  const NosaraSentencePieceApi* const api_;
  void* const model_;  // owned, of the module
  std::vector<std::string> pieces_;
  std::vector<Kind> kinds_;
  std::unordered_map<std::string_view, int> ids_;  // of pieces_
  int unk_id_ = -1;
  int bos_id_ = -1;
  int eos_id_ = -1;
  bool has_prefix_ = false;
};

}  // namespace nosara::text
