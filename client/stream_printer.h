// The stream of a generation on a terminal.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "nosara/inference/v1/inference.pb.h"

namespace nosara::client {

/// Writes the text of a stream to one place as it comes, and progress and statistics to another.
/// One thread.
class StreamPrinter final {
 public:
  struct Options {
    bool progress = false;    // a line that shows how far the prefill is
    bool statistics = false;  // what Finished tells, at the end
    bool json = false;        // each event as one line of JSON instead of its text
    bool logprobs = false;    // each token with its log-probability, after the text
  };

  /// Both streams must outlive this object.
  StreamPrinter(Options options, std::ostream* out, std::ostream* err)
      : options_(options), out_(out), err_(err) {}

  void Print(const inference::v1::GenerateResponse& event);

  /// The end of the stream, also of a broken one: leaves the terminal on a new line.
  void End();

  /// What came so far.
  const std::string& text() const { return text_; }
  const std::vector<uint32_t>& token_ids() const { return token_ids_; }

 private:
  void ClearProgress();
  void PrintStatistics(const inference::v1::Finished& finished);

  const Options options_;
  std::ostream* const out_;
  std::ostream* const err_;
  bool progress_shown_ = false;
  std::string text_;
  std::vector<uint32_t> token_ids_;
  std::vector<inference::v1::TokenLogprob> logprobs_;
  inference::v1::Finished finished_;
};

}  // namespace nosara::client
