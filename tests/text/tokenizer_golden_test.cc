// tests/testdata/tokenizer: what the Python reference makes of texts, ids and conversations
// (tests/reference/README.md describes the file).
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "tests/status_matchers.h"
#include "text/chat_template.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace nosara::text {
namespace {

using nlohmann::json;

class TokenizerGoldenTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(tokenizer_, Tokenizer::Load("tests/testdata/tokenizer"));
    std::ifstream file("tests/testdata/tokenizer/golden.json");
    golden_ = json::parse(file, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(golden_.is_object());
  }

  std::string Stream(const std::vector<int32_t>& ids) const {
    IncrementalDetokenizer detokenizer(tokenizer_.get());
    std::string text;
    for (const int32_t id : ids) text += detokenizer.Push(id);
    return text + detokenizer.Finish();
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  json golden_;
};

TEST_F(TokenizerGoldenTest, Vocabulary) {
  EXPECT_EQ(tokenizer_->vocab_size(), golden_["vocabulary"].get<int>());
  EXPECT_EQ(tokenizer_->bos_id(), golden_["bos_id"].get<int>());
  EXPECT_EQ(tokenizer_->eos_id(), golden_["eos_id"].get<int>());
  EXPECT_EQ(tokenizer_->TokenId("<0x00>"), golden_["first_byte_id"].get<int>());
  for (const auto& [text, id] : golden_["added_tokens"].items()) {
    EXPECT_EQ(tokenizer_->TokenId(text), id.get<int>());
    EXPECT_TRUE(tokenizer_->IsSpecial(id.get<int>()));
  }
}

TEST_F(TokenizerGoldenTest, TextsToIdsAndBack) {
  const EncodeOptions parse = {.special_tokens = SpecialTokens::kParse};
  int cases = 0;
  for (const char* list : {"texts", "lossy_texts"}) {
    for (const json& item : golden_[list]) {
      const std::string text = item["text"].get<std::string>();
      SCOPED_TRACE(text);
      ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, tokenizer_->Encode(text, parse));
      ASSERT_EQ(ids, item["ids"].get<std::vector<int32_t>>());
      const std::string expected =
          absl::HexStringToBytes(item["decoded_without_special_hex"].get<std::string>());
      ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer_->Decode(ids));
      EXPECT_EQ(decoded, expected);
      EXPECT_EQ(Stream(ids), expected);
      for (size_t i = 0; i < ids.size(); ++i) {
        if (tokenizer_->IsSpecial(ids[i])) continue;
        EXPECT_EQ(tokenizer_->TokenBytes(ids[i]),
                  absl::HexStringToBytes(item["bytes_hex"][i].get<std::string>()));
      }
      // As a user's text nothing in it is special, and all of it comes back.
      if (std::string(list) == "texts") {
        ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> plain, tokenizer_->Encode(text));
        for (const int32_t id : plain) EXPECT_FALSE(tokenizer_->IsSpecial(id));
        EXPECT_EQ(Stream(plain), text);
      }
      ++cases;
    }
  }
  EXPECT_GT(cases, 50);
}

TEST_F(TokenizerGoldenTest, AnyIdsToText) {
  int invalid = 0;
  for (const json& item : golden_["decode"]) {
    const std::vector<int32_t> ids = item["ids"].get<std::vector<int32_t>>();
    std::string bytes;
    for (const int32_t id : ids) bytes += std::string(tokenizer_->TokenBytes(id));
    EXPECT_EQ(bytes, absl::HexStringToBytes(item["decoded_hex"].get<std::string>()));
    EXPECT_EQ(!FirstInvalidUtf8(bytes).has_value(), item["valid_utf8"].get<bool>());
    ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer_->Decode(ids));
    EXPECT_EQ(decoded, item["replaced"].get<std::string>());
    EXPECT_EQ(Stream(ids), decoded);
    invalid += !item["valid_utf8"].get<bool>();
  }
  EXPECT_GT(invalid, 5);
}

TEST_F(TokenizerGoldenTest, Chats) {
  for (const json& item : golden_["chats"]) {
    std::vector<ChatMessage> messages;
    for (const json& message : item["messages"]) {
      messages.push_back(
          {message["role"].get<std::string>(), message["content"].get<std::string>()});
    }
    ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, EncodeChat(*tokenizer_, messages));
    // The golden ids are without the BOS that this tokenizer asks for.
    std::vector<int32_t> expected = {tokenizer_->bos_id()};
    for (const json& id : item["ids"]) expected.push_back(id.get<int32_t>());
    EXPECT_EQ(ids, expected) << item["text"];
  }
}

}  // namespace
}  // namespace nosara::text
