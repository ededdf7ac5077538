#include "tests/fuzz/fuzz_targets.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/check.h"
#include "text/stop_matcher.h"
#include "text/utf8.h"
#include "worker/model/config.h"
#include "worker/model/safetensors.h"

namespace nosara::fuzz {
namespace {

absl::string_view AsText(absl::Span<const uint8_t> input) {
  return {reinterpret_cast<const char*>(input.data()), input.size()};
}

/// Takes values from the front of the input; zeros when it is used up.
class Reader final {
 public:
  explicit Reader(absl::Span<const uint8_t> input) : left_(input) {}

  uint8_t Byte() {
    if (left_.empty()) return 0;
    const uint8_t byte = left_.front();
    left_.remove_prefix(1);
    return byte;
  }
  std::string Text(size_t size) {
    size = std::min(size, left_.size());
    const std::string text(AsText(left_.subspan(0, size)));
    left_.remove_prefix(size);
    return text;
  }
  std::string Rest() { return Text(left_.size()); }

 private:
  absl::Span<const uint8_t> left_;
};

}  // namespace

void SafetensorsHeaderTarget(absl::Span<const uint8_t> input) {
  const absl::Span<const std::byte> file(reinterpret_cast<const std::byte*>(input.data()),
                                         input.size());
  const absl::StatusOr<worker::SafetensorsHeader> header =
      worker::ParseSafetensorsHeader(file, "fuzz");
  if (!header.ok()) {
    CHECK(absl::IsInvalidArgument(header.status()));
    return;
  }
  CHECK(header->data_offset <= file.size());
  uint64_t covered = 0;
  for (const worker::TensorInfo& info : header->tensors) {
    CHECK(info.begin == covered && info.begin <= info.end);
    covered = info.end;
    unsigned __int128 bytes = worker::TensorDTypeBytes(info.dtype);
    for (const int64_t size : info.shape) {
      CHECK(size >= 0);
      bytes *= static_cast<uint64_t>(size);
      if (bytes == 0) break;
    }
    CHECK(bytes == info.end - info.begin);
  }
  CHECK(header->data_offset + covered == file.size());
}

void ConfigTarget(absl::Span<const uint8_t> input) {
  const absl::StatusOr<worker::ModelConfig> config =
      worker::ModelConfig::Parse(AsText(input), "fuzz");
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status()));
    CHECK(!text::FirstInvalidUtf8(config.status().message()).has_value());
    return;
  }
  CHECK(config->Validate().ok());
  CHECK(config->GroupSize() * config->num_kv_heads == config->num_heads);
}

void TextTarget(absl::Span<const uint8_t> input) {
  Reader reader(input);
  std::vector<std::string> stops(reader.Byte() % 4);
  for (std::string& stop : stops) stop = reader.Text(reader.Byte() % 8);
  std::vector<size_t> cuts(1 + reader.Byte() % 8);
  for (size_t& cut : cuts) cut = reader.Byte() % 16;
  const std::string bytes = reader.Rest();

  const std::string whole = text::ReplaceInvalidUtf8(bytes);
  CHECK(!text::FirstInvalidUtf8(whole).has_value());
  CHECK(text::FirstInvalidUtf8(bytes).has_value() || whole == bytes);
  text::StopMatcher at_once(stops);
  const text::StopMatcher::Result expected = at_once.Push(whole);
  const std::string expected_text = expected.emit + at_once.Flush();
  CHECK(expected.matched || expected_text == whole);
  for (const std::string& stop : stops) {
    CHECK(stop.empty() || expected_text.find(stop) == std::string::npos);
  }

  text::Utf8Assembler assembler;
  text::StopMatcher matcher(stops);
  std::string assembled;
  std::string emitted;
  for (size_t at = 0, i = 0; at < bytes.size(); ++i) {
    // Two cuts of nothing in a row would never end.
    const size_t length = std::min(cuts[i % cuts.size()] + i % 2, bytes.size() - at);
    const std::string part = assembler.Push(absl::string_view(bytes).substr(at, length));
    CHECK(!text::FirstInvalidUtf8(part).has_value());
    assembled += part;
    emitted += matcher.Push(part).emit;
    at += length;
  }
  const std::string last = assembler.Finish();
  assembled += last;
  const text::StopMatcher::Result end = matcher.Push(last);
  emitted += end.emit;
  emitted += matcher.Flush();
  CHECK(assembled == whole);
  CHECK(end.matched == expected.matched);
  CHECK(emitted == expected_text);
  CHECK(matcher.matched_stop() == at_once.matched_stop());
}

}  // namespace nosara::fuzz
