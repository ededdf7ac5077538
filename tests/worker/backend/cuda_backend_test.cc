// The CUDA backend against the CPU backend on the demo model and real text: the same greedy tokens,
// whatever is resident, however requests are batched, whoever wrote the pages.
#include "worker/backend/cuda/cuda_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "tests/status_matchers.h"
#include "tests/worker/collecting_sink.h"
#include "tests/worker/fake_store_client.h"
#include "text/tokenizer.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/engine/engine.h"

namespace nosara::worker {
namespace {

using ::nosara::testing::StatusIs;

constexpr char kModel[] = "models/nosa-tiny";
constexpr int kNewTokens = 48;

class CudaBackendTest : public ::testing::Test {
 protected:
  struct Worker {
    std::unique_ptr<FakeStoreClient> client;
    std::unique_ptr<Engine> engine;
  };

  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(kModel));
    ASSERT_OK_AND_ASSIGN(layout_, CpuBackend::LayoutFor(checkpoint_->config()));
    store_ = std::make_unique<FakeStore>(*layout_);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, text::Tokenizer::Load(kModel));
    std::ifstream file(std::string(kModel) + "/story.txt");
    std::stringstream story;
    story << file.rdbuf();
    ASSERT_OK_AND_ASSIGN(story_, tokenizer->Encode(story.str()));
    ASSERT_GT(story_.size(), 7000u);
    while (story_.size() < 9000) story_.push_back(story_[story_.size() - 7000]);
  }

  /// The first `tokens` tokens behind token `first` of the story.
  std::vector<int32_t> Prompt(size_t tokens, size_t first = 0) const {
    return {story_.begin() + first, story_.begin() + first + tokens};
  }

  static Request MakeRequest(std::vector<int32_t> prompt, int new_tokens = kNewTokens) {
    Request request;
    request.request_id = "test";
    request.prompt = std::move(prompt);
    request.max_tokens = new_tokens;
    request.sampling.temperature = 0;
    return request;
  }

  EngineOptions Options() const {
    EngineOptions options;
    options.integrity = EngineOptions::Integrity::kEachStep;
    options.limits.chunk_tokens = 512;
    options.limits.step_tokens = 1024;
    return options;
  }

  Worker CudaWorker(const CudaBackendOptions& options, FakeStore* store) {
    Worker worker;
    worker.client = std::make_unique<FakeStoreClient>(store);
    auto backend = CudaBackend::Create(checkpoint_, worker.client.get(), options);
    EXPECT_OK(backend);
    auto engine =
        Engine::Create(*std::move(backend), worker.client.get(), Clock::Real(), Options());
    EXPECT_OK(engine);
    worker.engine = *std::move(engine);
    return worker;
  }
  static CudaBackendOptions Cuda(int slots, int64_t cache_bytes = int64_t{2} << 30) {
    CudaBackendOptions options;
    options.slots_per_head = slots;
    options.cache_bytes = cache_bytes;
    options.max_sequences = 24;
    return options;
  }

  Worker CpuWorker(FakeStore* store) {
    Worker worker;
    worker.client = std::make_unique<FakeStoreClient>(store);
    CpuBackendOptions options;
    options.threads = std::max(2u, std::thread::hardware_concurrency() / 2);
    auto backend = CpuBackend::Create(checkpoint_, worker.client.get(), options);
    EXPECT_OK(backend);
    auto engine =
        Engine::Create(*std::move(backend), worker.client.get(), Clock::Real(), Options());
    EXPECT_OK(engine);
    worker.engine = *std::move(engine);
    return worker;
  }

  static std::shared_ptr<CollectingSink> Start(Engine& engine, Request request) {
    auto sink = std::make_shared<CollectingSink>();
    EXPECT_OK(engine.Submit(std::move(request), sink));
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

  /// What the CPU backend gives, from a store of its own.
  std::vector<int32_t> Expected(const std::vector<int32_t>& prompt) {
    FakeStore store(*layout_);
    Worker cpu = CpuWorker(&store);
    auto tokens = Generate(*cpu.engine, MakeRequest(prompt));
    cpu.engine->Stop();
    return tokens;
  }

  /// The CPU backend's logits behind `tokens`.
  std::vector<float> Logits(const std::vector<int32_t>& tokens) {
    CpuBackendOptions options;
    options.max_unstored_blocks = static_cast<int>(tokens.size()) / 64 + 2;
    auto backend = CpuBackend::Create(checkpoint_, nullptr, options);
    EXPECT_OK(backend);
    EXPECT_OK((*backend)->AddSequence(SequenceId{1}, tokens.size()));
    std::vector<std::vector<float>> logits;
    (*backend)->Forward({{SequenceId{1}, tokens, std::nullopt}}, &logits);
    return logits[0];
  }

  /// Equal, or different from a place on where the CPU's logits of the two tokens are as close as
  /// they come to lie by another order of additions: the CPU's own move by 0.03 with the size of
  /// the prefill chunks. Returns whether they were equal.
  bool ExpectSameUpToTies(const std::vector<int32_t>& prompt, const std::vector<int32_t>& actual,
                          const std::vector<int32_t>& expected) {
    if (actual == expected) return true;
    size_t same = 0;
    while (same < std::min(actual.size(), expected.size()) && actual[same] == expected[same]) {
      ++same;
    }
    EXPECT_LT(same, std::min(actual.size(), expected.size())) << "one ends early";
    if (same >= std::min(actual.size(), expected.size())) return false;
    std::vector<int32_t> tokens = prompt;
    tokens.insert(tokens.end(), expected.begin(), expected.begin() + same);
    const std::vector<float> logits = Logits(tokens);
    EXPECT_NEAR(logits[actual[same]], logits[expected[same]], 0.04)
        << "token " << same << ": " << actual[same] << ", the CPU chose " << expected[same];
    return false;
  }

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::optional<kvstore::PageLayout> layout_;
  std::unique_ptr<FakeStore> store_;
  std::vector<int32_t> story_;
};

TEST_F(CudaBackendTest, GreedyTokensEqualTheCpuBackends) {
  const int few = checkpoint_->config().nosa.topk_blocks;
  for (size_t tokens : {1, 63, 64, 65, 1000, 8000}) {
    SCOPED_TRACE(tokens);
    const std::vector<int32_t> expected = Expected(Prompt(tokens));
    ASSERT_FALSE(expected.empty());
    for (int slots : {0, few}) {
      SCOPED_TRACE(slots);
      FakeStore store(*layout_);
      Worker cuda = CudaWorker(Cuda(slots), &store);
      Completion completion;
      EXPECT_EQ(Generate(*cuda.engine, MakeRequest(Prompt(tokens)), &completion), expected);
      EXPECT_EQ(completion.cache.records_selected,
                completion.cache.records_resident + completion.cache.records_fetched);
      if (slots == 0) {
        EXPECT_EQ(completion.cache.records_fetched, 0u);
      }
      if (slots == few && tokens == 8000) {
        EXPECT_GT(completion.cache.records_fetched, 0u);
      }
      cuda.engine->Stop();
    }
  }
}

TEST_F(CudaBackendTest, BatchesOfManyLengthsGiveWhatEachGivesAlone) {
  const size_t lengths[] = {1,   63,  64,  65,   1000, 8000, 127,  128,
                            200, 500, 700, 1024, 1500, 2000, 3000, 5000};
  std::vector<std::vector<int32_t>> expected;
  for (size_t length : lengths) expected.push_back(Expected(Prompt(length, length % 700)));
  for (int slots : {0, checkpoint_->config().nosa.topk_blocks}) {
    SCOPED_TRACE(slots);
    FakeStore store(*layout_);
    Worker cuda = CudaWorker(Cuda(slots), &store);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (size_t length : lengths) {
      sinks.push_back(Start(*cuda.engine, MakeRequest(Prompt(length, length % 700))));
    }
    int equal = 0;
    for (size_t i = 0; i < sinks.size(); ++i) {
      SCOPED_TRACE(lengths[i]);
      sinks[i]->Wait();
      EXPECT_OK(sinks[i]->status());
      equal +=
          ExpectSameUpToTies(Prompt(lengths[i], lengths[i] % 700), sinks[i]->tokens(), expected[i]);
    }
    // The lengths that matter most are equal; of the others, almost all.
    for (int i = 0; i < 6; ++i) EXPECT_EQ(sinks[i]->tokens(), expected[i]) << lengths[i];
    EXPECT_GE(equal, 14);
    cuda.engine->Stop();
  }
}

TEST_F(CudaBackendTest, PagesOfEitherBackendServeTheOther) {
  const std::vector<int32_t> prompt = Prompt(4000);
  const std::vector<int32_t> expected = Expected(prompt);
  {
    FakeStore store(*layout_);
    Worker cpu = CpuWorker(&store);
    EXPECT_EQ(Generate(*cpu.engine, MakeRequest(prompt)), expected);
    cpu.engine->Stop();
    for (int slots : {0, checkpoint_->config().nosa.topk_blocks}) {
      Worker cuda = CudaWorker(Cuda(slots), &store);
      Completion completion;
      EXPECT_EQ(Generate(*cuda.engine, MakeRequest(prompt), &completion), expected);
      EXPECT_EQ(completion.cached_prompt_tokens, 62 * 64);
      EXPECT_GT(completion.cache.records_fetched, 0u);
      cuda.engine->Stop();
    }
  }
  FakeStore store(*layout_);
  Worker cuda = CudaWorker(Cuda(0), &store);
  EXPECT_EQ(Generate(*cuda.engine, MakeRequest(prompt)), expected);
  cuda.engine->Stop();
  Worker cpu = CpuWorker(&store);
  Completion completion;
  EXPECT_EQ(Generate(*cpu.engine, MakeRequest(prompt), &completion), expected);
  EXPECT_EQ(completion.cached_prompt_tokens, 62 * 64);
  cpu.engine->Stop();
}

TEST_F(CudaBackendTest, GivesUpFramesUnderPressureAndStaysRight) {
  // Room for one prompt of 4,000 tokens whole, and for some more sequences with few slots.
  const ModelConfig& config = checkpoint_->config();
  const int64_t frame =
      DeviceCache::FrameBytes(config.num_layers, config.num_kv_heads, config.head_dim);
  const std::vector<int32_t> first = Prompt(4000);
  const std::vector<int32_t> second = Prompt(3500, 900);
  const std::vector<int32_t> third = Prompt(3000, 1800);
  FakeStore store(*layout_);
  Worker cuda = CudaWorker(Cuda(0, 110 * frame), &store);
  auto a = Start(*cuda.engine, MakeRequest(first, 400));
  a->WaitForTokens(2);
  auto b = Start(*cuda.engine, MakeRequest(second));
  b->WaitForTokens(2);
  auto c = Start(*cuda.engine, MakeRequest(third));
  for (const auto& sink : {a, b, c}) {
    sink->Wait();
    EXPECT_OK(sink->status());
  }
  const auto head = [](std::vector<int32_t> tokens) {
    tokens.resize(std::min<size_t>(tokens.size(), kNewTokens));
    return tokens;
  };
  EXPECT_EQ(head(a->tokens()), Expected(first));
  EXPECT_EQ(b->tokens(), Expected(second));
  EXPECT_EQ(c->tokens(), Expected(third));
  EXPECT_GT(a->completion().cache.records_fetched, 0u);
  cuda.engine->Stop();
}

TEST_F(CudaBackendTest, SampledTokensEqualTheCpuBackends) {
  Request request = MakeRequest(Prompt(700));
  request.sampling.temperature = 0.7f;
  request.sampling.top_p = 0.9f;
  request.sampling.repetition_penalty = 1.1f;
  request.sampling.seed = 5;
  FakeStore cpu_store(*layout_);
  Worker cpu = CpuWorker(&cpu_store);
  const auto expected = Generate(*cpu.engine, request);
  cpu.engine->Stop();
  Worker cuda = CudaWorker(Cuda(0), store_.get());
  EXPECT_EQ(Generate(*cuda.engine, request), expected);
  cuda.engine->Stop();
}

TEST_F(CudaBackendTest, LostRecordsAreComputedAgainAndDisturbNobody) {
  const int few = checkpoint_->config().nosa.topk_blocks;
  const std::vector<int32_t> short_prompt = Prompt(600, 100);
  const std::vector<int32_t> long_prompt = Prompt(6000);
  constexpr int kTokens = 400;
  std::vector<int32_t> undisturbed;
  {
    FakeStore store(*layout_);
    Worker cuda = CudaWorker(Cuda(few), &store);
    undisturbed = Generate(*cuda.engine, MakeRequest(long_prompt, kTokens));
    cuda.engine->Stop();
  }
  Worker cuda = CudaWorker(Cuda(few), store_.get());
  const std::vector<int32_t> expected = Expected(short_prompt);
  store_->StrikeAt(FakeStore::Strike::kRestart, 60);
  auto long_one = Start(*cuda.engine, MakeRequest(long_prompt, kTokens));
  long_one->WaitForTokens(3);
  // Few blocks: all resident, nothing to be fetched.
  auto short_one = Start(*cuda.engine, MakeRequest(short_prompt));
  short_one->Wait();
  EXPECT_OK(short_one->status());
  EXPECT_EQ(short_one->tokens(), expected);
  long_one->Wait();
  EXPECT_OK(long_one->status());
  ExpectSameUpToTies(long_prompt, long_one->tokens(), undisturbed);
  EXPECT_EQ(store_->strikes(), 1);
  EXPECT_GE(cuda.engine->load().recoveries, 1);
  cuda.engine->Stop();
}

TEST_F(CudaBackendTest, LongRunOfComingAndGoing) {
  // Some 3,000 steps with CheckIntegrity after each: sequences join and leave, some are cancelled,
  // reads fail now and then. Nothing may leak, and who ends well ends as it does alone.
  constexpr int kRequests = 360;
  constexpr size_t kInFlight = 12;
  std::vector<std::vector<int32_t>> prompts;
  for (size_t tokens : {5, 64, 100, 333, 640, 900, 1200, 1500, 1800, 2100}) {
    prompts.push_back(Prompt(tokens, tokens * 3 % 4000));
  }
  std::vector<std::vector<int32_t>> alone;
  constexpr int kTokens = 100;
  {
    FakeStore store(*layout_);
    Worker cuda = CudaWorker(Cuda(0), &store);
    for (const auto& prompt : prompts) {
      alone.push_back(Generate(*cuda.engine, MakeRequest(prompt, kTokens)));
    }
    cuda.engine->Stop();
  }
  const ModelConfig& config = checkpoint_->config();
  const int64_t frame =
      DeviceCache::FrameBytes(config.num_layers, config.num_kv_heads, config.head_dim);
  Worker cuda = CudaWorker(Cuda(config.nosa.topk_blocks, 420 * frame), store_.get());
  const auto& backend = dynamic_cast<const CudaBackend&>(cuda.engine->backend());
  struct Running {
    size_t prompt;
    RequestHandle handle;
    std::shared_ptr<CollectingSink> sink;
    bool cancelled;
  };
  std::deque<Running> running;
  std::mt19937 random(static_cast<uint32_t>(::testing::UnitTest::GetInstance()->random_seed()));
  int equal = 0, ties = 0, failed = 0, cancelled = 0;
  const auto finish = [&](Running one) {
    if (one.cancelled) {
      ++cancelled;
      return;
    }
    one.sink->Wait();
    if (!one.sink->status().ok()) {
      EXPECT_THAT(one.sink->status(), StatusIs(absl::StatusCode::kUnavailable, ""));
      ++failed;
      return;
    }
    const bool same =
        ExpectSameUpToTies(prompts[one.prompt], one.sink->tokens(), alone[one.prompt]);
    (same ? equal : ties) += 1;
  };
  for (int i = 0; i < kRequests; ++i) {
    if (running.size() == kInFlight) {
      finish(std::move(running.front()));
      running.pop_front();
    }
    if (i % 40 == 20) store_->SetReadFault(FakeStore::Fault::kUnavailable);
    if (i % 40 == 22) store_->SetReadFault(FakeStore::Fault::kNone);
    Running one;
    one.prompt = random() % prompts.size();
    one.sink = std::make_shared<CollectingSink>();
    one.cancelled = random() % 10 == 0;
    ASSERT_OK_AND_ASSIGN(one.handle,
                         cuda.engine->Submit(MakeRequest(prompts[one.prompt], kTokens), one.sink));
    if (one.cancelled) cuda.engine->Cancel(one.handle);
    running.push_back(std::move(one));
  }
  for (Running& one : running) finish(std::move(one));
  EXPECT_EQ(equal + ties + failed + cancelled, kRequests);
  EXPECT_GT(equal, kRequests / 2) << ties << " parted at ties, " << failed << " failed";
  // A prompt that meets a tie meets it in most of its runs.
  EXPECT_LT(ties, kRequests / 4);
  cuda.engine->Stop();
  EXPECT_EQ(backend.free_frames(), 420);
  EXPECT_EQ(store_->leases(), 0u);
}

TEST_F(CudaBackendTest, RefusesWhatCannotFit) {
  CudaBackendOptions options = Cuda(3);
  EXPECT_THAT(CudaBackend::Create(checkpoint_, nullptr, options).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, ""));
  options = Cuda(0);
  options.device = 77;
  EXPECT_THAT(CudaBackend::Create(checkpoint_, nullptr, options).status(),
              StatusIs(absl::StatusCode::kUnavailable, "device = 77"));
  const ModelConfig& config = checkpoint_->config();
  const int64_t frame =
      DeviceCache::FrameBytes(config.num_layers, config.num_kv_heads, config.head_dim);
  ASSERT_OK_AND_ASSIGN(const auto backend,
                       CudaBackend::Create(checkpoint_, nullptr, Cuda(0, 20 * frame)));
  EXPECT_THAT(backend->AddSequence(SequenceId{1}, 4000),
              StatusIs(absl::StatusCode::kInvalidArgument, ""));
  EXPECT_OK(backend->AddSequence(SequenceId{2}, 900));
  EXPECT_THAT(backend->AddSequence(SequenceId{3}, 900),
              StatusIs(absl::StatusCode::kResourceExhausted, ""));
  backend->RemoveSequence(SequenceId{2});
  EXPECT_OK(backend->AddSequence(SequenceId{4}, 900));
  EXPECT_EQ(backend->free_frames(), 20 - 15 - 1);
  backend->CheckIntegrity();
}

}  // namespace
}  // namespace nosara::worker
