#include "router/stream_state.h"

#include <random>
#include <string>
#include <vector>

#include "tests/status_matchers.h"
#include "text/utf8.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateResponse;
using ::nosara::testing::StatusIs;
using ::testing::ElementsAre;

const text::Tokenizer& Tokenizer() {
  static const text::Tokenizer* const tokenizer =
      text::Tokenizer::Load("models/nosa-tiny")->release();
  return *tokenizer;
}

class StreamStateTest : public ::testing::Test {
 protected:
  StreamState::Config Config() {
    StreamState::Config config;
    config.request_id = "r1";
    config.model = "tiny";
    config.prompt_tokens = 10;
    config.seed = 42;
    config.arrival = clock_.Now();
    config.clock = &clock_;
    return config;
  }

  static worker::v1::ExecuteResponse Accepted(uint32_t cached = 0) {
    worker::v1::ExecuteResponse event;
    event.mutable_accepted()->set_cached_tokens(cached);
    return event;
  }
  static worker::v1::ExecuteResponse Tokens(const std::vector<int32_t>& ids) {
    worker::v1::ExecuteResponse event;
    event.mutable_tokens();
    for (const int32_t id : ids) event.mutable_tokens()->add_tokens()->set_id(id);
    return event;
  }
  static worker::v1::ExecuteResponse Completed(inference::v1::FinishReason reason) {
    worker::v1::ExecuteResponse event;
    event.mutable_completed()->set_reason(reason);
    event.mutable_completed()->mutable_usage()->set_completion_tokens(3);
    event.mutable_completed()->mutable_cache()->set_records_fetched(5);
    return event;
  }

  void Feed(StreamState& state, const worker::v1::ExecuteResponse& event) {
    ASSERT_OK(state.OnWorkerEvent(event, &responses_));
  }

  std::string Text() const {
    std::string text;
    for (const auto& response : responses_) text += response.chunk().text();
    return text;
  }

  FakeClock clock_;
  std::vector<GenerateResponse> responses_;
};

TEST_F(StreamStateTest, OneOfEachInOrder) {
  StreamState state(Config(), &Tokenizer());
  EXPECT_FALSE(state.started());
  Feed(state, Accepted(6));
  EXPECT_TRUE(state.started());
  worker::v1::ExecuteResponse progress;
  progress.mutable_prefill_progress()->set_done_tokens(4);
  progress.mutable_prefill_progress()->set_total_tokens(10);
  Feed(state, progress);
  clock_.Advance(absl::Milliseconds(5));
  Feed(state, Tokens(*Tokenizer().Encode("Hello")));
  clock_.Advance(absl::Milliseconds(7));
  Feed(state, Completed(inference::v1::FINISH_REASON_LENGTH));
  EXPECT_TRUE(state.finished());
  EXPECT_TRUE(state.worker_completed());

  ASSERT_EQ(responses_.size(), 4u);
  EXPECT_EQ(responses_[0].started().request_id(), "r1");
  EXPECT_EQ(responses_[0].started().seed(), 42u);
  EXPECT_EQ(responses_[0].started().prompt_tokens(), 10u);
  EXPECT_EQ(responses_[1].prefill_progress().done_tokens(), 4u);
  EXPECT_EQ(responses_[2].chunk().text(), "Hello");
  EXPECT_EQ(responses_[2].chunk().logprobs_size(), 0);
  const auto& finished = responses_[3].finished();
  EXPECT_EQ(finished.reason(), inference::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(finished.usage().completion_tokens(), 3u);
  EXPECT_EQ(finished.cache().records_fetched(), 5u);
  EXPECT_EQ(finished.time_to_first_token_us(), 5000u);
  EXPECT_EQ(finished.total_time_us(), 12000u);

  Feed(state, Tokens({500}));
  EXPECT_EQ(responses_.size(), 4u);
}

TEST_F(StreamStateTest, CharactersAreNeverSplit) {
  // Characters that the vocabulary lacks come as one token per byte.
  const std::string text = "wave \xf0\x9f\x8c\x8a and \xe6\xb5\xb7!";
  const std::vector<int32_t> ids = *Tokenizer().Encode(text);
  StreamState state(Config(), &Tokenizer());
  Feed(state, Accepted());
  for (const int32_t id : ids) {
    Feed(state, Tokens({id}));
    EXPECT_FALSE(text::FirstInvalidUtf8(responses_.back().chunk().text()).has_value());
    EXPECT_THAT(responses_.back().chunk().token_ids(), ElementsAre(static_cast<uint32_t>(id)));
  }
  EXPECT_EQ(Text(), text);
}

TEST_F(StreamStateTest, ACharacterCutOffAtTheEndIsReplaced) {
  std::vector<int32_t> ids = *Tokenizer().Encode("a\xf0\x9f\x8c\x8a");
  ids.pop_back();
  StreamState state(Config(), &Tokenizer());
  Feed(state, Accepted());
  Feed(state, Tokens(ids));
  Feed(state, Completed(inference::v1::FINISH_REASON_LENGTH));
  EXPECT_EQ(Text(), "a\xef\xbf\xbd");
  // The rest comes as a chunk without tokens before Finished.
  ASSERT_EQ(responses_.size(), 4u);
  EXPECT_EQ(responses_[2].chunk().token_ids_size(), 0);
}

TEST_F(StreamStateTest, StopTextAcrossChunksWhateverTheirSizes) {
  const std::string text = "one two three \xe6\xb5\xb7 STOP HERE and more";
  const std::vector<int32_t> ids = *Tokenizer().Encode(text);
  std::mt19937 random(std::random_device{}());
  const unsigned seed = random();
  SCOPED_TRACE(seed);
  random.seed(seed);
  for (int round = 0; round < 50; ++round) {
    responses_.clear();
    StreamState::Config config = Config();
    config.stop = {"never", "STOP HERE", "HERE and"};
    StreamState state(config, &Tokenizer());
    Feed(state, Accepted(20));
    for (size_t i = 0; i < ids.size();) {
      const size_t count = std::min<size_t>(1 + random() % 5, ids.size() - i);
      Feed(state, Tokens({ids.begin() + i, ids.begin() + i + count}));
      i += count;
    }
    EXPECT_EQ(Text(), "one two three \xe6\xb5\xb7 ");
    EXPECT_TRUE(state.finished());
    EXPECT_FALSE(state.worker_completed());
    const auto& finished = responses_.back().finished();
    EXPECT_EQ(finished.reason(), inference::v1::FINISH_REASON_STOP);
    EXPECT_EQ(finished.stop_text(), "STOP HERE");
    EXPECT_FALSE(finished.has_cache());
    EXPECT_EQ(finished.usage().prompt_tokens(), 10u);
    EXPECT_EQ(finished.usage().cached_prompt_tokens(), 10u);  // never more than the prompt
    EXPECT_EQ(finished.usage().completion_tokens(), state.completion_tokens());
    uint32_t told = 0;
    for (const auto& response : responses_) told += response.chunk().token_ids_size();
    EXPECT_EQ(told, state.completion_tokens());
  }
}

TEST_F(StreamStateTest, HalfAStopTextIsGivenOutAtTheEnd) {
  StreamState::Config config = Config();
  config.stop = {"STOP HERE"};
  StreamState state(config, &Tokenizer());
  Feed(state, Accepted());
  Feed(state, Tokens(*Tokenizer().Encode("one STOP")));
  EXPECT_EQ(Text(), "one ");
  Feed(state, Completed(inference::v1::FINISH_REASON_LENGTH));
  EXPECT_EQ(Text(), "one STOP");
  EXPECT_EQ(responses_.back().finished().reason(), inference::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(responses_.back().finished().stop_text(), "");
}

TEST_F(StreamStateTest, Logprobs) {
  StreamState::Config config = Config();
  config.wants_logprobs = true;
  StreamState state(config, &Tokenizer());
  Feed(state, Accepted());
  worker::v1::ExecuteResponse event = Tokens({*Tokenizer().TokenId("<0xF0>"), 4});
  auto& token = *event.mutable_tokens()->mutable_tokens(0);
  token.set_logprob(-0.5f);
  token.add_top()->set_id(*Tokenizer().TokenId("<0x41>"));
  token.mutable_top(0)->set_logprob(-0.25f);
  Feed(state, event);
  const auto& chunk = responses_.back().chunk();
  ASSERT_EQ(chunk.logprobs_size(), 2);
  EXPECT_EQ(chunk.logprobs(0).text(), "\xef\xbf\xbd");  // a part of a character
  EXPECT_EQ(chunk.logprobs(0).logprob(), -0.5f);
  ASSERT_EQ(chunk.logprobs(0).top_size(), 1);
  EXPECT_EQ(chunk.logprobs(0).top(0).text(), "A");
  EXPECT_EQ(chunk.logprobs(0).top(0).logprob(), -0.25f);
  EXPECT_EQ(chunk.logprobs(1).text(), "<|im_end|>");
}

TEST_F(StreamStateTest, WhatTheProtocolDoesNotAllow) {
  StreamState state(Config(), &Tokenizer());
  EXPECT_THAT(state.OnWorkerEvent(Tokens({500}), &responses_),
              StatusIs(absl::StatusCode::kInternal, "before it accepted"));
  Feed(state, Accepted());
  EXPECT_THAT(state.OnWorkerEvent(Accepted(), &responses_),
              StatusIs(absl::StatusCode::kInternal, "twice"));
  // Unknown events, empty chunks and ids without a token do no harm.
  Feed(state, worker::v1::ExecuteResponse());
  Feed(state, Tokens({}));
  Feed(state, Tokens({0x7fffffff, -1}));
  EXPECT_EQ(Text(), "");
}

}  // namespace
}  // namespace nosara::router
