#include "text/stop_matcher.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"

namespace nosara::text {
namespace {

TEST(StopMatcherTest, WithoutStopStringsEverythingPasses) {
  StopMatcher matcher({});
  EXPECT_EQ(matcher.Push("any text").emit, "any text");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, EmptyStopStringsNeverMatch) {
  StopMatcher matcher({"", ""});
  EXPECT_EQ(matcher.Push("x").emit, "x");
  EXPECT_FALSE(matcher.Push("").matched);
}

TEST(StopMatcherTest, EmitsWhatPrecedesTheMatch) {
  StopMatcher matcher({"END"});
  const StopMatcher::Result result = matcher.Push("one two END three");
  EXPECT_TRUE(result.matched);
  EXPECT_EQ(result.emit, "one two ");
  EXPECT_EQ(matcher.matched_stop(), "END");
  EXPECT_EQ(matcher.Push("more").emit, "");
  EXPECT_TRUE(matcher.Push("more").matched);
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopMatcherTest, HoldsBackABeginningAcrossPieces) {
  StopMatcher matcher({"</s>", "\n\nUser:"});
  EXPECT_EQ(matcher.Push("Hello\n").emit, "Hello");
  EXPECT_EQ(matcher.Push("\n").emit, "");
  EXPECT_EQ(matcher.Push("Us").emit, "");
  EXPECT_EQ(matcher.Push("a").emit, "\n\nUsa");
  EXPECT_EQ(matcher.Push("<").emit, "");
  EXPECT_EQ(matcher.Flush(), "<");
}

TEST(StopMatcherTest, TheOneThatEndsFirstWinsThenTheLongest) {
  StopMatcher inner({"abcd", "bc"});
  EXPECT_EQ(inner.Push("xabcd").emit, "xa");
  EXPECT_EQ(inner.matched_stop(), "bc");
  StopMatcher longest({"c", "bc", "abc"});
  EXPECT_EQ(longest.Push("xabc").emit, "x");
  EXPECT_EQ(longest.matched_stop(), "abc");
}

/// The definition, by search over all ends.
struct Naive {
  std::optional<size_t> match_begin;
  std::string stop;
};
Naive FindNaively(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    Naive found;
    for (const std::string& stop : stops) {
      if (!stop.empty() && absl::EndsWith(text.substr(0, end), stop) &&
          stop.size() > found.stop.size()) {
        found.match_begin = end - stop.size();
        found.stop = stop;
      }
    }
    if (found.match_begin.has_value()) return found;
  }
  return {};
}

/// The longest suffix of `text` that a stop string begins with and is longer than.
size_t HeldNaively(const std::string& text, const std::vector<std::string>& stops) {
  size_t held = 0;
  for (const std::string& stop : stops) {
    for (size_t length = 1; length < stop.size() && length <= text.size(); ++length) {
      if (absl::EndsWith(text, stop.substr(0, length))) held = std::max(held, length);
    }
  }
  return held;
}

TEST(StopMatcherTest, AgreesWithTheDefinition) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto word = [&random](int longest) {
    std::string out;
    for (int i = random() % (longest + 1); i > 0; --i) out += "ab\n"[random() % 3];
    return out;
  };
  int matches = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops(random() % 4);
    for (std::string& stop : stops) stop = word(6);
    const std::string text = word(30);
    const Naive expected = FindNaively(text, stops);

    StopMatcher matcher(stops);
    std::string emitted;
    bool matched = false;
    for (size_t at = 0; at < text.size() && !matched;) {
      const size_t length = std::min<size_t>(random() % 5, text.size() - at);
      const StopMatcher::Result result = matcher.Push(text.substr(at, length));
      at += length;
      emitted += result.emit;
      matched = result.matched;
      if (!matched) {
        const std::string seen = text.substr(0, at);
        ASSERT_EQ(emitted, seen.substr(0, at - HeldNaively(seen, stops)));
      }
    }
    emitted += matcher.Flush();
    ASSERT_EQ(matched, expected.match_begin.has_value()) << testing::PrintToString(text);
    ASSERT_EQ(emitted, text.substr(0, expected.match_begin.value_or(text.size())));
    ASSERT_EQ(matcher.matched_stop(), expected.stop);
    matches += matched;
  }
  EXPECT_GT(matches, 1000);  // the inputs reach both outcomes
  EXPECT_LT(matches, 19000);
}

}  // namespace
}  // namespace nosara::text
