#include "router/routing_policy.h"

#include <set>
#include <string>

#include "tests/status_matchers.h"

namespace nosara::router {
namespace {

using ::nosara::testing::StatusIs;

WorkerState Worker(const std::string& address, uint32_t running = 0) {
  WorkerState worker;
  worker.address = address;
  worker.trust = Trust::kFresh;
  worker.load.epoch = 1;
  worker.load.model = "tiny";
  worker.load.max_context_tokens = 1000;
  worker.load.running_requests = running;
  return worker;
}

RequestFacts Request(uint64_t sequence = 0) {
  RequestFacts request;
  request.model = "tiny";
  request.prompt_tokens = 10;
  request.context_tokens = 100;
  request.sequence = sequence;
  return request;
}

TEST(LeastLoadedPolicyTest, PicksTheFewestOpenRequests) {
  const LeastLoadedPolicy policy;
  ClusterSnapshot cluster{{Worker("a", 5), Worker("b", 2), Worker("c", 3)}};
  EXPECT_EQ(policy.Choose(Request(), cluster), 1u);
  cluster.workers[1].load.queued_requests = 2;
  EXPECT_EQ(policy.Choose(Request(), cluster), 2u);
}

TEST(LeastLoadedPolicyTest, CountsWhatWasSentSinceTheReport) {
  const LeastLoadedPolicy policy;
  ClusterSnapshot cluster{{Worker("a", 5), Worker("b", 4)}};
  cluster.workers[1].requests_since_report = 2;
  EXPECT_EQ(policy.Choose(Request(), cluster), 0u);
  // Ended since the report: the estimate does not go below nothing.
  cluster.workers[0].requests_since_report = -7;
  cluster.workers[1].requests_since_report = -4;
  cluster.workers[0].load.pending_prefill_tokens = 1;
  EXPECT_EQ(policy.Choose(Request(), cluster), 1u);
}

TEST(LeastLoadedPolicyTest, ThenTheFewestPromptTokensThenTurns) {
  const LeastLoadedPolicy policy;
  ClusterSnapshot cluster{{Worker("a"), Worker("b"), Worker("c")}};
  cluster.workers[0].load.pending_prefill_tokens = 50;
  cluster.workers[2].prompt_tokens_since_report = 60;
  for (uint64_t i = 0; i < 3; ++i) EXPECT_EQ(policy.Choose(Request(i), cluster), 1u);
  const ClusterSnapshot equal{{Worker("a"), Worker("b"), Worker("c")}};
  std::set<size_t> chosen;
  for (uint64_t i = 0; i < 3; ++i) chosen.insert(*policy.Choose(Request(i), equal));
  EXPECT_EQ(chosen.size(), 3u);
}

TEST(RoundRobinPolicyTest, TakesTurnsWhateverTheLoad) {
  const RoundRobinPolicy policy;
  const ClusterSnapshot cluster{{Worker("a", 100), Worker("b"), Worker("c")}};
  for (uint64_t i = 0; i < 6; ++i) EXPECT_EQ(policy.Choose(Request(i), cluster), i % 3);
}

class EveryPolicyTest : public ::testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<RoutingPolicy> policy_ = *MakeRoutingPolicy(GetParam());
};

TEST_P(EveryPolicyTest, NoWorker) { EXPECT_EQ(policy_->Choose(Request(), {}), std::nullopt); }

TEST_P(EveryPolicyTest, LeavesOutWhoCannotTakeIt) {
  ClusterSnapshot cluster{{Worker("gone"), Worker("draining"), Worker("other model"),
                           Worker("small"), Worker("excluded")}};
  cluster.workers[0].trust = Trust::kGone;
  cluster.workers[1].load.draining = true;
  cluster.workers[2].load.model = "huge";
  cluster.workers[3].load.max_context_tokens = 99;
  RequestFacts request = Request();
  request.excluded_addresses = {"excluded"};
  EXPECT_EQ(policy_->Choose(request, cluster), std::nullopt);
  cluster.workers.push_back(Worker("ready", 1000));
  for (uint64_t i = 0; i < 7; ++i) {
    request.sequence = i;
    EXPECT_EQ(policy_->Choose(request, cluster), 5u);
  }
}

TEST_P(EveryPolicyTest, AStaleReportLowersTrustButNeverFailsARequest) {
  ClusterSnapshot cluster{{Worker("stale"), Worker("fresh", 1000)}};
  cluster.workers[0].trust = Trust::kStale;
  for (uint64_t i = 0; i < 4; ++i) EXPECT_EQ(policy_->Choose(Request(i), cluster), 1u);
  cluster.workers[1].trust = Trust::kStale;
  EXPECT_TRUE(policy_->Choose(Request(), cluster).has_value());
  cluster.workers[1].trust = Trust::kGone;
  EXPECT_EQ(policy_->Choose(Request(), cluster), 0u);
}

INSTANTIATE_TEST_SUITE_P(All, EveryPolicyTest, ::testing::Values("least_loaded", "round_robin"));

TEST(MakeRoutingPolicyTest, UnknownName) {
  EXPECT_THAT(MakeRoutingPolicy("best"),
              StatusIs(absl::StatusCode::kInvalidArgument, "policy 'best': must be"));
}

}  // namespace
}  // namespace nosara::router
