// Token ids to text while they are generated.
#pragma once

#include <cstdint>
#include <string>

#include "text/tokenizer.h"
#include "text/utf8.h"

namespace nosara::text {

/// Turns a stream of tokens into a stream of text that never splits a character. Owned by one
/// stream, one thread at a time.
///
/// The text continues a prompt: a leading space of the first token is kept. Special tokens and ids
/// without a token give nothing. Invariants: those of Utf8Assembler.
class IncrementalDetokenizer final {
 public:
  /// `tokenizer` must outlive this object.
  explicit IncrementalDetokenizer(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}

  /// The characters that token `id` completes, possibly none.
  std::string Push(int32_t id) { return assembler_.Push(tokenizer_->TokenBytes(id)); }

  /// The end of the stream: an unfinished character becomes U+FFFD.
  std::string Finish() { return assembler_.Finish(); }

 private:
  const Tokenizer* tokenizer_;
  Utf8Assembler assembler_;
};

}  // namespace nosara::text
