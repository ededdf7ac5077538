#include "text/utf8.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace nosara::text {
namespace {

constexpr char kReplacement[] = "\xef\xbf\xbd";

std::string EncodeCodePoint(uint32_t code) {
  std::string out;
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
  return out;
}

TEST(Utf8Test, AcceptsEveryCodePointAndRefusesSurrogatesAndWhatIsAbove) {
  for (uint32_t code = 0; code < 0x120000; ++code) {
    const bool valid = code < 0x110000 && !(code >= 0xd800 && code < 0xe000);
    const std::string text = EncodeCodePoint(code);
    ASSERT_EQ(ValidUtf8Prefix(text), valid ? text.size() : 0) << std::hex << code;
  }
}

TEST(Utf8Test, AcceptsExactlyTheValidTextsOfTwoBytes) {
  for (int first = 0; first < 256; ++first) {
    for (int second = 0; second < 256; ++second) {
      const std::string text = {static_cast<char>(first), static_cast<char>(second)};
      const bool two_ascii = first < 0x80 && second < 0x80;
      const bool one_character = first >= 0xc2 && first <= 0xdf && second >= 0x80 && second <= 0xbf;
      ASSERT_EQ(ValidUtf8Prefix(text) == 2, two_ascii || one_character) << first << " " << second;
    }
  }
}

TEST(Utf8Test, RefusesOverlongForms) {
  for (const char* text : {"\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xe0\x9f\xbf",
                           "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf"}) {
    EXPECT_EQ(FirstInvalidUtf8(text), 0u) << text;
  }
}

TEST(Utf8Test, NamesTheFirstBadByte) {
  EXPECT_EQ(FirstInvalidUtf8(""), std::nullopt);
  EXPECT_EQ(FirstInvalidUtf8("h\xc3\xa9llo"), std::nullopt);
  EXPECT_EQ(FirstInvalidUtf8("abc\xff"), 3u);
  EXPECT_EQ(FirstInvalidUtf8("h\xc3\xa9\x80"), 3u);
  // Cut inside a character: its first byte.
  EXPECT_EQ(FirstInvalidUtf8("ab\xe6\xbc"), 2u);
  EXPECT_EQ(ValidUtf8Prefix("ab\xe6\xbc"), 2u);
}

// The examples of the Unicode standard, section 3.9: one U+FFFD per maximal ill-formed part.
TEST(Utf8Test, ReplacesMaximalParts) {
  const std::string r = kReplacement;
  EXPECT_EQ(ReplaceInvalidUtf8("a\xf1\x80\x80\xe1\x80\xc2"
                               "b\x80"
                               "c\x80\xbf"
                               "d"),
            "a" + r + r + r + "b" + r + "c" + r + r + "d");
  EXPECT_EQ(ReplaceInvalidUtf8("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82"
                               "A"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(ReplaceInvalidUtf8("x\xf0\x9f\x8e"), "x" + r);
}

TEST(Utf8AssemblerTest, NeverSplitsACharacter) {
  Utf8Assembler assembler;
  EXPECT_EQ(assembler.Push("a\xf0"), "a");
  EXPECT_EQ(assembler.Push("\x9f"), "");
  EXPECT_EQ(assembler.Push("\x8e"), "");
  EXPECT_EQ(assembler.Push("\x89z"), "\xf0\x9f\x8e\x89z");
  EXPECT_EQ(assembler.Finish(), "");
}

TEST(Utf8AssemblerTest, ReplacesABadByteAsSoonAsItIsCertain) {
  Utf8Assembler assembler;
  EXPECT_EQ(assembler.Push("\xe6"), "");
  EXPECT_EQ(assembler.Push("x"), std::string(kReplacement) + "x");
  EXPECT_EQ(assembler.Push("\xff"), kReplacement);
  EXPECT_EQ(assembler.Push("\xe6\xbc"), "");
  EXPECT_EQ(assembler.Finish(), kReplacement);
  EXPECT_EQ(assembler.Finish(), "");
}

TEST(Utf8AssemblerTest, CutsDoNotMatter) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  // Bytes from every class, so that whole, broken and cut characters are all frequent.
  const std::vector<uint8_t> alphabet = {'a',  0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc3,
                                         0xe0, 0xe6, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5, 0xff};
  for (int round = 0; round < 20000; ++round) {
    std::string bytes;
    for (int i = random() % 12; i > 0; --i) {
      bytes += static_cast<char>(alphabet[random() % alphabet.size()]);
    }
    Utf8Assembler assembler;
    std::string streamed;
    for (size_t at = 0; at < bytes.size();) {
      const size_t length = random() % 4;
      streamed += assembler.Push(absl::string_view(bytes).substr(at, length));
      ASSERT_EQ(FirstInvalidUtf8(streamed), std::nullopt);
      at += length;
    }
    streamed += assembler.Finish();
    ASSERT_EQ(streamed, ReplaceInvalidUtf8(bytes)) << testing::PrintToString(bytes);
    if (!FirstInvalidUtf8(bytes).has_value()) {
      ASSERT_EQ(streamed, bytes);
    }
  }
}

}  // namespace
}  // namespace nosara::text
