// A request's way through the router, with a worker and a client that the test drives by hand.
#include "router/generation.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "base/retry_delay.h"
#include "tests/router/fake_worker_client.h"
#include "tests/status_matchers.h"

namespace nosara::router {
namespace {

using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::StatusIs;

// Takes one response at a time; the test says when it has been written.
class ManualSink final : public Generation::Sink {
 public:
  void Write(const GenerateResponse& response) override {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(writing_);
    EXPECT_FALSE(end_.has_value());
    writing_ = true;
    written_.push_back(response);
  }
  void Finish(const absl::Status& status) override {
    absl::MutexLock lock(&mu_);
    EXPECT_FALSE(writing_);
    EXPECT_FALSE(end_.has_value());
    end_ = status;
  }
  // Answers the write under way; false if there is none.
  bool Answer(Generation& generation) {
    {
      absl::MutexLock lock(&mu_);
      if (!writing_) return false;
      writing_ = false;
    }
    generation.OnWritten();
    return true;
  }
  absl::Status AwaitEnd() {
    const auto ended = [this] {
      mu_.AssertHeld();
      return end_.has_value();
    };
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&ended));
    return *end_;
  }
  bool ended() {
    absl::MutexLock lock(&mu_);
    return end_.has_value();
  }
  size_t written() {
    absl::MutexLock lock(&mu_);
    return written_.size();
  }

 private:
  absl::Mutex mu_;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<GenerateResponse> written_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);
};

class FixedMembership final : public Membership {
 public:
  explicit FixedMembership(ClusterSnapshot cluster) : cluster_(std::move(cluster)) {}
  ClusterSnapshot Snapshot() const override { return cluster_; }
  bool AwaitWorkers(int, absl::Duration) override { return true; }
  void Stop() override {}

 private:
  const ClusterSnapshot cluster_;
};

class GenerationTest : public ::testing::Test {
 protected:
  GenerationTest() {
    ClusterSnapshot cluster;
    for (int i = 0; i < 2; ++i) {
      states_.push_back(std::make_shared<FakeWorkerState>());
      WorkerState& worker = cluster.workers.emplace_back();
      worker.address = absl::StrCat("w", i, ":1");
      worker.trust = Trust::kFresh;
      worker.load.epoch = 1;
      worker.load.worker_id = absl::StrCat("w", i);
      worker.load.model = "tiny";
      worker.load.max_context_tokens = 1000;
      worker.load.vocab_size = 8192;
      worker.handle = std::make_shared<WorkerHandle>(
          worker.address, std::make_unique<FakeWorkerClient>(states_.back()));
      handles_.push_back(worker.handle);
    }
    core_->models = *ModelRegistry::Load({"tiny=models/nosa-tiny"});
    core_->membership = std::make_unique<FixedMembership>(std::move(cluster));
    core_->policy = *MakeRoutingPolicy("round_robin");
    core_->pool = std::make_unique<TaskPool>(1, 4);
    core_->max_open_requests = 2;
    core_->retry_delay = absl::Milliseconds(700);
  }

  ~GenerationTest() override {
    core_->pool->Shutdown();
    for (const auto& state : states_) {
      for (const auto& call : state->calls) call->End(absl::CancelledError("the test is over"));
    }
  }

  std::shared_ptr<Generation> Start(ManualSink* sink) {
    auto generation = std::make_shared<Generation>(core_.get(), sink, RequestOrigin{});
    generation->Start([] {
      GenerateRequest request;
      request.set_text("Hello");
      return request;
    });
    return generation;
  }

  static worker::v1::ExecuteResponse Accepted() {
    worker::v1::ExecuteResponse event;
    event.mutable_accepted();
    return event;
  }
  static worker::v1::ExecuteResponse Token() {
    worker::v1::ExecuteResponse event;
    event.mutable_tokens()->add_tokens()->set_id(1000);
    return event;
  }
  static worker::v1::ExecuteResponse Completed() {
    worker::v1::ExecuteResponse event;
    event.mutable_completed()->set_reason(inference::v1::FINISH_REASON_LENGTH);
    return event;
  }

  std::vector<std::shared_ptr<FakeWorkerState>> states_;
  std::vector<std::shared_ptr<WorkerHandle>> handles_;
  std::unique_ptr<RouterCore> core_ = std::make_unique<RouterCore>();
};

TEST_F(GenerationTest, ASlowSinkStopsTheReadingOfTheWorker) {
  ManualSink sink;
  const auto generation = Start(&sink);
  const auto call = states_[0]->AwaitCall(0);
  call->Send(Accepted());
  int sent = 1;
  while (call->wanted() > 0) {
    call->Send(Token());
    ++sent;
    ASSERT_LE(sent, 100);
  }
  // One is with the sink, the others wait.
  EXPECT_EQ(sent, static_cast<int>(Generation::kMaxQueuedResponses) + 1);
  EXPECT_EQ(sink.written(), 1u);
  while (sink.Answer(*generation)) {
  }
  EXPECT_EQ(sink.written(), static_cast<size_t>(sent));
  EXPECT_EQ(call->wanted(), 1);
  call->Send(Completed());
  while (sink.Answer(*generation)) {
  }
  EXPECT_OK(sink.AwaitEnd());
  EXPECT_EQ(handles_[0]->open_requests(), 1);
  call->End(absl::OkStatus());
  EXPECT_EQ(handles_[0]->open_requests(), 0);
  EXPECT_EQ(handles_[0]->open_prompt_tokens(), 0);
}

TEST_F(GenerationTest, CancelEndsAllAtOnceAlsoWithResponsesInTheQueue) {
  ManualSink sink;
  const auto generation = Start(&sink);
  const auto call = states_[0]->AwaitCall(0);
  call->Send(Accepted());
  call->Send(Token());
  call->Send(Token());
  generation->Cancel();
  generation->Cancel();
  EXPECT_TRUE(call->cancelled());
  EXPECT_FALSE(sink.ended());  // a write is under way
  EXPECT_TRUE(sink.Answer(*generation));
  EXPECT_THAT(sink.AwaitEnd(), StatusIs(absl::StatusCode::kCancelled, ""));
  EXPECT_EQ(sink.written(), 1u);
  // What was on its way does no harm.
  call->Send(Token());
  call->End(absl::CancelledError("cancelled"));
  EXPECT_EQ(states_[1]->calls.size(), 0u);
}

TEST_F(GenerationTest, CancelBeforeTheWorkerIsCalled) {
  absl::Notification entered, go;
  ASSERT_TRUE(core_->pool->TrySubmit([&] {
    entered.Notify();
    go.WaitForNotification();
  }));
  entered.WaitForNotification();
  ManualSink sink;
  const auto generation = Start(&sink);
  generation->Cancel();
  EXPECT_THAT(sink.AwaitEnd(), StatusIs(absl::StatusCode::kCancelled, ""));
  go.Notify();
  core_->pool->Shutdown();
  EXPECT_EQ(states_[0]->calls.size(), 0u);
}

TEST_F(GenerationTest, ARefusalMovesOnATokenDoesNot) {
  ManualSink sink;
  const auto generation = Start(&sink);
  const auto first = states_[0]->AwaitCall(0);
  first->End(absl::FailedPreconditionError("draining"));
  const auto second = states_[1]->AwaitCall(0);
  second->Send(Accepted());
  second->Send(Token());
  while (sink.Answer(*generation)) {
  }
  second->End(WorkerLostStatus("Socket closed"));
  EXPECT_THAT(sink.AwaitEnd(),
              StatusIs(absl::StatusCode::kUnavailable,
                       "worker w1 was lost after 1 tokens; safe to retry (Socket closed)"));
  EXPECT_TRUE(handles_[1]->lost());
  EXPECT_FALSE(handles_[0]->lost());
}

TEST_F(GenerationTest, EachWorkerIsTriedOnce) {
  ManualSink sink;
  const auto generation = Start(&sink);
  states_[0]->AwaitCall(0)->End(absl::FailedPreconditionError("draining"));
  states_[1]->AwaitCall(0)->End(WorkerLostStatus("connection refused"));
  EXPECT_THAT(sink.AwaitEnd(), StatusIs(absl::StatusCode::kUnavailable, "2 refused the request"));
}

TEST_F(GenerationTest, AStoreThatIsGoneIsNotALostWorker) {
  ManualSink sink;
  const auto generation = Start(&sink);
  const auto call = states_[0]->AwaitCall(0);
  call->Send(Accepted());
  while (sink.Answer(*generation)) {
  }
  call->End(absl::UnavailableError("store s1 is gone"));
  EXPECT_THAT(sink.AwaitEnd(),
              StatusIs(absl::StatusCode::kUnavailable, "worker w0: store s1 is gone"));
  EXPECT_FALSE(handles_[0]->lost());
}

TEST_F(GenerationTest, AStreamWithoutItsEndIsAnInternalError) {
  ManualSink sink;
  const auto generation = Start(&sink);
  const auto call = states_[0]->AwaitCall(0);
  call->End(absl::OkStatus());
  EXPECT_THAT(sink.AwaitEnd(), StatusIs(absl::StatusCode::kInternal, "without completing it"));
}

TEST_F(GenerationTest, AFullRouterSaysWhenToRetry) {
  ManualSink sinks[3];
  std::vector<std::shared_ptr<Generation>> generations;
  for (ManualSink& sink : sinks) generations.push_back(Start(&sink));
  const absl::Status status = sinks[2].AwaitEnd();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, "2 open requests"));
  EXPECT_EQ(RetryDelay(status), absl::Milliseconds(700));
  for (auto& generation : generations) generation->Cancel();
  core_->pool->Shutdown();
  for (const auto& state : states_) {
    for (const auto& call : state->calls) call->End(absl::CancelledError(""));
  }
  generations.clear();
  EXPECT_EQ(core_->open_requests(), 0);
}

TEST_F(GenerationTest, AFullTextQueueSaysWhenToRetry) {
  core_->max_open_requests = 100;
  absl::Notification entered, go;
  ASSERT_TRUE(core_->pool->TrySubmit([&] {
    entered.Notify();
    go.WaitForNotification();
  }));
  entered.WaitForNotification();
  ManualSink sinks[5];
  std::vector<std::shared_ptr<Generation>> generations;
  for (ManualSink& sink : sinks) generations.push_back(Start(&sink));
  const absl::Status status = sinks[4].AwaitEnd();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, "wait to be tokenized"));
  EXPECT_EQ(RetryDelay(status), absl::Milliseconds(700));
  for (auto& generation : generations) generation->Cancel();
  go.Notify();
  core_->pool->Shutdown();
}

}  // namespace
}  // namespace nosara::router
