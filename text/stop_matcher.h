// Stop strings in a stream of text.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace nosara::text {

/// Finds the first of several stop strings in a stream of text that arrives in pieces. Owned by one
/// stream, one thread at a time.
///
/// The match is the one that ends first; of several that end there, the longest. What is emitted
/// does not depend on how the text is cut, and no byte of the match is ever emitted.
/// Invariants: (1) before a match, emitted text + held text = all text pushed; (2) the held text is
/// the longest suffix that a stop string begins with. As stop strings are whole characters, held
/// text begins at a character when pushed text ends at one.
class StopMatcher final {
 public:
  struct Result {
    std::string emit;      // text that is certain not to belong to a match
    bool matched = false;  // generation ends here; Push and Flush give nothing any more
  };

  /// Empty stop strings never match.
  explicit StopMatcher(std::vector<std::string> stop_strings);

  /// Takes the next text. After a match: nothing, matched.
  Result Push(absl::string_view text);

  /// The end of the stream without a match: the text held back.
  std::string Flush();

  /// The stop string that matched, "" before that.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  // Knuth-Morris-Pratt: how much of the pattern the text so far ends with.
  struct Pattern {
    std::string text;
    std::vector<size_t> failure;  // failure[i]: longest proper border of text[0..i]
    size_t length = 0;
  };

  std::vector<Pattern> patterns_;
  std::string held_;
  bool matched_ = false;
  std::string matched_stop_;
};

}  // namespace nosara::text
