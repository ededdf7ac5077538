// Runs every fuzz target over mutations of inputs that are nearly valid, for a fixed number of
// rounds. The seed is new each time and printed with a failure.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_targets.h"
#include "tests/worker/model/safetensors_writer.h"

namespace nosara::fuzz {
namespace {

using nosara::testing::SafetensorsFileBytes;
using nosara::testing::TestTensor;

constexpr int kRounds = 60000;

/// One input of the corpus, changed in a few places: bits, bytes, numbers, cuts, copies, and words
/// that a format gives a meaning to.
std::string Mutate(std::string input, const std::vector<std::string>& words, std::mt19937& random) {
  const auto below = [&random](size_t bound) { return bound == 0 ? 0 : random() % bound; };
  for (size_t changes = below(4); changes > 0; --changes) {
    const size_t at = below(input.size() + 1);
    switch (below(8)) {
      case 0:
        if (at < input.size()) input[at] = static_cast<char>(input[at] ^ (1 << below(8)));
        break;
      case 1:
        if (at < input.size()) input[at] = static_cast<char>(random());
        break;
      case 2:
        input.erase(at, below(8));
        break;
      case 3:
        input.insert(at, input.substr(below(input.size() + 1), below(40)));
        break;
      case 4:
        input.insert(at, words[below(words.size())]);
        break;
      case 5:
        input.resize(at);
        break;
      case 6: {
        // Replaces a run of digits.
        const size_t digit = input.find_first_of("0123456789", at);
        if (digit == std::string::npos) break;
        const size_t end = input.find_first_not_of("0123456789", digit);
        input.replace(digit, end - digit, words[below(words.size())]);
        break;
      }
      case 7:
        input.append(below(64), static_cast<char>(random()));
        break;
    }
  }
  return input;
}

void RunMutations(const std::function<void(absl::Span<const uint8_t>)>& target,
                  const std::vector<std::string>& corpus, const std::vector<std::string>& words,
                  int rounds = kRounds) {
  const uint32_t seed = std::random_device{}();
  // A failure ends the process: printed before, not after.
  std::fprintf(stderr, "seed %u\n", seed);
  std::mt19937 random(seed);
  for (int round = 0; round < rounds; ++round) {
    const std::string input = Mutate(corpus[random() % corpus.size()], words, random);
    // A copy of exactly this size, so that reads past the end are seen by the sanitizer.
    const std::vector<uint8_t> bytes(input.begin(), input.end());
    target(bytes);
  }
}

const std::vector<std::string>& Words() {
  static const auto* words = new std::vector<std::string>{"0",
                                                          "1",
                                                          "-1",
                                                          "64",
                                                          "4294967296",
                                                          "9223372036854775807",
                                                          "18446744073709551615",
                                                          "1e400",
                                                          "0.5",
                                                          "null",
                                                          "true",
                                                          "[]",
                                                          "{}",
                                                          "\"\"",
                                                          "[[[[[[[[",
                                                          "{\"a\":",
                                                          "\"shape\":[2,3]",
                                                          "\"data_offsets\":[0,8]",
                                                          "\"dtype\":\"F32\"",
                                                          "\"nosa\":{",
                                                          "\\u0000",
                                                          "\\ud800",
                                                          "\xed\xa0\x80",
                                                          "\xf0\x9f\x8e\x89",
                                                          "\xc3",
                                                          "END"};
  return *words;
}

TEST(FuzzTest, SafetensorsHeader) {
  const std::vector<TestTensor> tensors = {{"a", "F32", {2, 3}, std::string(24, 'a')},
                                           {"b", "BF16", {4}, std::string(8, 'b')},
                                           {"c", "U8", {0, 7}, ""}};
  RunMutations(
      SafetensorsHeaderTarget,
      {SafetensorsFileBytes(tensors), SafetensorsFileBytes({}), SafetensorsFileBytes({tensors[0]})},
      Words());
}

TEST(FuzzTest, Config) {
  const std::string small = R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5)";
  RunMutations(
      ConfigTarget,
      {small + "}", small + R"(, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0,
         "eos_token_id": [1, 2], "torch_dtype": "bfloat16", "rope_scaling": {"type": "default"},
         "nosa": {"block_size": 64, "window_blocks": 4, "topk_q_blocks": 4, "topk_blocks": 16}})"},
      Words());
}

TEST(FuzzTest, Text) {
  const std::string head(
      "\x02\x03"
      "END"
      "\x04"
      "\xe6\xbc\xa2"
      "E"
      "\x03\x01\x02\x00",
      14);
  RunMutations(TextTarget,
               {head + "one two EN END three \xe6\xbc\xa2 and \xf0\x9f\x8e\x89 EEND",
                std::string("\x00\x00\x01", 3) + "plain \xc3\xa9\xc3",
                std::string("\x01\x02"
                            "aa"
                            "\x00\x01",
                            6) +
                    "ababaabaaa\xff\xf4\x90\x80\x80"},
               Words());
}

TEST(FuzzTest, KvStoreControl) {
  // What the bytes mean is up to the target; most sequences of calls are more or less valid ones.
  std::mt19937 random(1);
  std::vector<std::string> corpus(64);
  for (std::string& calls : corpus) {
    calls.resize(100 + random() % 400);
    for (char& byte : calls) byte = static_cast<char>(random());
  }
  const std::vector<std::string> words = {
      std::string("\x0a\x10", 2) + std::string(16, '\1'), std::string("\x01\xff\x02\x05\x06", 5),
      std::string("\x04\xff\x01\x01\x01\x00", 6), std::string(12, '\xff'), std::string(12, '\0')};
  RunMutations(KvStoreControlTarget, corpus, words, /*rounds=*/20000);
}

}  // namespace
}  // namespace nosara::fuzz
