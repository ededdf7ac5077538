// The three programs as three processes: what a user of the system sees, also when one dies.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "client/client.h"
#ifdef NOSARA_ETCD
#include "tests/etcd.h"
#endif
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"
#include "nosara/worker/v1/worker.grpc.pb.h"
#include "tests/program.h"
#include "tests/raw_call.h"
#include "tests/status_matchers.h"

namespace nosara {
namespace {

using client::Client;
using client::Continue;
using inference::v1::Finished;
using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::Program;
using ::nosara::testing::RawCall;
using ::nosara::testing::StatusIs;

constexpr char kModel[] = "tests/testdata/tiny-bf16";
constexpr char kTokenizer[] = "tests/testdata/tokenizer";
constexpr absl::Duration kTimeout = absl::Seconds(60);

struct Output {
  absl::Status status;
  std::vector<uint32_t> tokens;
  Finished finished;
};

class SystemTest : public ::testing::Test {
 protected:
  static std::unique_ptr<Program> StartStore(std::vector<std::string> flags = {}) {
    flags.insert(flags.begin(), {"--listen=127.0.0.1:0", "--arena_bytes=64MiB"});
    return std::make_unique<Program>(NOSARA_BIN "/nosara-kvstore", flags);
  }
  static std::unique_ptr<Program> StartWorker(const std::string& store,
                                              std::vector<std::string> flags = {}) {
    flags.insert(flags.begin(),
                 {"--listen=127.0.0.1:0", absl::StrCat("--model_dir=", kModel), "--model_name=tiny",
                  absl::StrCat("--stores=", store), "--threads=1"});
    return std::make_unique<Program>(NOSARA_BIN "/nosara-worker", flags);
  }
  static std::unique_ptr<Program> StartRouter(const std::string& workers) {
    return std::make_unique<Program>(
        NOSARA_BIN "/nosara-router",
        std::vector<std::string>{"--listen=127.0.0.1:0", absl::StrCat("--workers=", workers),
                                 absl::StrCat("--model=tiny=", kTokenizer),
                                 "--poll_interval=50ms"});
  }
  static std::unique_ptr<Client> Connect(const Program& router) {
    // Goes on without a router, too: its calls fail, and no process is left behind.
    EXPECT_NE(router.address(), "") << "the router has not started";
    return *Client::Connect(router.address().empty() ? "127.0.0.1:1" : router.address());
  }
  /// Waits until the router sees `workers` workers.
  static void AwaitWorkers(Client& client, uint32_t workers) {
    const absl::Time end = absl::Now() + kTimeout;
    while (absl::Now() < end) {
      const auto models = client.ListModels();
      if (models.ok() && models->size() == 1 && (*models)[0].ready_workers() == workers) return;
      std::this_thread::yield();
    }
    FAIL() << "the router does not see " << workers << " workers";
  }

  static worker::v1::GetLoadResponse GetLoad(const Program& worker) {
    const auto stub = worker::v1::WorkerService::NewStub(
        grpc::CreateChannel(worker.address(), grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    worker::v1::GetLoadResponse load;
    EXPECT_TRUE(stub->GetLoad(&context, {}, &load).ok());
    return load;
  }

  /// Waits until the worker reaches all its stores.
  static void AwaitStores(const Program& worker) {
    const absl::Time end = absl::Now() + kTimeout;
    while (absl::Now() < end) {
      if (GetLoad(worker).unreachable_stores().empty()) return;
      std::this_thread::yield();
    }
    FAIL() << "the worker does not reach its stores";
  }

  /// Pages that a store holds.
  static uint64_t StoredPages(const Program& store) {
    const auto stub = kvstore::v1::KvStoreService::NewStub(
        grpc::CreateChannel(store.address(), grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    kvstore::v1::GetStatsResponse stats;
    EXPECT_TRUE(stub->GetStats(&context, {}, &stats).ok());
    return stats.slots_stored();
  }

  static GenerateRequest MakeRequest(int prompt_tokens, uint32_t seed, uint32_t max_tokens) {
    GenerateRequest request;
    std::mt19937 random(seed);
    uint32_t topic = 0;
    for (int i = 0; i < prompt_tokens; ++i) {
      if (i % 37 == 0) topic = random() % 400;
      request.mutable_token_ids()->add_ids((topic + random() % 12) % 416);
    }
    request.set_max_tokens(max_tokens);
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(0);
    return request;
  }

  /// `on_tokens` is told the number of tokens so far; false ends the stream.
  static Output Generate(Client& client, const GenerateRequest& request,
                         const std::function<bool(size_t)>& on_tokens = nullptr,
                         absl::Duration timeout = kTimeout) {
    Output output;
    output.status = client.Generate(
        request,
        [&](const GenerateResponse& event) {
          if (event.has_finished()) output.finished = event.finished();
          if (!event.has_chunk()) return Continue::kYes;
          for (uint32_t id : event.chunk().token_ids()) output.tokens.push_back(id);
          return on_tokens == nullptr || on_tokens(output.tokens.size()) ? Continue::kYes
                                                                         : Continue::kNo;
        },
        timeout);
    return output;
  }
};

TEST_F(SystemTest, EveryResidencyAndTransportGivesTheSameTokens) {
  const GenerateRequest request = MakeRequest(1500, 1, 60);
  std::vector<uint32_t> expected;
  for (const auto& [name, flags] : std::vector<std::pair<std::string, std::vector<std::string>>>{
           {"resident", {"--slots_per_head=0"}},
           {"mapped", {"--slots_per_head=-1", "--store_path=mapped"}},
           {"ucx tcp", {"--slots_per_head=-1", "--store_path=ucx", "--ucx_tls=tcp"}}}) {
    SCOPED_TRACE(name);
    const auto store = StartStore();
    const auto worker = StartWorker(store->address(), flags);
    const auto router = StartRouter(worker->address());
    const auto client = Connect(*router);
    AwaitWorkers(*client, 1);
    const Output output = Generate(*client, request);
    ASSERT_OK(output.status);
    EXPECT_EQ(output.tokens.size(), 60u);
    const auto& cache = output.finished.cache();
    EXPECT_EQ(cache.records_selected(), cache.records_resident() + cache.records_fetched());
    if (name == "resident") {
      expected = output.tokens;
      EXPECT_EQ(cache.records_fetched(), 0u);
    } else {
      EXPECT_EQ(output.tokens, expected);
      EXPECT_GT(cache.records_fetched(), 0u);
      EXPECT_EQ(name == "mapped" ? cache.records_by_mapped() : cache.records_by_ucx(),
                cache.records_fetched());
      // Single records, not whole pages: 23 pages of 4 records were written.
      EXPECT_EQ(cache.bytes_fetched() % cache.records_fetched(), 0u);
    }
    router->Signal(SIGTERM);
    EXPECT_EQ(router->Wait(), 0);
    worker->Signal(SIGTERM);
    EXPECT_EQ(worker->Wait(), 0);
    store->Signal(SIGTERM);
    EXPECT_EQ(store->Wait(), 0);
  }
}

TEST_F(SystemTest, SecondWorkerPrefillsOnlyWhatTheStoreDoesNotHave) {
  const auto store = StartStore();
  const auto first = StartWorker(store->address(), {"--slots_per_head=-1"});
  const auto first_router = StartRouter(first->address());
  const auto first_client = Connect(*first_router);
  AwaitWorkers(*first_client, 1);
  const GenerateRequest request = MakeRequest(1000, 2, 30);
  const Output expected = Generate(*first_client, request);
  ASSERT_OK(expected.status);
  EXPECT_EQ(expected.finished.usage().cached_prompt_tokens(), 0u);

  const auto second = StartWorker(store->address(), {"--slots_per_head=-1", "--store_path=ucx"});
  const auto second_router = StartRouter(second->address());
  const auto second_client = Connect(*second_router);
  AwaitWorkers(*second_client, 1);
  const Output actual = Generate(*second_client, request);
  ASSERT_OK(actual.status);
  EXPECT_EQ(actual.tokens, expected.tokens);
  EXPECT_EQ(actual.finished.usage().cached_prompt_tokens(), 960u);
}

TEST_F(SystemTest, KilledWorkerIsUnavailableToTheClient) {
  const auto store = StartStore();
  const auto worker = StartWorker(store->address());
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  const Output output = Generate(*client, MakeRequest(300, 3, 7000), [&](size_t tokens) {
    if (tokens == 10) worker->Signal(SIGKILL);
    return true;
  });
  EXPECT_THAT(output.status, StatusIs(absl::StatusCode::kUnavailable, "worker"));
  EXPECT_GE(output.tokens.size(), 10u);
  // Nobody left: said so, at once.
  AwaitWorkers(*client, 0);
  EXPECT_THAT(Generate(*client, MakeRequest(10, 3, 5)).status,
              StatusIs(absl::StatusCode::kUnavailable, "worker"));
}

// The store dies in the middle of streams and comes back without a page: the streams stand still
// meanwhile, and go on with the same tokens.
TEST_F(SystemTest, KilledAndRestartedStoreChangesNoToken) {
  for (const char* path : {"mapped", "ucx"}) {
    SCOPED_TRACE(path);
    auto store = StartStore();
    const std::string address = store->address();
    const auto worker = StartWorker(address, {"--slots_per_head=-1", "--store_patience=60s",
                                              absl::StrCat("--store_path=", path)});
    const auto router = StartRouter(worker->address());
    const auto client = Connect(*router);
    AwaitWorkers(*client, 1);
    const auto restart = [&] {
      store->Kill();
      store = std::make_unique<Program>(
          NOSARA_BIN "/nosara-kvstore",
          std::vector<std::string>{absl::StrCat("--listen=", address), "--arena_bytes=64MiB"});
      ASSERT_EQ(store->address(), address);
    };
    for (const bool sampled : {false, true}) {
      SCOPED_TRACE(sampled);
      GenerateRequest request = MakeRequest(1500, sampled ? 41 : 42, 600);
      if (sampled) {
        request.mutable_sampling()->set_temperature(0.8);
        request.mutable_sampling()->set_seed(7);
      }
      AwaitStores(*worker);
      const Output expected = Generate(*client, request);
      ASSERT_OK(expected.status);
      // A mapped arena outlives its store: only what the worker looks up or stores tells.
      size_t next = 5;
      const Output actual = Generate(*client, request, [&](size_t tokens) {
        if (tokens < next) return true;
        next += 145;
        restart();
        return true;
      });
      EXPECT_OK(actual.status);
      EXPECT_EQ(actual.tokens, expected.tokens);
    }
    const worker::v1::GetLoadResponse load = GetLoad(*worker);
    if (path == std::string("ucx")) {
      EXPECT_GE(load.recoveries(), 2u);
      EXPECT_GT(load.recomputed_tokens(), 0u);
    }
  }
}

TEST_F(SystemTest, StoreGoneForGoodFailsWhoNeedsItAndComesBack) {
  auto store = StartStore();
  const std::string address = store->address();
  const auto worker = StartWorker(address, {"--slots_per_head=-1", "--store_patience=2s"});
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  const Output broken = Generate(*client, MakeRequest(1500, 4, 6000), [&](size_t tokens) {
    if (tokens == 10) store->Kill();
    return true;
  });
  EXPECT_THAT(broken.status, StatusIs(absl::StatusCode::kUnavailable, "store"));
  // The worker lives, and serves what fits without a store.
  EXPECT_OK(Generate(*client, MakeRequest(100, 5, 20)).status);
  EXPECT_THAT(Generate(*client, MakeRequest(3000, 6, 20)).status,
              StatusIs(absl::StatusCode::kUnavailable, "store"));
  EXPECT_THAT(GetLoad(*worker).unreachable_stores(), ::testing::ElementsAre(address));
  // A new store at the same address is found without a restart of anybody.
  store = std::make_unique<Program>(
      NOSARA_BIN "/nosara-kvstore",
      std::vector<std::string>{absl::StrCat("--listen=", address), "--arena_bytes=64MiB"});
  ASSERT_EQ(store->address(), address);
  Output again;
  const absl::Time end = absl::Now() + kTimeout;
  do {
    again = Generate(*client, MakeRequest(3000, 6, 20));
  } while (!again.status.ok() && absl::Now() < end);
  EXPECT_OK(again.status);
  EXPECT_THAT(GetLoad(*worker).unreachable_stores(), ::testing::IsEmpty());
}

/// Stores of a cluster, each to be killed and started anew at its address.
class Stores {
 public:
  explicit Stores(int count) {
    for (int i = 0; i < count; ++i) {
      stores_.push_back(std::make_unique<Program>(
          NOSARA_BIN "/nosara-kvstore",
          std::vector<std::string>{"--listen=127.0.0.1:0", "--arena_bytes=64MiB"}));
      addresses_.push_back(stores_.back()->address());
    }
  }
  Program& at(size_t i) { return *stores_[i]; }
  const std::string& address(size_t i) const { return addresses_[i]; }
  std::string addresses() const { return absl::StrJoin(addresses_, ","); }
  void Restart(size_t i) {
    stores_[i] = std::make_unique<Program>(
        NOSARA_BIN "/nosara-kvstore",
        std::vector<std::string>{absl::StrCat("--listen=", addresses_[i]), "--arena_bytes=64MiB"});
    ASSERT_EQ(stores_[i]->address(), addresses_[i]);
  }

 private:
  std::vector<std::unique_ptr<Program>> stores_;
  std::vector<std::string> addresses_;
};

// One copy of each page: what a killed store had is computed again, and the other one takes its
// place.
TEST_F(SystemTest, WithoutCopiesAnotherStoreTakesThePlaceOfAKilledOne) {
  Stores stores(2);
  const auto worker = StartWorker(
      stores.addresses(), {"--slots_per_head=-1", "--store_path=ucx", "--store_patience=60s"});
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  // 100 groups of pages: both stores get some, whatever their ports are.
  GenerateRequest requests[2];
  Output expected[2];
  for (int i = 0; i < 2; ++i) {
    requests[i] = MakeRequest(3000, 100 + i, 600);
    expected[i] = Generate(*client, requests[i]);
    ASSERT_OK(expected[i].status);
    EXPECT_GT(expected[i].finished.cache().records_fetched(), 0u);
  }
  for (uint32_t seed = 200; StoredPages(stores.at(0)) == 0 || StoredPages(stores.at(1)) == 0;
       ++seed) {
    ASSERT_LT(seed, 220u) << "all groups of pages on one of two stores";
    ASSERT_OK(Generate(*client, MakeRequest(3000, seed, 2)).status);
  }
  Output actual[2];
  std::atomic<bool> killed{false};
  std::thread second([&] { actual[1] = Generate(*client, requests[1]); });
  actual[0] = Generate(*client, requests[0], [&](size_t tokens) {
    if (tokens >= 10 && !killed.exchange(true)) stores.at(1).Kill();
    return true;
  });
  second.join();
  for (int i = 0; i < 2; ++i) {
    EXPECT_OK(actual[i].status);
    EXPECT_EQ(actual[i].tokens, expected[i].tokens);
  }
  // The worker says which one is gone, once a try to reach it has failed.
  const absl::Time end = absl::Now() + kTimeout;
  while (GetLoad(*worker).unreachable_stores().empty() && absl::Now() < end) {
    std::this_thread::yield();
  }
  EXPECT_THAT(GetLoad(*worker).unreachable_stores(), ::testing::ElementsAre(stores.address(1)));
  // All pages are on the store that is left.
  const Output again = Generate(*client, requests[0]);
  ASSERT_OK(again.status);
  EXPECT_EQ(again.tokens, expected[0].tokens);
  EXPECT_EQ(again.finished.usage().cached_prompt_tokens(), 2944u);
}

// Two copies of each page on three stores; one store after the other is killed in the middle of
// streams and started anew without a page.
TEST_F(SystemTest, WithTwoCopiesNobodyNoticesKilledStores) {
  for (const char* path : {"mapped", "ucx"}) {
    SCOPED_TRACE(path);
    Stores stores(3);
    const auto worker =
        StartWorker(stores.addresses(), {"--slots_per_head=-1", absl::StrCat("--store_path=", path),
                                         "--replicas=2", "--store_patience=60s"});
    const auto router = StartRouter(worker->address());
    const auto client = Connect(*router);
    AwaitWorkers(*client, 1);
    constexpr int kStreams = 4;
    GenerateRequest requests[kStreams];
    Output expected[kStreams];
    for (int i = 0; i < kStreams; ++i) {
      requests[i] = MakeRequest(1200 + 300 * i, 300 + i, 400);
      if (i % 2 == 1) {
        requests[i].mutable_sampling()->set_temperature(0.8);
        requests[i].mutable_sampling()->set_seed(i);
      }
      expected[i] = Generate(*client, requests[i]);
      ASSERT_OK(expected[i].status);
    }
    const uint64_t stored =
        StoredPages(stores.at(0)) + StoredPages(stores.at(1)) + StoredPages(stores.at(2));
    uint64_t pages = 0;
    for (const GenerateRequest& request : requests) {
      pages += (request.token_ids().ids_size() + 399) / 64;
    }
    EXPECT_EQ(stored, 2 * pages);

    // Each 120 tokens of a stream the next store dies and comes back.
    absl::Mutex mu;
    int kills = 0;
    Output actual[kStreams];
    std::vector<std::thread> threads;
    for (int i = 0; i < kStreams; ++i) {
      threads.emplace_back([&, i] {
        size_t next = 10 + 30 * i;
        actual[i] = Generate(
            *client, requests[i],
            [&](size_t tokens) {
              if (tokens < next) return true;
              next += 120;
              absl::MutexLock lock(&mu);
              stores.at(kills % 3).Kill();
              stores.Restart(kills % 3);
              ++kills;
              return true;
            },
            absl::Minutes(10));
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < kStreams; ++i) {
      EXPECT_OK(actual[i].status) << i;
      EXPECT_EQ(actual[i].tokens, expected[i].tokens) << i;
    }
    EXPECT_GE(kills, 12);
    const worker::v1::GetLoadResponse load = GetLoad(*worker);
    EXPECT_EQ(load.pages_discarded(), 0u) << "no page was ever damaged";
    if (path == std::string("ucx")) {
      EXPECT_GT(load.reads_failed_over() + load.recoveries(), 0u);
    }
    RecordProperty(absl::StrCat(path, "_kills"), kills);
    RecordProperty(absl::StrCat(path, "_failovers"), static_cast<int>(load.reads_failed_over()));
    RecordProperty(absl::StrCat(path, "_recoveries"), static_cast<int>(load.recoveries()));
  }
}

#ifdef NOSARA_ETCD
// Stores that join, die and leave, known by etcd alone, which itself dies in the end.
TEST_F(SystemTest, StoresComeAndGoInEtcd) {
  testing::Etcd etcd;
  const std::string where = absl::StrCat("--etcd=", etcd.endpoint());
  const auto join = [&](int i) {
    return StartStore({where, absl::StrCat("--node_id=store", i), "--membership_ttl=2s"});
  };
  const auto worker = std::make_unique<Program>(
      NOSARA_BIN "/nosara-worker",
      std::vector<std::string>{"--listen=127.0.0.1:0", absl::StrCat("--model_dir=", kModel),
                               "--model_name=tiny", where, "--threads=1", "--replicas=2",
                               "--slots_per_head=-1", "--store_path=ucx", "--store_patience=60s"});
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  const GenerateRequest request = MakeRequest(1500, 500, 400);
  EXPECT_THAT(Generate(*client, request).status,
              StatusIs(absl::StatusCode::kUnavailable, "no KV store is known"));
  std::unique_ptr<Program> stores[3] = {join(0), join(1), nullptr};
  Output expected;
  const absl::Time end = absl::Now() + kTimeout;
  do {
    expected = Generate(*client, request);
  } while (
      (!expected.status.ok() || StoredPages(*stores[0]) == 0 || StoredPages(*stores[1]) == 0) &&
      absl::Now() < end);
  ASSERT_OK(expected.status);

  // A third one gets its part of what is new; what is old is still found.
  stores[2] = join(2);
  for (uint32_t seed = 501; StoredPages(*stores[2]) == 0 && absl::Now() < end; ++seed) {
    ASSERT_OK(Generate(*client, MakeRequest(1000, seed, 2)).status);
  }
  EXPECT_GT(StoredPages(*stores[2]), 0u);
  const Output again = Generate(*client, request);
  ASSERT_OK(again.status);
  EXPECT_EQ(again.tokens, expected.tokens);
  EXPECT_EQ(again.finished.usage().cached_prompt_tokens(), 1472u);

  // One dies, one leaves, in the middle of streams.
  for (const int i : {0, 1}) {
    bool gone = false;
    const Output output = Generate(*client, request, [&](size_t tokens) {
      if (tokens < 20 || std::exchange(gone, true)) return true;
      if (i == 0) {
        stores[0]->Kill();
      } else {
        stores[1]->Signal(SIGTERM);
        EXPECT_EQ(stores[1]->Wait(), 0);
      }
      return true;
    });
    EXPECT_OK(output.status);
    EXPECT_EQ(output.tokens, expected.tokens);
  }
  // Without etcd everything stays as it is.
  etcd.Kill();
  const Output last = Generate(*client, request);
  EXPECT_OK(last.status);
  EXPECT_EQ(last.tokens, expected.tokens);
}
#endif

TEST_F(SystemTest, EachProgramAnswersHealthAndReflection) {
  const auto store = StartStore();
  const auto worker = StartWorker(store->address());
  const auto router = StartRouter(worker->address());
  AwaitWorkers(*Connect(*router), 1);
  for (const auto& [program, service] :
       {std::pair(store.get(), "nosara.kvstore.v1.KvStoreService"),
        std::pair(worker.get(), "nosara.worker.v1.WorkerService"),
        std::pair(router.get(), "nosara.inference.v1.InferenceService")}) {
    SCOPED_TRACE(service);
    std::string answer;
    // The router's health is told right after the worker is known.
    const absl::Time end = absl::Now() + kTimeout;
    do {
      const grpc::Status status = RawCall(program->address(), testing::kHealthCheck, "", &answer);
      ASSERT_TRUE(status.ok()) << status.error_message();
    } while (answer != testing::kServing && absl::Now() < end);
    EXPECT_EQ(answer, testing::kServing);
    const grpc::Status status =
        RawCall(program->address(), testing::kReflection, testing::kListServices, &answer);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_THAT(answer, ::testing::HasSubstr(service));
  }
}

TEST_F(SystemTest, ArenaTooSmallForOneSequenceIsSaid) {
  // Some 70 kB a page: three pages.
  const auto store = StartStore({"--arena_bytes=256KiB"});
  const auto worker = StartWorker(store->address(), {"--slots_per_head=-1", "--store_patience=1s"});
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  EXPECT_THAT(Generate(*client, MakeRequest(2000, 7, 20)).status,
              StatusIs(absl::StatusCode::kResourceExhausted, "store"));
  EXPECT_OK(Generate(*client, MakeRequest(100, 8, 20)).status);
}

TEST_F(SystemTest, CancelledRequestFreesTheWorkerAtOnce) {
  const auto store = StartStore();
  const auto worker = StartWorker(store->address());
  const auto router = StartRouter(worker->address());
  const auto client = Connect(*router);
  AwaitWorkers(*client, 1);
  const Output output =
      Generate(*client, MakeRequest(300, 9, 7000), [](size_t tokens) { return tokens < 10; });
  EXPECT_THAT(output.status, StatusIs(absl::StatusCode::kCancelled, ""));
  const absl::Time end = absl::Now() + kTimeout;
  worker::v1::GetLoadResponse load;
  do {
    load = GetLoad(*worker);
    std::this_thread::yield();
  } while (load.running_requests() > 0 && absl::Now() < end);
  EXPECT_EQ(load.running_requests(), 0u);
}

TEST_F(SystemTest, BrokenCheckpointsAreRefusedByName) {
  const auto folder =
      std::filesystem::temp_directory_path() / absl::StrCat("nosara_system_test.", getpid());
  std::filesystem::create_directories(folder);
  std::filesystem::copy(absl::StrCat(kModel, "/config.json"), folder / "config.json");
  std::ifstream in(absl::StrCat(kModel, "/model.safetensors"), std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), {});
  std::ofstream(folder / "model.safetensors", std::ios::binary)
      .write(bytes.data(), bytes.size() / 2);
  Program truncated(NOSARA_BIN "/nosara-worker",
                    {"--listen=127.0.0.1:0", absl::StrCat("--model_dir=", folder.string()),
                     "--model_name=tiny", "--stores=127.0.0.1:1"});
  EXPECT_EQ(truncated.Wait(), 1);
  EXPECT_NE(truncated.said().find("model.safetensors"), std::string::npos) << truncated.said();
  Program nowhere(NOSARA_BIN "/nosara-worker", {"--model_dir=/does/not/exist", "--model_name=x",
                                                "--stores=127.0.0.1:1", "--listen=127.0.0.1:0"});
  EXPECT_EQ(nowhere.Wait(), 1);
  EXPECT_NE(nowhere.said().find("/does/not/exist"), std::string::npos) << nowhere.said();
  Program few_slots(NOSARA_BIN "/nosara-worker",
                    {"--listen=127.0.0.1:0", absl::StrCat("--model_dir=", kModel),
                     "--model_name=tiny", "--stores=127.0.0.1:1", "--slots_per_head=3"});
  EXPECT_EQ(few_slots.Wait(), 1);
  EXPECT_NE(few_slots.said().find("slots_per_head = 3: must be 0"), std::string::npos);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace nosara
