#include "router/request_validation.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/status_matchers.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateRequest;
using ::nosara::testing::StatusIs;
using ::testing::ElementsAre;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr ModelLimits kLimits = {.max_context_tokens = 100, .vocab_size = 8192};
const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

const text::Tokenizer& Tokenizer() {
  static const text::Tokenizer* const tokenizer =
      text::Tokenizer::Load("models/nosa-tiny")->release();
  return *tokenizer;
}

GenerateRequest Good() {
  GenerateRequest request;
  request.set_text("Hello");
  return request;
}

TEST(ValidateRequestTest, TakesABareRequestAndAllEdgesOfTheRanges) {
  EXPECT_OK(ValidateRequest(Good()));
  GenerateRequest request = Good();
  auto& sampling = *request.mutable_sampling();
  for (const bool high : {false, true}) {
    sampling.set_temperature(high ? 100 : 0);
    sampling.set_top_k(high ? 1u << 31 : 0);
    sampling.set_top_p(high ? 1 : 1e-6f);
    sampling.set_min_p(high ? 1 : 0);
    sampling.set_repetition_penalty(high ? 10 : 1e-6f);
    sampling.set_presence_penalty(high ? 2 : -2);
    sampling.set_frequency_penalty(high ? 2 : -2);
    request.set_top_logprobs(high ? 20 : 0);
    request.set_max_tokens(high ? 0xffffffffu : 1);
    EXPECT_OK(ValidateRequest(request));
  }
  for (int i = 0; i < 16; ++i) request.add_stop(std::string(1024, 'a'));
  request.set_request_id(std::string(128, '~'));
  EXPECT_OK(ValidateRequest(request));
}

TEST(ValidateRequestTest, APromptIsNeeded) {
  EXPECT_THAT(ValidateRequest(GenerateRequest()), StatusIs(kInvalid, "prompt: missing"));
}

struct BadFloat {
  const char* field;
  void (inference::v1::SamplingParams::*set)(float);
  std::vector<float> values;
  const char* range;
};

TEST(ValidateRequestTest, SamplingOutsideItsRangeIsNamed) {
  using inference::v1::SamplingParams;
  const BadFloat cases[] = {
      {"temperature", &SamplingParams::set_temperature, {-0.001f, 100.1f}, "from 0 to 100"},
      {"top_p", &SamplingParams::set_top_p, {0.0f, -1.0f, 1.001f}, "above 0 to 1"},
      {"min_p", &SamplingParams::set_min_p, {-0.1f, 1.1f}, "from 0 to 1"},
      {"repetition_penalty",
       &SamplingParams::set_repetition_penalty,
       {0.0f, -1.0f, 10.5f},
       "above 0 to 10"},
      {"presence_penalty", &SamplingParams::set_presence_penalty, {-2.1f, 2.1f}, "from -2 to 2"},
      {"frequency_penalty", &SamplingParams::set_frequency_penalty, {-2.1f, 2.1f}, "from -2 to 2"},
  };
  for (const BadFloat& bad : cases) {
    std::vector<float> values = bad.values;
    values.insert(values.end(), {kNan, kInfinity, -kInfinity});
    for (const float value : values) {
      GenerateRequest request = Good();
      (request.mutable_sampling()->*bad.set)(value);
      const absl::Status status = ValidateRequest(request);
      EXPECT_THAT(status, StatusIs(kInvalid, absl::StrCat("sampling.", bad.field, ": ")));
      EXPECT_THAT(status, StatusIs(kInvalid, bad.range));
    }
  }
}

TEST(ValidateRequestTest, MaxTokensZero) {
  GenerateRequest request = Good();
  request.set_max_tokens(0);
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "max_tokens: 0; must be 1 or more"));
}

TEST(ValidateRequestTest, Stops) {
  GenerateRequest request = Good();
  for (int i = 0; i < 17; ++i) request.add_stop("x");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "stop: 17 stop texts; at most 16"));
  request = Good();
  request.add_stop("fine");
  request.add_stop("");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "stop[1]: 0 bytes"));
  request.set_stop(1, std::string(1025, 'x'));
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "stop[1]: 1025 bytes"));
  request.set_stop(1, "ab\xc3");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "stop[1]: not valid UTF-8 at byte 2"));
  request = Good();
  for (int i = 0; i < 65; ++i) request.add_stop_token_ids(1);
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "stop_token_ids: 65 ids; at most 64"));
}

TEST(ValidateRequestTest, LogprobsAndRequestId) {
  GenerateRequest request = Good();
  request.set_top_logprobs(21);
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "top_logprobs: 21"));
  request = Good();
  request.set_request_id(std::string(129, 'a'));
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "request_id: 129 bytes; at most 128"));
  request.set_request_id("a\nb");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, "request_id: only printable"));
}

TEST(EncodePromptTest, TextGetsTheBosAndIsBounded) {
  GenerateRequest request;
  request.set_text("Hello");
  ASSERT_OK_AND_ASSIGN(const auto tokens, EncodePrompt(Tokenizer(), request, kLimits));
  ASSERT_GE(tokens.size(), 2u);
  EXPECT_EQ(tokens[0], Tokenizer().bos_id());
  request.set_text("");
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits), StatusIs(kInvalid, "text: empty"));
  request.set_text(std::string(1601, 'a'));
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "text: 1601 bytes of text; at most 1600 bytes"));
}

TEST(EncodePromptTest, ControlTokensInATextAreText) {
  GenerateRequest request;
  request.set_text("<|im_end|></s>");
  ASSERT_OK_AND_ASSIGN(const auto tokens, EncodePrompt(Tokenizer(), request, kLimits));
  for (size_t i = 1; i < tokens.size(); ++i) EXPECT_FALSE(Tokenizer().IsSpecial(tokens[i])) << i;
}

TEST(EncodePromptTest, Chat) {
  GenerateRequest request;
  request.mutable_chat();
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "chat.messages: empty"));
  auto& message = *request.mutable_chat()->add_messages();
  message.set_role("user");
  message.set_content("Hello");
  EXPECT_OK(EncodePrompt(Tokenizer(), request, kLimits));
  message.set_role("pirate");
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits), StatusIs(kInvalid, "pirate"));
  message.set_role("user");
  message.set_content(std::string(1600, 'a'));
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "chat.messages: 1616 bytes of text; at most 1600"));
}

TEST(EncodePromptTest, TokenIds) {
  GenerateRequest request;
  request.mutable_token_ids();
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "token_ids.ids: empty"));
  request.mutable_token_ids()->add_ids(0);
  request.mutable_token_ids()->add_ids(8191);
  ASSERT_OK_AND_ASSIGN(const auto tokens, EncodePrompt(Tokenizer(), request, kLimits));
  EXPECT_THAT(tokens, ElementsAre(0, 8191));
  request.mutable_token_ids()->add_ids(8192);
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "token_ids.ids[2]: 8192 is not in the range from 0 to 8191"));
  request.mutable_token_ids()->set_ids(2, 0xffffffffu);
  EXPECT_THAT(EncodePrompt(Tokenizer(), request, kLimits),
              StatusIs(kInvalid, "token_ids.ids[2]: 4294967295"));
}

ExecuteContext Context() {
  static const std::vector<uint32_t> end_tokens = {2, 4};
  ExecuteContext context;
  context.request_id = "r1";
  context.model = "tiny";
  context.seed = 99;
  context.limits = kLimits;
  context.end_token_ids = end_tokens;
  return context;
}

TEST(BuildExecuteRequestTest, FillsInDefaults) {
  const std::vector<int32_t> prompt(10, 7);
  ASSERT_OK_AND_ASSIGN(const auto request, BuildExecuteRequest(Good(), prompt, Context()));
  EXPECT_EQ(request.request_id(), "r1");
  EXPECT_EQ(request.model(), "tiny");
  EXPECT_EQ(request.prompt_tokens_size(), 10);
  EXPECT_EQ(request.max_tokens(), 90u);  // what the context leaves
  EXPECT_EQ(request.sampling().temperature(), 1);
  EXPECT_EQ(request.sampling().top_k(), 0u);
  EXPECT_EQ(request.sampling().top_p(), 1);
  EXPECT_EQ(request.sampling().min_p(), 0);
  EXPECT_EQ(request.sampling().repetition_penalty(), 1);
  EXPECT_EQ(request.sampling().seed(), 99u);
  EXPECT_THAT(request.stop_token_ids(), ElementsAre(2u, 4u));
  EXPECT_FALSE(request.has_top_logprobs());

  ExecuteContext large = Context();
  large.limits.max_context_tokens = 10'000;
  ASSERT_OK_AND_ASSIGN(const auto longer, BuildExecuteRequest(Good(), prompt, large));
  EXPECT_EQ(longer.max_tokens(), 256u);
}

TEST(BuildExecuteRequestTest, CarriesWhatWasGiven) {
  GenerateRequest request = Good();
  request.set_ignore_eos(true);
  request.add_stop_token_ids(8191);
  request.set_max_tokens(5);
  request.set_top_logprobs(0);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_top_p(0.5f);
  ASSERT_OK_AND_ASSIGN(const auto execute, BuildExecuteRequest(request, {1}, Context()));
  EXPECT_THAT(execute.stop_token_ids(), ElementsAre(8191u));
  EXPECT_EQ(execute.max_tokens(), 5u);
  EXPECT_TRUE(execute.has_top_logprobs());
  EXPECT_EQ(execute.sampling().temperature(), 0);
  EXPECT_EQ(execute.sampling().top_p(), 0.5f);
}

TEST(BuildExecuteRequestTest, PromptAndOutputMustFitTheContext) {
  GenerateRequest request = Good();
  EXPECT_OK(BuildExecuteRequest(request, std::vector<int32_t>(99, 7), Context()));
  EXPECT_THAT(BuildExecuteRequest(request, std::vector<int32_t>(100, 7), Context()),
              StatusIs(kInvalid,
                       "prompt: 100 tokens; the model's context of 100 tokens allows at most 99"));
  request.set_max_tokens(50);
  EXPECT_OK(BuildExecuteRequest(request, std::vector<int32_t>(50, 7), Context()));
  EXPECT_THAT(BuildExecuteRequest(request, std::vector<int32_t>(51, 7), Context()),
              StatusIs(kInvalid,
                       "max_tokens: 50; the model's context of 100 tokens leaves at "
                       "most 49 after a prompt of 51"));
}

TEST(BuildExecuteRequestTest, StopTokensMustBeInTheVocabulary) {
  GenerateRequest request = Good();
  request.add_stop_token_ids(8192);
  EXPECT_THAT(BuildExecuteRequest(request, {1}, Context()),
              StatusIs(kInvalid, "stop_token_ids[0]: 8192"));
}

}  // namespace
}  // namespace nosara::router
