#include "text/utf8.h"

#include <algorithm>
#include <cstdint>

namespace nosara::text {
namespace {

enum class Form { kValid, kIllFormed, kIncomplete };

/// What stands at the beginning of a text. `length` is that of the character (kValid), or of the
/// maximal part that no character begins with (kIllFormed), or all that is left (kIncomplete).
struct Character {
  Form form;
  size_t length;
};

// The bytes that may follow a lead byte: their number, and the range of the first of them, which
// excludes overlong forms, surrogates and what is above U+10FFFF (Unicode, table 3-7).
struct LeadByte {
  size_t followers;
  uint8_t low;
  uint8_t high;
};

bool ClassifyLead(uint8_t byte, LeadByte* lead) {
  if (byte < 0x80) {
    *lead = {0, 0, 0};
  } else if (byte < 0xc2) {
    return false;  // a continuation byte, or a lead of overlong forms only
  } else if (byte < 0xe0) {
    *lead = {1, 0x80, 0xbf};
  } else if (byte < 0xf0) {
    *lead = {2, static_cast<uint8_t>(byte == 0xe0 ? 0xa0 : 0x80),
             static_cast<uint8_t>(byte == 0xed ? 0x9f : 0xbf)};
  } else if (byte < 0xf5) {
    *lead = {3, static_cast<uint8_t>(byte == 0xf0 ? 0x90 : 0x80),
             static_cast<uint8_t>(byte == 0xf4 ? 0x8f : 0xbf)};
  } else {
    return false;
  }
  return true;
}

/// Precondition: `text` is not empty.
Character FirstCharacter(absl::string_view text) {
  LeadByte lead;
  if (!ClassifyLead(static_cast<uint8_t>(text[0]), &lead)) return {Form::kIllFormed, 1};
  for (size_t i = 1; i <= lead.followers; ++i) {
    if (i == text.size()) return {Form::kIncomplete, i};
    const uint8_t byte = static_cast<uint8_t>(text[i]);
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xbf;
    if (byte < low || byte > high) return {Form::kIllFormed, i};
  }
  return {Form::kValid, lead.followers + 1};
}

constexpr absl::string_view kReplacement = "\xef\xbf\xbd";

/// Appends the characters of `text` to `out`; returns how many bytes an incomplete character at
/// the end left over.
size_t AppendCharacters(absl::string_view text, std::string* out) {
  while (!text.empty()) {
    const size_t valid = ValidUtf8Prefix(text);
    out->append(text.data(), valid);
    text.remove_prefix(valid);
    if (text.empty()) break;
    const Character bad = FirstCharacter(text);
    if (bad.form == Form::kIncomplete) return text.size();
    out->append(kReplacement.data(), kReplacement.size());
    text.remove_prefix(bad.length);
  }
  return 0;
}

}  // namespace

size_t ValidUtf8Prefix(absl::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    if (static_cast<uint8_t>(text[at]) < 0x80) {
      ++at;
      continue;
    }
    const Character next = FirstCharacter(text.substr(at));
    if (next.form != Form::kValid) break;
    at += next.length;
  }
  return at;
}

std::optional<size_t> FirstInvalidUtf8(absl::string_view text) {
  const size_t valid = ValidUtf8Prefix(text);
  if (valid == text.size()) return std::nullopt;
  return valid;
}

std::string ReplaceInvalidUtf8(absl::string_view text) {
  Utf8Assembler assembler;
  std::string out = assembler.Push(text);
  out += assembler.Finish();
  return out;
}

std::string Utf8Assembler::Push(absl::string_view bytes) {
  pending_.append(bytes.data(), bytes.size());
  std::string out;
  const size_t left = AppendCharacters(pending_, &out);
  pending_.erase(0, pending_.size() - left);
  return out;
}

std::string Utf8Assembler::Finish() {
  if (pending_.empty()) return "";
  pending_.clear();
  return std::string(kReplacement.data(), kReplacement.size());
}

}  // namespace nosara::text
