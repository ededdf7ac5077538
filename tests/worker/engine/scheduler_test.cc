#include "worker/engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace nosara::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

MATCHER_P2(Item, view, tokens, "") {
  return arg.view == static_cast<size_t>(view) && arg.tokens == tokens;
}

TEST(PlanStepTest, DecodesFirstThenPrefillsInOrderOfArrival) {
  const Schedule plan = PlanStep({{0, 1000, 5000}, {200, 100, 50}, {0, 64, 5000}, {80, 80, 1}},
                                 {.step_tokens = 300, .chunk_tokens = 256});
  EXPECT_THAT(plan.decode, ElementsAre(Item(1, 1), Item(3, 1)));
  EXPECT_THAT(plan.prefill, ElementsAre(Item(0, 256), Item(2, 42)));
}

TEST(PlanStepTest, LastIncompleteBlockIsAChunkOfItsOwn) {
  const SchedulerLimits limits = {.step_tokens = 1000, .chunk_tokens = 256};
  EXPECT_THAT(PlanStep({{0, 100, 999}}, limits).prefill, ElementsAre(Item(0, 64)));
  EXPECT_THAT(PlanStep({{64, 100, 999}}, limits).prefill, ElementsAre(Item(0, 36)));
  // The last token is always in it, also when it completes a block.
  EXPECT_THAT(PlanStep({{0, 128, 999}}, limits).prefill, ElementsAre(Item(0, 64)));
  EXPECT_THAT(PlanStep({{64, 128, 999}}, limits).prefill, ElementsAre(Item(0, 64)));
  EXPECT_THAT(PlanStep({{0, 1, 999}}, limits).prefill, ElementsAre(Item(0, 1)));
}

TEST(PlanStepTest, WithoutHeadroomASequenceWaits) {
  const SchedulerLimits limits;
  const Schedule plan = PlanStep({{64, 64, 0}, {0, 500, 0}}, limits);
  EXPECT_THAT(plan.decode, IsEmpty());
  EXPECT_THAT(plan.prefill, IsEmpty());
  EXPECT_THAT(PlanStep({{0, 500, 100}}, limits).prefill, ElementsAre(Item(0, 64)));
  EXPECT_THAT(PlanStep({{0, 500, 10}}, limits).prefill, ElementsAre(Item(0, 10)));
}

TEST(PlanStepTest, RandomPlansKeepTheLimits) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 2000; ++round) {
    std::vector<SequenceView> views;
    for (int i = random() % 20; i > 0; --i) {
      const int64_t prompt = 1 + random() % 500;
      views.push_back({static_cast<int64_t>(random() % (prompt + 50)), prompt,
                       static_cast<int64_t>(random() % 300)});
    }
    const SchedulerLimits limits = {1 + static_cast<int64_t>(random() % 600),
                                    1 + static_cast<int64_t>(random() % 300)};
    const Schedule plan = PlanStep(views, limits);
    int64_t total = plan.decode.size();
    for (const ScheduledItem& item : plan.decode) {
      EXPECT_EQ(item.tokens, 1);
      EXPECT_GE(views[item.view].position, views[item.view].prompt_tokens);
      EXPECT_GE(views[item.view].headroom, 1);
    }
    for (const ScheduledItem& item : plan.prefill) {
      const SequenceView& view = views[item.view];
      total += item.tokens;
      EXPECT_GE(item.tokens, 1);
      EXPECT_LE(item.tokens, std::min(view.headroom, limits.chunk_tokens));
      EXPECT_LE(view.position + item.tokens, view.prompt_tokens);
    }
    EXPECT_LE(total, limits.step_tokens);
  }
}

}  // namespace
}  // namespace nosara::worker
