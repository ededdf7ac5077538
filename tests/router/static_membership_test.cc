#include "router/static_membership.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/router/fake_worker_client.h"
#include "tests/status_matchers.h"

namespace nosara::router {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(60);

WorkerLoad Load(uint64_t epoch, uint32_t running = 0) {
  WorkerLoad load;
  load.worker_id = "w1";
  load.epoch = epoch;
  load.model = "tiny";
  load.max_context_tokens = 1000;
  load.running_requests = running;
  return load;
}

class StaticMembershipTest : public ::testing::Test {
 protected:
  void Start() {
    StaticMembership::Options options;
    options.poll_interval = absl::Milliseconds(1);
    options.clock = &clock_;
    handle_ = std::make_shared<WorkerHandle>("a:1", std::make_unique<FakeWorkerClient>(worker_));
    options.on_change = [this](int usable) {
      absl::MutexLock lock(&mu_);
      told_.push_back(usable);
    };
    membership_ = std::make_unique<StaticMembership>(
        std::vector<std::shared_ptr<WorkerHandle>>{handle_}, std::move(options));
  }
  WorkerState Worker() const { return membership_->Snapshot().workers.at(0); }

  FakeClock clock_;
  std::shared_ptr<FakeWorkerState> worker_ = std::make_shared<FakeWorkerState>();
  std::shared_ptr<WorkerHandle> handle_;
  absl::Mutex mu_;
  std::vector<int> told_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<StaticMembership> membership_;
};

TEST_F(StaticMembershipTest, GoneUntilItReports) {
  worker_->SetLoad(WorkerLostStatus("connection refused"));
  Start();
  worker_->AwaitReport();
  EXPECT_EQ(Worker().trust, Trust::kGone);
  EXPECT_FALSE(membership_->AwaitWorkers(1, absl::ZeroDuration()));
  worker_->SetLoad(Load(1, 3));
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  EXPECT_EQ(Worker().trust, Trust::kFresh);
  EXPECT_EQ(Worker().load.running_requests, 3u);
  EXPECT_EQ(Worker().address, "a:1");
}

TEST_F(StaticMembershipTest, LateReportsMakeItStaleAndABrokenConnectionGone) {
  worker_->SetLoad(Load(1));
  Start();
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  worker_->SetLoad(absl::DeadlineExceededError("too slow"));
  worker_->AwaitReport();
  EXPECT_EQ(Worker().trust, Trust::kFresh);
  clock_.Advance(absl::Seconds(3));
  EXPECT_EQ(Worker().trust, Trust::kStale);
  EXPECT_TRUE(membership_->AwaitWorkers(1, absl::ZeroDuration()));
  worker_->SetLoad(WorkerLostStatus("connection reset"));
  worker_->AwaitReport();
  EXPECT_EQ(Worker().trust, Trust::kGone);
  worker_->SetLoad(Load(2));
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  EXPECT_EQ(Worker().load.epoch, 2u);
}

TEST_F(StaticMembershipTest, ALostStreamHoldsUntilTheNextReport) {
  worker_->SetLoad(Load(1));
  Start();
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  worker_->SetLoad(absl::DeadlineExceededError("hangs"));
  worker_->AwaitReport();
  handle_->OnLost();
  EXPECT_EQ(Worker().trust, Trust::kGone);
  worker_->SetLoad(Load(1));
  worker_->AwaitReport();
  EXPECT_EQ(Worker().trust, Trust::kFresh);
}

TEST_F(StaticMembershipTest, CountsWhatThisRouterOpenedSinceTheReport) {
  handle_ = nullptr;
  worker_->SetLoad(Load(1));
  Start();
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  worker_->SetLoad(absl::DeadlineExceededError("no news"));
  worker_->AwaitReport();
  handle_->OnOpened(100);
  handle_->OnOpened(10);
  handle_->OnEnded(100);
  EXPECT_EQ(Worker().requests_since_report, 1);
  EXPECT_EQ(Worker().prompt_tokens_since_report, 10);
  // The next report contains them.
  worker_->SetLoad(Load(1));
  worker_->AwaitReport();
  EXPECT_EQ(Worker().requests_since_report, 0);
  handle_->OnEnded(10);
  EXPECT_LE(Worker().requests_since_report, 0);
}

TEST_F(StaticMembershipTest, TellsAboutChangesAndStops) {
  worker_->SetLoad(Load(1));
  Start();
  ASSERT_TRUE(membership_->AwaitWorkers(1, kPatience));
  WorkerLoad draining = Load(1);
  draining.draining = true;
  worker_->SetLoad(draining);
  worker_->AwaitReport();
  EXPECT_FALSE(membership_->AwaitWorkers(1, absl::ZeroDuration()));
  EXPECT_EQ(Worker().trust, Trust::kFresh);
  membership_->Stop();
  membership_->Stop();
  absl::MutexLock lock(&mu_);
  EXPECT_THAT(told_, ::testing::ElementsAre(1, 0));
}

}  // namespace
}  // namespace nosara::router
