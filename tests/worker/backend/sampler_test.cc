#include "worker/backend/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

namespace nosara::worker {
namespace {

int32_t Pick(std::vector<float> logits, const SamplingParams& params, uint64_t position,
             std::vector<int32_t> history = {}, size_t prompt_tokens = 0) {
  return Sample(absl::MakeSpan(logits), params, history, prompt_tokens, position).id;
}

std::map<int32_t, double> Frequencies(const std::vector<float>& logits, SamplingParams params,
                                      int draws = 20000) {
  std::map<int32_t, double> counts;
  for (int i = 0; i < draws; ++i) counts[Pick(logits, params, i)] += 1.0 / draws;
  return counts;
}

TEST(SamplerTest, PhiloxMatchesThePublishedVectors) {
  // Random123's known answers for philox4x32-10: counter and key all zero, and all ones.
  EXPECT_EQ(UniformAt(0, 0), static_cast<double>(0x6627e8d5e169c58dull >> 11) * 0x1p-53);
}

TEST(SamplerTest, UniformDependsOnSeedAndPositionAlone) {
  EXPECT_EQ(UniformAt(7, 100), UniformAt(7, 100));
  EXPECT_NE(UniformAt(7, 100), UniformAt(8, 100));
  EXPECT_NE(UniformAt(7, 100), UniformAt(7, 101));
  double sum = 0;
  for (int i = 0; i < 10000; ++i) {
    const double u = UniformAt(3, i);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 0.02);
}

TEST(SamplerTest, GreedyTakesTheSmallestOfEquals) {
  SamplingParams params;
  params.temperature = 0;
  EXPECT_EQ(Pick({1, 3, 3, 2}, params, 0), 1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Pick({nan, -5, nan}, params, 0), 1);
}

TEST(SamplerTest, DrawsWithTheModelsProbabilities) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  auto frequencies = Frequencies(logits, {});
  EXPECT_NEAR(frequencies[0], 0.5, 0.02);
  EXPECT_NEAR(frequencies[1], 0.3, 0.02);
  EXPECT_NEAR(frequencies[2], 0.2, 0.02);
  SamplingParams cold;
  cold.temperature = 0.5f;  // squares the odds
  frequencies = Frequencies(logits, cold);
  EXPECT_NEAR(frequencies[0], 0.25 / 0.38, 0.02);
}

TEST(SamplerTest, TopKTopPAndMinPCutTheTail) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  SamplingParams top_k;
  top_k.top_k = 2;
  auto frequencies = Frequencies(logits, top_k);
  EXPECT_EQ(frequencies.count(0), 0u);
  EXPECT_NEAR(frequencies[1], 0.625, 0.02);
  SamplingParams top_p;
  top_p.top_p = 0.75f;
  frequencies = Frequencies(logits, top_p);
  EXPECT_EQ(frequencies.count(0), 0u);
  top_p.top_p = 0.1f;  // the best one always stays
  frequencies = Frequencies(logits, top_p, 100);
  EXPECT_EQ(frequencies.size(), 1u);
  SamplingParams min_p;
  min_p.min_p = 0.5f;
  frequencies = Frequencies(logits, min_p);
  EXPECT_EQ(frequencies.count(0), 0u);
  EXPECT_GT(frequencies[2], 0.3);
}

TEST(SamplerTest, PenaltiesActOnWhatWasSaid) {
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 2;
  EXPECT_EQ(Pick({3, 2, 1}, params, 0, {0}, 1), 1);    // the prompt counts
  EXPECT_EQ(Pick({-1, -1.5f}, params, 0, {0}, 1), 1);  // negative logits move away from zero
  params.repetition_penalty = 1;
  params.presence_penalty = 1.5f;
  EXPECT_EQ(Pick({3, 2, 1}, params, 0, {0}, 1), 0);  // only the output counts
  EXPECT_EQ(Pick({3, 2, 1}, params, 0, {1, 0}, 1), 1);
  params.presence_penalty = 0;
  params.frequency_penalty = 0.4f;
  EXPECT_EQ(Pick({3, 2, 1}, params, 0, {0, 0}, 0), 0);
  EXPECT_EQ(Pick({3, 2, 1}, params, 0, {0, 0, 0}, 0), 1);
}

TEST(SamplerTest, LogprobsAreTheModelsOwn) {
  std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 5;
  params.top_logprobs = 2;
  const std::vector<int32_t> history = {0};
  const SampledToken token = Sample(absl::MakeSpan(logits), params, history, 1, 5);
  ASSERT_EQ(token.top.size(), 2u);
  EXPECT_EQ(token.top[0].first, 0);
  EXPECT_NEAR(token.top[0].second, std::log(0.5), 1e-5);
  EXPECT_EQ(token.top[1].first, 1);
  EXPECT_NEAR(token.logprob, std::log(token.id == 0 ? 0.5 : token.id == 1 ? 0.3 : 0.2), 1e-5);
}

}  // namespace
}  // namespace nosara::worker
