// Writes small SentencePiece models (a serialized ModelProto) for tests, field by field.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"

namespace nosara::testing {

enum class PieceType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6 };

struct TestPiece {
  std::string text;
  PieceType type = PieceType::kNormal;
};

struct TestModelOptions {
  bool add_dummy_prefix = false;
  bool byte_fallback = true;
};

namespace internal {

inline void PutVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}
inline void PutNumber(int field, uint64_t value, std::string* out) {
  PutVarint(static_cast<uint64_t>(field) << 3, out);
  PutVarint(value, out);
}
inline void PutBytes(int field, const std::string& value, std::string* out) {
  PutVarint(static_cast<uint64_t>(field) << 3 | 2, out);
  PutVarint(value.size(), out);
  *out += value;
}
inline void PutFloat(int field, float value, std::string* out) {
  PutVarint(static_cast<uint64_t>(field) << 3 | 5, out);
  char bytes[4];
  std::memcpy(bytes, &value, 4);
  out->append(bytes, 4);
}

}  // namespace internal

/// A BPE model with identity normalization; earlier pieces merge first.
inline std::string SerializeModel(const std::vector<TestPiece>& pieces,
                                  const TestModelOptions& options = {}) {
  std::string model;
  for (size_t i = 0; i < pieces.size(); ++i) {
    std::string piece;
    internal::PutBytes(1, pieces[i].text, &piece);
    internal::PutFloat(2, -static_cast<float>(i), &piece);
    internal::PutNumber(3, static_cast<uint64_t>(pieces[i].type), &piece);
    internal::PutBytes(1, piece, &model);
  }
  std::string trainer;
  internal::PutNumber(3, 2, &trainer);  // model_type: BPE
  internal::PutNumber(35, options.byte_fallback ? 1 : 0, &trainer);
  internal::PutBytes(2, trainer, &model);
  std::string normalizer;
  internal::PutBytes(1, "identity", &normalizer);
  internal::PutNumber(3, options.add_dummy_prefix ? 1 : 0, &normalizer);
  internal::PutNumber(4, 0, &normalizer);  // remove_extra_whitespaces
  internal::PutNumber(5, 1, &normalizer);  // escape_whitespaces
  internal::PutBytes(3, normalizer, &model);
  return model;
}

/// <unk>, <s>, </s>, the turn markers as pieces of type `markers`, 256 bytes, the lower-case
/// letters, a space, a line break, and a few words that merge ("the", " the", "he", "in", "ing").
inline std::vector<TestPiece> SmallVocabulary(PieceType markers = PieceType::kControl) {
  const std::string space = "\xe2\x96\x81";
  std::vector<TestPiece> pieces = {{"<unk>", PieceType::kUnknown},
                                   {"<s>", PieceType::kControl},
                                   {"</s>", PieceType::kControl},
                                   {"<|im_start|>", markers},
                                   {"<|im_end|>", markers}};
  for (int byte = 0; byte < 256; ++byte) {
    pieces.push_back({absl::StrFormat("<0x%02X>", byte), PieceType::kByte});
  }
  for (const char* word : {"he", "the", "in", "ing"}) pieces.push_back({word});
  pieces.push_back({space + "the"});
  pieces.push_back({space});
  pieces.push_back({"\n"});
  for (char letter = 'a'; letter <= 'z'; ++letter) pieces.push_back({std::string(1, letter)});
  pieces.push_back({"\xc3\xa9"});  // é
  return pieces;
}

}  // namespace nosara::testing
