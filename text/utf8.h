// UTF-8 as the wire and the terminal need it: whole characters only.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace nosara::text {

/// The length in bytes of the longest prefix of `text` that is well-formed UTF-8 (no overlong
/// forms, no surrogates, nothing above U+10FFFF). Equal to text.size() when all of it is.
size_t ValidUtf8Prefix(absl::string_view text);

/// The offset of the first byte that is not part of a well-formed character; nothing if there is
/// none. A character cut off at the end counts as ill-formed, at its first byte.
std::optional<size_t> FirstInvalidUtf8(absl::string_view text);

/// `text` with each maximal ill-formed part replaced by one U+FFFD, as Unicode recommends.
std::string ReplaceInvalidUtf8(absl::string_view text);

/// Turns a stream of bytes, cut anywhere, into a stream of well-formed text. One thread at a time.
///
/// Invariants: (1) everything returned is well-formed UTF-8; (2) the concatenation of all that is
/// returned, Finish() included, equals ReplaceInvalidUtf8 of all bytes, however they were cut;
/// (3) at most 3 bytes, the beginning of a character, are held back.
class Utf8Assembler final {
 public:
  /// Takes the next bytes and returns the characters that are complete now.
  std::string Push(absl::string_view bytes);

  /// The end of the stream: a character that stayed incomplete becomes one U+FFFD. The assembler
  /// is as new afterwards.
  std::string Finish();

 private:
  std::string pending_;
};

}  // namespace nosara::text
