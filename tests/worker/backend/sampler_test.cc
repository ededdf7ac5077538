#include "worker/backend/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

namespace nosara::worker {
namespace {

using ::testing::ElementsAre;

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

TEST(DrawTest, PhiloxMatchesThePublishedVectors) {
  // Random123's known answer for philox4x32-10 of counter 0 and key 0.
  const kernels::DrawRandom zero = kernels::DrawPhilox(0, 0, 0);
  EXPECT_THAT(zero.bits, ElementsAre(0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
}

TEST(DrawTest, KeysAreThoseOfExponentialVariates) {
  std::mt19937 random(9);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = i < 1000 ? i : i < 2000 ? ~uint32_t{0} - i : random();
    const uint32_t gap = random() % kernels::kNoGap;
    const float variate = kernels::DrawVariate(bits);
    ASSERT_GT(variate, 0);
    ASSERT_LT(variate, 1);
    const double exact = gap * 0x1p-26 + std::log(-std::log1p(-static_cast<double>(variate)));
    ASSERT_NEAR(kernels::DrawKey(gap, variate), exact, 1e-5) << bits;
    ASSERT_LE(kernels::DrawKeyBound(gap, variate), kernels::DrawKey(gap, variate)) << bits;
  }
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

// What kernels/sample/draw.h says, by sorting.
int32_t DrawBySorting(const std::vector<float>& logits, const kernels::DrawParams& params) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  const float scale = kernels::DrawScale(params.temperature);
  std::vector<std::pair<uint32_t, int32_t>> tokens;
  for (size_t i = 0; i < logits.size(); ++i) {
    const uint32_t gap = kernels::DrawGap(largest, logits[i], scale);
    if (kernels::DrawWeight(gap) > 0) tokens.emplace_back(gap, i);
  }
  std::sort(tokens.begin(), tokens.end());
  const auto keep = [&tokens](uint32_t gap) {
    while (tokens.back().first > gap) tokens.pop_back();
  };
  const auto total = [&tokens] {
    uint64_t sum = 0;
    for (const auto& [gap, id] : tokens) sum += kernels::DrawWeight(gap);
    return sum;
  };
  if (params.top_k > 0 && params.top_k < static_cast<int>(tokens.size())) {
    keep(tokens[params.top_k - 1].first);
  }
  if (params.top_p < 1) {
    const auto needed =
        static_cast<uint64_t>(std::ceil(static_cast<double>(params.top_p) * total()));
    uint64_t sum = 0;
    uint32_t last = 0;
    for (const auto& [gap, id] : tokens) {
      if (sum >= needed && sum > 0) break;
      sum += kernels::DrawWeight(gap);
      last = gap;
    }
    keep(last);
  }
  while (kernels::DrawWeight(tokens.back().first) <
         static_cast<double>(params.min_p) * kernels::DrawWeight(0)) {
    tokens.pop_back();
  }
  std::pair<float, int32_t> best = {std::numeric_limits<float>::infinity(), -1};
  for (const auto& [gap, id] : tokens) {
    const uint32_t bits = kernels::DrawPhilox(params.seed, params.position, id / 4).bits[id % 4];
    best = std::min(best, {kernels::DrawKey(gap, kernels::DrawVariate(bits)), id});
  }
  return best.second;
}

TEST(DrawTest, AgreesWithSorting) {
  std::mt19937 random(5);
  for (int round = 0; round < 3000; ++round) {
    std::vector<float> logits(1 + random() % 300);
    std::normal_distribution<float> normal(0, round % 3 == 0 ? 0.2f : 4);
    for (float& logit : logits)
      logit = round % 2 == 0 ? normal(random) : std::round(normal(random));
    kernels::DrawParams params;
    params.seed = random();
    params.position = round;
    params.temperature = std::array{0.2f, 1.0f, 3.0f}[random() % 3];
    if (random() % 2 == 0) params.top_k = 2 + random() % 60;
    if (random() % 2 == 0) params.top_p = std::array{1e-6f, 0.3f, 0.9f, 0.99f}[random() % 4];
    if (random() % 3 == 0) params.min_p = std::array{1e-5f, 0.1f, 1.0f}[random() % 3];
    ASSERT_EQ(kernels::DrawToken(logits.data(), static_cast<int>(logits.size()), params),
              DrawBySorting(logits, params))
        << "round " << round;
  }
}

TEST(DrawTest, DrawsMoveLittleWithTheLogits) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  int moved = 0;
  constexpr int kDraws = 2000;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> logits(8192);
    for (float& logit : logits) logit = 3 * normal(random);
    std::vector<float> others = logits;
    for (float& logit : others) logit += 0.003f * normal(random);
    kernels::DrawParams params;
    params.temperature = 1;
    params.seed = i;
    moved += kernels::DrawToken(logits.data(), 8192, params) !=
             kernels::DrawToken(others.data(), 8192, params);
  }
  // Half the sum of |dw| is about 0.12 % of the weight; this coupling moves at most twice that.
  EXPECT_LT(moved, kDraws * 0.01);
}

TEST(DrawTest, WeightsAreExponentials) {
  uint64_t before = kernels::DrawWeight(0);
  EXPECT_NEAR(static_cast<double>(before), 0x1p40, 0x1p40 * 1e-6);
  for (uint32_t gap = 0; gap < kernels::kNoGap; gap += 99991) {
    const uint64_t weight = kernels::DrawWeight(gap);
    const double exact = std::exp(-(gap * 0x1p-26)) * 0x1p40;
    ASSERT_NEAR(static_cast<double>(weight), exact, exact * 1e-6 + 1) << gap;
    ASSERT_LE(weight, before) << gap;
    before = weight;
  }
  EXPECT_EQ(kernels::DrawWeight(kernels::kNoGap), 0u);
}

TEST(DrawTest, WithoutFiniteLogitsTheChoiceIsGreedy) {
  const float infinity = std::numeric_limits<float>::infinity();
  kernels::DrawParams params;
  params.temperature = 1;
  const auto draw = [&params](const std::vector<float>& logits) {
    return kernels::DrawToken(logits.data(), static_cast<int>(logits.size()), params);
  };
  EXPECT_EQ(draw({-infinity, -infinity}), 0);
  EXPECT_EQ(draw({1, infinity, 2}), 1);
  EXPECT_EQ(draw({-infinity, 1, std::nanf("")}), 1);
  params.top_k = 1;
  EXPECT_EQ(draw({1, 3, 3}), 1);
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
