// The engine with the CPU backend, a small random model and a store in memory.
#include "worker/engine/engine.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/status_matchers.h"
#include "tests/worker/collecting_sink.h"
#include "tests/worker/fake_store_client.h"
#include "worker/backend/cpu/cpu_backend.h"

namespace nosara::worker {
namespace {

using ::nosara::testing::StatusIs;

constexpr int kFewSlots = 8;  // topk_blocks of the test model

class EngineTest : public ::testing::Test {
 protected:
  /// A worker of its own: engine, backend, client, over the shared store.
  struct Worker {
    std::unique_ptr<FakeStoreClient> client;
    std::unique_ptr<Engine> engine;
  };

  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open("tests/testdata/tiny-bf16"));
    ASSERT_OK_AND_ASSIGN(const kvstore::PageLayout layout,
                         CpuBackend::LayoutFor(checkpoint_->config()));
    store_ = std::make_unique<FakeStore>(layout);
  }

  Worker MakeWorker(int slots = 0, int max_unstored_blocks = 6, EngineOptions options = {},
                    int64_t cache_bytes = int64_t{1} << 30) {
    Worker worker;
    worker.client = std::make_unique<FakeStoreClient>(store_.get());
    CpuBackendOptions backend_options;
    backend_options.slots_per_head = slots;
    backend_options.max_unstored_blocks = max_unstored_blocks;
    backend_options.cache_bytes = cache_bytes;
    auto backend = CpuBackend::Create(checkpoint_, worker.client.get(), backend_options);
    EXPECT_OK(backend);
    options.integrity = EngineOptions::Integrity::kEachStep;
    options.limits.chunk_tokens = 128;
    auto engine = Engine::Create(*std::move(backend), worker.client.get(), &clock_, options);
    EXPECT_OK(engine);
    worker.engine = *std::move(engine);
    return worker;
  }

  /// A reproducible prompt whose blocks differ from one another.
  static std::vector<int32_t> Prompt(int tokens, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<int32_t> prompt;
    int32_t topic = 0;
    for (int i = 0; i < tokens; ++i) {
      if (i % 37 == 0) topic = random() % 400;
      prompt.push_back((topic + random() % 12) % 416);
    }
    return prompt;
  }

  static Request MakeRequest(std::vector<int32_t> prompt, int64_t max_tokens) {
    Request request;
    request.request_id = "test";
    request.prompt = std::move(prompt);
    request.max_tokens = max_tokens;
    request.sampling.temperature = 0;
    return request;
  }

  static std::shared_ptr<CollectingSink> Start(Engine& engine, Request request,
                                               RequestHandle* handle = nullptr) {
    auto sink = std::make_shared<CollectingSink>();
    auto submitted = engine.Submit(std::move(request), sink);
    EXPECT_OK(submitted);
    if (handle != nullptr && submitted.ok()) *handle = *submitted;
    return sink;
  }

  static std::vector<int32_t> Generate(Engine& engine, Request request,
                                       Completion* completion = nullptr) {
    const auto sink = Start(engine, std::move(request));
    sink->Wait();
    EXPECT_OK(sink->status());
    if (completion != nullptr) *completion = sink->completion();
    return sink->tokens();
  }

  /// Lets the engine look at the clock.
  static void Wake(Engine& engine) { engine.Cancel(RequestHandle{0}); }

  /// Waits for the end of a request while time passes, by `step` a millisecond or so.
  void AwaitWithTime(Engine& engine, CollectingSink& sink, absl::Duration step) {
    while (!sink.EndsWithin(absl::Milliseconds(1))) {
      clock_.Advance(step);
      Wake(engine);
    }
  }

  /// Waits until the engine has let go of everything.
  static void WaitIdle(Engine& engine, const FakeStore& store) {
    for (int i = 0; i < 100000; ++i) {
      Wake(engine);
      const EngineLoad load = engine.load();
      if (load.running_requests == 0 && load.queued_requests == 0 && store.leases() == 0) return;
      std::this_thread::yield();
    }
    FAIL() << "the engine still holds requests or leases";
  }

  FakeClock clock_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::unique_ptr<FakeStore> store_;
};

TEST_F(EngineTest, FewSlotsGiveTheSameTokensAsAllResident) {
  Completion resident, offloaded;
  Worker all = MakeWorker(0);
  const auto expected = Generate(*all.engine, MakeRequest(Prompt(1500, 1), 80), &resident);
  all.engine->Stop();
  auto old = std::move(store_);  // its client still points to it
  store_ = std::make_unique<FakeStore>(all.client->layout());
  Worker few = MakeWorker(kFewSlots);
  const auto actual = Generate(*few.engine, MakeRequest(Prompt(1500, 1), 80), &offloaded);
  EXPECT_EQ(actual, expected);
  EXPECT_EQ(expected.size(), 80u);
  EXPECT_EQ(resident.cache.records_fetched, 0u);
  EXPECT_GT(offloaded.cache.records_fetched, 0u);
  EXPECT_EQ(offloaded.cache.records_selected,
            offloaded.cache.records_resident + offloaded.cache.records_fetched);
  EXPECT_EQ(offloaded.cache.records_by_in_process, offloaded.cache.records_fetched);
  EXPECT_EQ(resident.reason, FinishReason::kLength);
  all.engine->Stop();
}

TEST_F(EngineTest, MappedReadsCountOnlyWhileTheLeasesAreHeld) {
  Worker few = MakeWorker(kFewSlots);
  const auto expected = Generate(*few.engine, MakeRequest(Prompt(1500, 1), 400));
  few.engine->Stop();
  auto old = std::move(store_);
  store_ = std::make_unique<FakeStore>(few.client->layout());
  store_->SetPath(kvstore::Path::kMapped);
  Worker mapped = MakeWorker(kFewSlots);
  const auto sink = Start(*mapped.engine, MakeRequest(Prompt(1500, 1), 400));
  sink->WaitForTokens(3);
  store_->LoseLeases();
  sink->Wait();
  EXPECT_OK(sink->status());
  EXPECT_EQ(sink->tokens(), expected);
  // The step after the loss did not count; everything was found again.
  WaitIdle(*mapped.engine, *store_);
  EXPECT_EQ(mapped.engine->load().recoveries, 1);
  mapped.engine->Stop();
}

// Whatever is lost, whenever: the client gets the tokens of the undisturbed run, once each.
TEST_F(EngineTest, LostPagesAreComputedAgain) {
  using Strike = FakeStore::Strike;
  struct Case {
    const char* name;
    Strike strike;
    int times;
  };
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<FakeStore>> stores;  // their clients still point to them
  for (const bool sampled : {false, true}) {
    Request request = MakeRequest(Prompt(1000, 50), 150);
    if (sampled) {
      request.sampling.temperature = 0.9f;
      request.sampling.seed = seed;
      request.sampling.repetition_penalty = 1.1f;
    }
    // So many reads in all, from the first of the prefill to the last of the decoding.
    store_->StrikeAt(Strike::kHiccup, 1 << 30);
    Worker undisturbed = MakeWorker(kFewSlots);
    const auto expected = Generate(*undisturbed.engine, request);
    undisturbed.engine->Stop();
    const int reads = (1 << 30) - store_->reads_to_strike();
    ASSERT_GT(reads, 100);
    for (const Case& one : {Case{"restart", Strike::kRestart, 1},
                            {"outage", Strike::kOutage, 1},
                            {"hiccup", Strike::kHiccup, 1},
                            {"eviction", Strike::kEvict, 1},
                            {"corruption", Strike::kCorrupt, 1},
                            {"restarts", Strike::kRestart, 3},
                            {"hiccups", Strike::kHiccup, 5}}) {
      const int at = 1 + static_cast<int>(random() % (reads / one.times));
      SCOPED_TRACE(absl::StrCat(one.name, " at read ", at, " of ", reads, ", sampled ", sampled));
      stores.push_back(std::move(store_));
      store_ = std::make_unique<FakeStore>(undisturbed.client->layout());
      store_->StrikeAt(one.strike, at, one.times);
      EngineOptions options;
      options.max_recoveries = 100;  // each damaged page may cost one
      Worker worker = MakeWorker(kFewSlots, 6, options);
      const auto sink = Start(*worker.engine, request);
      AwaitWithTime(*worker.engine, *sink, absl::Milliseconds(10));
      ASSERT_OK(sink->status());
      EXPECT_EQ(sink->tokens(), expected);
      EXPECT_TRUE(sink->ProgressGrows());
      EXPECT_GE(store_->strikes(), 1);
      WaitIdle(*worker.engine, *store_);
      const EngineLoad load = worker.engine->load();
      EXPECT_GE(load.recoveries, store_->strikes());
      worker.engine->Stop();
    }
  }
}

// A loss stops nobody else, and those that share pages recover each for itself.
TEST_F(EngineTest, ManySequencesRecoverAtOnce) {
  std::vector<std::vector<int32_t>> expected;
  Worker worker = MakeWorker(kFewSlots);
  for (uint32_t i = 0; i < 5; ++i) {
    expected.push_back(
        Generate(*worker.engine, MakeRequest(Prompt(500 + 90 * (i / 2), 60 + i / 2), 60)));
  }
  worker.engine->Stop();
  auto old = std::move(store_);
  store_ = std::make_unique<FakeStore>(worker.client->layout());
  store_->StrikeAt(FakeStore::Strike::kRestart, 60, 3);
  Worker second = MakeWorker(kFewSlots);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (uint32_t i = 0; i < 5; ++i) {
    sinks.push_back(Start(*second.engine, MakeRequest(Prompt(500 + 90 * (i / 2), 60 + i / 2), 60)));
  }
  for (uint32_t i = 0; i < 5; ++i) {
    AwaitWithTime(*second.engine, *sinks[i], absl::Milliseconds(10));
    EXPECT_OK(sinks[i]->status());
    EXPECT_EQ(sinks[i]->tokens(), expected[i]) << i;
  }
  EXPECT_GE(store_->strikes(), 1);
  WaitIdle(*second.engine, *store_);
  EXPECT_GT(second.engine->load().recomputed_tokens, 0);
  second.engine->Stop();
}

TEST_F(EngineTest, LossWithoutEndIsUnavailable) {
  EngineOptions options;
  options.max_recoveries = 3;
  Worker worker = MakeWorker(kFewSlots, 6, options);
  store_->StrikeAt(FakeStore::Strike::kHiccup, 1, 1000);  // each read fails
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1000, 51), 20));
  sink->Wait();
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable,
                                       "cached pages were lost 4 times (max_recoveries = 3)"));
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable, "hiccups"));
  WaitIdle(*worker.engine, *store_);
  EXPECT_EQ(worker.engine->load().recoveries, 3);
}

TEST_F(EngineTest, CancelInTheMiddleOfARecoveryFreesEverything) {
  Worker worker = MakeWorker(kFewSlots);
  RequestHandle handle;
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1000, 52), 4000), &handle);
  sink->WaitForTokens(3);
  // It can look nothing up, and waits by the clock, which stands still.
  store_->SetLookupFault(FakeStore::Fault::kUnavailable);
  store_->StrikeAt(FakeStore::Strike::kRestart, 1);
  for (int i = 0; i < 100000 && worker.engine->load().recoveries == 0; ++i) {
    std::this_thread::yield();
  }
  worker.engine->Cancel(handle);
  WaitIdle(*worker.engine, *store_);
  EXPECT_FALSE(sink->ended());
  store_->SetLookupFault(FakeStore::Fault::kNone);
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(50, 7), 3)).size(), 3u);
}

TEST_F(EngineTest, SecondWorkerFindsThePrefixAndContinuesAlike) {
  Worker first = MakeWorker(kFewSlots);
  const auto expected = Generate(*first.engine, MakeRequest(Prompt(1000, 2), 40));
  WaitIdle(*first.engine, *store_);
  // 15 blocks of the prompt; the 40 tokens of output complete one more.
  EXPECT_EQ(store_->pages(), 16u);
  Worker second = MakeWorker(kFewSlots);
  Completion completion;
  EXPECT_EQ(Generate(*second.engine, MakeRequest(Prompt(1000, 2), 40), &completion), expected);
  EXPECT_EQ(completion.cached_prompt_tokens, 960);
  EXPECT_GT(completion.cache.records_fetched, 0u);
  WaitIdle(*second.engine, *store_);
  EXPECT_EQ(store_->pages(), 16u);
}

TEST_F(EngineTest, AnotherSaltSharesNothing) {
  Worker worker = MakeWorker();
  Generate(*worker.engine, MakeRequest(Prompt(300, 3), 4));
  WaitIdle(*worker.engine, *store_);
  Request salted = MakeRequest(Prompt(300, 3), 4);
  salted.cache_salt = "tenant";
  Completion completion;
  Generate(*worker.engine, std::move(salted), &completion);
  EXPECT_EQ(completion.cached_prompt_tokens, 0);
}

TEST_F(EngineTest, ResumedRequestGoesOnLikeTheUndisturbedOne) {
  Worker worker = MakeWorker(kFewSlots);
  for (float temperature : {0.0f, 0.9f}) {
    Request whole = MakeRequest(Prompt(700, 4), 60);
    whole.sampling.temperature = temperature;
    whole.sampling.seed = 42;
    whole.sampling.repetition_penalty = 1.1f;
    const auto expected = Generate(*worker.engine, whole);
    Request rest = whole;
    rest.generated.assign(expected.begin(), expected.begin() + 25);
    auto actual = rest.generated;
    for (int32_t token : Generate(*worker.engine, rest)) actual.push_back(token);
    EXPECT_EQ(actual, expected) << "temperature " << temperature;
  }
}

TEST_F(EngineTest, ManyAtOnceGetWhatTheyGetAlone) {
  Worker worker = MakeWorker(kFewSlots);
  std::vector<std::vector<int32_t>> expected;
  for (uint32_t i = 0; i < 6; ++i) {
    expected.push_back(Generate(*worker.engine, MakeRequest(Prompt(40 + 130 * i, 10 + i), 30)));
  }
  // A store that knows nothing, so that all are prefilled again, mixed.
  auto old = std::move(store_);
  store_ = std::make_unique<FakeStore>(worker.client->layout());
  Worker mixed = MakeWorker(kFewSlots);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (uint32_t i = 0; i < 6; ++i) {
    sinks.push_back(Start(*mixed.engine, MakeRequest(Prompt(40 + 130 * i, 10 + i), 30)));
  }
  for (uint32_t i = 0; i < 6; ++i) {
    sinks[i]->Wait();
    EXPECT_EQ(sinks[i]->tokens(), expected[i]) << i;
  }
  WaitIdle(*mixed.engine, *store_);
  mixed.engine->Stop();
  worker.engine->Stop();
}

TEST_F(EngineTest, StopTokenEndsAndIsNotSent) {
  Worker worker = MakeWorker();
  const auto free_run = Generate(*worker.engine, MakeRequest(Prompt(100, 5), 20));
  Request request = MakeRequest(Prompt(100, 5), 20);
  request.stop_token_ids = {free_run[7]};
  Completion completion;
  const auto stopped = Generate(*worker.engine, request, &completion);
  EXPECT_EQ(completion.reason, FinishReason::kStop);
  EXPECT_LE(stopped.size(), 7u);
  EXPECT_EQ(stopped, std::vector<int32_t>(free_run.begin(), free_run.begin() + stopped.size()));
}

TEST_F(EngineTest, CancelFreesSlotsAndLeases) {
  Worker worker = MakeWorker(kFewSlots);
  RequestHandle handle;
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(600, 6), 4000), &handle);
  sink->WaitForTokens(5);
  worker.engine->Cancel(handle);
  WaitIdle(*worker.engine, *store_);
  EXPECT_FALSE(sink->ended());
  // The engine serves on.
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(50, 7), 3)).size(), 3u);
}

TEST_F(EngineTest, DeadlineEndsRunningAndQueuedRequests) {
  EngineOptions options;
  options.max_running = 1;
  Worker worker = MakeWorker(kFewSlots, 6, options);
  Request running = MakeRequest(Prompt(100, 8), 8000);
  running.deadline = clock_.Now() + absl::Hours(1);
  const auto first = Start(*worker.engine, running);
  first->WaitForTokens(1);
  Request queued = MakeRequest(Prompt(100, 9), 10);
  queued.deadline = clock_.Now() + absl::Hours(1);
  const auto second = Start(*worker.engine, queued);
  clock_.Advance(absl::Hours(2));
  Wake(*worker.engine);
  first->Wait();
  second->Wait();
  EXPECT_THAT(first->status(), StatusIs(absl::StatusCode::kDeadlineExceeded, "deadline"));
  EXPECT_THAT(second->status(), StatusIs(absl::StatusCode::kDeadlineExceeded, "deadline"));
  WaitIdle(*worker.engine, *store_);
}

TEST_F(EngineTest, FullStoreStallsThenFailsOnlyWhoNeedsIt) {
  Worker worker = MakeWorker(kFewSlots, 4);
  store_->SetWriteFault(FakeStore::Fault::kFull);
  // 4 unstored blocks hold 256 tokens: this one needs the store, the other does not.
  const auto large = Start(*worker.engine, MakeRequest(Prompt(1000, 11), 10));
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(100, 12), 10)).size(), 10u);
  for (int i = 0; i < 1000 && !large->ended(); ++i) {
    clock_.Advance(absl::Seconds(1));
    Wake(*worker.engine);
    std::this_thread::yield();
  }
  large->Wait();
  EXPECT_THAT(large->status(), StatusIs(absl::StatusCode::kResourceExhausted, "full"));
  // Room again: served.
  store_->SetWriteFault(FakeStore::Fault::kNone);
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(1000, 11), 10)).size(), 10u);
}

TEST_F(EngineTest, StoreThatComesBackInTimeIsNotNoticed) {
  Worker worker = MakeWorker(kFewSlots, 4);
  const auto expected = Generate(*worker.engine, MakeRequest(Prompt(800, 13), 20));
  auto old = std::move(store_);
  store_ = std::make_unique<FakeStore>(worker.client->layout());
  store_->SetWriteFault(FakeStore::Fault::kUnavailable);
  Worker second = MakeWorker(kFewSlots, 4);
  const auto sink = Start(*second.engine, MakeRequest(Prompt(800, 13), 20));
  Wake(*second.engine);
  store_->SetWriteFault(FakeStore::Fault::kNone);
  for (int i = 0; i < 1000 && !sink->ended(); ++i) {
    clock_.Advance(absl::Milliseconds(5));
    Wake(*second.engine);
    std::this_thread::yield();
  }
  sink->Wait();
  EXPECT_OK(sink->status());
  EXPECT_EQ(sink->tokens(), expected);
  second.engine->Stop();
  worker.engine->Stop();
}

TEST_F(EngineTest, NoStoreServesWhatFitsAndRefusesTheRest) {
  Worker worker = MakeWorker(kFewSlots, 4);
  store_->SetLookupFault(FakeStore::Fault::kUnavailable);
  store_->SetWriteFault(FakeStore::Fault::kUnavailable);
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(150, 14), 20)).size(), 20u);
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1000, 15), 20));
  AwaitWithTime(*worker.engine, *sink, absl::Milliseconds(100));
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable, "KV store"));
}

TEST_F(EngineTest, StoresGoneForAMomentFailNoNewRequest) {
  Worker worker = MakeWorker(kFewSlots, 4);
  const auto expected = Generate(*worker.engine, MakeRequest(Prompt(1000, 15), 4));
  WaitIdle(*worker.engine, *store_);
  store_->SetLookupFault(FakeStore::Fault::kUnavailable);
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1000, 15), 4));
  for (int i = 0; i < 5; ++i) {
    EXPECT_FALSE(sink->EndsWithin(absl::Milliseconds(2)));
    clock_.Advance(absl::Milliseconds(200));
    Wake(*worker.engine);
  }
  store_->SetLookupFault(FakeStore::Fault::kNone);
  AwaitWithTime(*worker.engine, *sink, absl::Milliseconds(100));
  EXPECT_OK(sink->status());
  EXPECT_EQ(sink->tokens(), expected);
}

TEST_F(EngineTest, DamagedRecordsAreComputedAgain) {
  Worker worker = MakeWorker(kFewSlots);
  const auto expected = Generate(*worker.engine, MakeRequest(Prompt(1000, 16), 4));
  WaitIdle(*worker.engine, *store_);
  store_->CorruptRecords();
  // Each damaged page that is met costs a recovery: the first one cuts the chain.
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1000, 16), 4));
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(200, 17), 4)).size(), 4u);
  sink->Wait();
  EXPECT_OK(sink->status());
  EXPECT_EQ(sink->tokens(), expected);
  WaitIdle(*worker.engine, *store_);
  EXPECT_GE(worker.engine->load().recoveries, 1);
}

TEST_F(EngineTest, StoreLostForGoodFailsTheRequestNotTheWorker) {
  Worker worker = MakeWorker(kFewSlots);
  const auto sink = Start(*worker.engine, MakeRequest(Prompt(1500, 18), 6000));
  sink->WaitForTokens(3);
  store_->SetReadFault(FakeStore::Fault::kUnavailable);
  store_->SetLookupFault(FakeStore::Fault::kUnavailable);
  store_->SetWriteFault(FakeStore::Fault::kUnavailable);
  // Until store_patience is over it looks whether the store is back.
  AwaitWithTime(*worker.engine, *sink, absl::Milliseconds(100));
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable, "fake store is down"));
  EXPECT_EQ(Generate(*worker.engine, MakeRequest(Prompt(60, 19), 4)).size(), 4u);
}

TEST_F(EngineTest, MemoryForOneLetsTheOtherWait) {
  const kvstore::PageLayout layout = *CpuBackend::LayoutFor(checkpoint_->config());
  const int64_t one = SequenceCache::BytesNeeded(layout, 320, 5, 4);
  Worker worker = MakeWorker(0, 4, {}, one + one / 2);
  const auto first = Start(*worker.engine, MakeRequest(Prompt(300, 20), 20));
  const auto second = Start(*worker.engine, MakeRequest(Prompt(300, 21), 20));
  first->Wait();
  second->Wait();
  EXPECT_OK(first->status());
  EXPECT_OK(second->status());
  // One that could never fit is told so at once.
  const auto third = Start(*worker.engine, MakeRequest(Prompt(4000, 22), 20));
  third->Wait();
  EXPECT_THAT(third->status(), StatusIs(absl::StatusCode::kInvalidArgument, "bytes of cache"));
}

TEST_F(EngineTest, BadRequestsAreRefused) {
  Worker worker = MakeWorker();
  const auto refuse = [&](Request request) {
    return worker.engine->Submit(std::move(request), std::make_shared<CollectingSink>()).status();
  };
  EXPECT_THAT(refuse(MakeRequest({}, 5)),
              StatusIs(absl::StatusCode::kInvalidArgument, "prompt_tokens is empty"));
  EXPECT_THAT(refuse(MakeRequest({1, 416}, 5)),
              StatusIs(absl::StatusCode::kInvalidArgument, "token 416: must be 0 to 415"));
  EXPECT_THAT(refuse(MakeRequest({1, -1}, 5)),
              StatusIs(absl::StatusCode::kInvalidArgument, "token -1"));
  EXPECT_THAT(refuse(MakeRequest({1}, 0)),
              StatusIs(absl::StatusCode::kInvalidArgument, "max_tokens = 0"));
  EXPECT_THAT(refuse(MakeRequest(Prompt(8000, 1), 193)),
              StatusIs(absl::StatusCode::kInvalidArgument, "together at most 8192"));
  worker.engine->Drain();
  EXPECT_THAT(refuse(MakeRequest({1}, 1)),
              StatusIs(absl::StatusCode::kFailedPrecondition, "draining"));
}

TEST_F(EngineTest, FullQueueRefuses) {
  EngineOptions options;
  options.max_running = 1;
  options.max_queued = 2;
  Worker worker = MakeWorker(0, 6, options);
  const auto running = Start(*worker.engine, MakeRequest(Prompt(10, 1), 5000));
  running->WaitForTokens(1);
  const auto second = Start(*worker.engine, MakeRequest(Prompt(10, 2), 1));
  const auto third = Start(*worker.engine, MakeRequest(Prompt(10, 3), 1));
  EXPECT_THAT(
      worker.engine->Submit(MakeRequest(Prompt(10, 4), 1), std::make_shared<CollectingSink>()),
      StatusIs(absl::StatusCode::kResourceExhausted, "queue of 2"));
}

TEST_F(EngineTest, StopFailsWhatRunsAndAnswersEverybody) {
  Worker worker = MakeWorker(kFewSlots);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 5; ++i) {
    sinks.push_back(Start(*worker.engine, MakeRequest(Prompt(500, 30 + i), 4000)));
  }
  sinks[0]->WaitForTokens(1);
  worker.engine->Stop();
  for (const auto& sink : sinks) {
    sink->Wait();
    EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable, "stopping"));
  }
  EXPECT_EQ(store_->leases(), 0u);
  EXPECT_FALSE(worker.engine->Submit(MakeRequest({1}, 1), std::make_shared<CollectingSink>()).ok());
}

}  // namespace
}  // namespace nosara::worker
