// Mixed load while stores are killed and stopped, again and again: no stream may notice.
//
//   chaos_test --faults=1000 --seed=7 --json=docs/benchmarks/chaos.json
//
// Three KV stores with two copies of each page, two workers, a router, all processes of their own.
// Every stream is compared with its undisturbed run. By default a few faults, as a test.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "client/client.h"
#include "nosara/kvstore/v1/kvstore.grpc.pb.h"
#include "nosara/worker/v1/worker.grpc.pb.h"
#include "tests/program.h"
#include "tests/status_matchers.h"

ABSL_FLAG(int32_t, faults, 12, "stores killed or stopped, 1 or more");
ABSL_FLAG(int32_t, clients, 4, "streams at a time, 1 or more");
ABSL_FLAG(uint32_t, seed, 1, "of the faults and of the load");
ABSL_FLAG(std::string, json, "", "file for the report; empty: none");
ABSL_FLAG(std::string, commit, "", "commit to note in the report");

namespace nosara {
namespace {

using client::Client;
using client::Continue;
using inference::v1::GenerateRequest;
using inference::v1::GenerateResponse;
using ::nosara::testing::Program;

constexpr char kModel[] = "tests/testdata/tiny-bf16";
constexpr char kTokenizer[] = "tests/testdata/tokenizer";
constexpr int kStores = 3;
constexpr int kPrompts = 16;
constexpr absl::Duration kStreamTimeout = absl::Seconds(180);
constexpr absl::Duration kQuietTimeout = absl::Seconds(60);

std::string g_command;

/// What the report says.
struct Counts {
  std::atomic<int> kills{0}, stops{0}, streams{0}, cancelled{0}, wrong_tokens{0},
      repeated_tokens{0}, lost_streams{0}, crashes{0};
};

struct Case {
  GenerateRequest request;
  std::vector<uint32_t> expected;
};

GenerateRequest MakeRequest(std::mt19937& random, int index) {
  GenerateRequest request;
  const int tokens = 100 + static_cast<int>(random() % 2200);
  uint32_t topic = 0;
  for (int i = 0; i < tokens; ++i) {
    if (i % 37 == 0) topic = random() % 400;
    request.mutable_token_ids()->add_ids((topic + random() % 12) % 416);
  }
  request.set_max_tokens(60 + random() % 300);
  request.set_ignore_eos(true);
  request.mutable_sampling()->set_temperature(index % 2 == 0 ? 0 : 0.8);
  request.mutable_sampling()->set_seed(index);
  return request;
}

/// The tokens of a stream; `most` of them at most, then it is cancelled.
absl::Status Generate(Client& client, const GenerateRequest& request, size_t most,
                      std::vector<uint32_t>& tokens) {
  return client.Generate(
      request,
      [&](const GenerateResponse& event) {
        if (!event.has_chunk()) return Continue::kYes;
        for (uint32_t id : event.chunk().token_ids()) tokens.push_back(id);
        return tokens.size() < most ? Continue::kYes : Continue::kNo;
      },
      kStreamTimeout);
}

class ChaosTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < kStores; ++i) {
      stores_.push_back(StartStore("127.0.0.1:0"));
      addresses_.push_back(stores_.back()->address());
      ASSERT_NE(addresses_.back(), "");
    }
    // One reads by UCX, one from mapped memory.
    for (const char* path : {"ucx", "mapped"}) {
      workers_.push_back(std::make_unique<Program>(
          NOSARA_BIN "/nosara-worker",
          std::vector<std::string>{
              "--listen=127.0.0.1:0", absl::StrCat("--model_dir=", kModel), "--model_name=tiny",
              absl::StrCat("--stores=", absl::StrJoin(addresses_, ",")), "--replicas=2",
              "--threads=1", "--slots_per_head=-1", "--store_patience=120s",
              "--max_recoveries=1000", absl::StrCat("--store_path=", path)}));
      ASSERT_NE(workers_.back()->address(), "");
    }
    router_ = std::make_unique<Program>(
        NOSARA_BIN "/nosara-router",
        std::vector<std::string>{
            "--listen=127.0.0.1:0",
            absl::StrCat("--workers=", workers_[0]->address(), ",", workers_[1]->address()),
            absl::StrCat("--model=tiny=", kTokenizer), "--poll_interval=50ms",
            "--policy=round_robin"});
    ASSERT_NE(router_->address(), "");
    const absl::Time end = absl::Now() + kQuietTimeout;
    const auto client = *Client::Connect(router_->address());
    while (true) {
      const auto models = client->ListModels();
      if (models.ok() && models->size() == 1 && (*models)[0].ready_workers() == 2) break;
      ASSERT_LT(absl::Now(), end) << "the router does not see the workers";
      std::this_thread::yield();
    }
  }

  static std::unique_ptr<Program> StartStore(const std::string& listen) {
    return std::make_unique<Program>(
        NOSARA_BIN "/nosara-kvstore",
        std::vector<std::string>{absl::StrCat("--listen=", listen), "--arena_bytes=64MiB"});
  }

  /// One store after the other dies and comes back empty, or stands still for a while.
  void Strike(int faults, std::mt19937 random, const absl::Notification& stop) {
    for (int i = 0; i < faults; ++i) {
      if (stop.WaitForNotificationWithTimeout(absl::Milliseconds(20 + random() % 500))) return;
      const size_t victim = random() % kStores;
      if (random() % 3 != 0) {
        stores_[victim]->Signal(SIGKILL);
        if (stores_[victim]->Wait() != -SIGKILL) ++counts_.crashes;
        stores_[victim] = StartStore(addresses_[victim]);
        if (stores_[victim]->address() != addresses_[victim]) {
          ADD_FAILURE() << "store " << victim << " did not come back";
          return;
        }
        ++counts_.kills;
      } else {
        stores_[victim]->Stop();
        stop.WaitForNotificationWithTimeout(absl::Milliseconds(10 + random() % 1500));
        stores_[victim]->Signal(SIGCONT);
        ++counts_.stops;
      }
      if ((i + 1) % 50 == 0) {
        std::printf("%d faults, %d streams, %d lost, %d wrong tokens\n", i + 1,
                    counts_.streams.load(), counts_.lost_streams.load(),
                    counts_.wrong_tokens.load());
        std::fflush(stdout);
      }
    }
  }

  /// Streams until `stop`, each compared with what it must be.
  void Load(const std::vector<Case>& cases, std::mt19937 random, const absl::Notification& stop) {
    const auto client = *Client::Connect(router_->address());
    while (!stop.HasBeenNotified()) {
      const Case& one = cases[random() % cases.size()];
      const bool cancel = random() % 8 == 0;
      const size_t most = cancel ? 1 + random() % one.expected.size() : one.expected.size() + 1;
      std::vector<uint32_t> tokens;
      const absl::Status status = Generate(*client, one.request, most, tokens);
      ++counts_.streams;
      size_t same = 0;
      while (same < std::min(tokens.size(), one.expected.size()) &&
             tokens[same] == one.expected[same]) {
        ++same;
      }
      if (tokens.size() > one.expected.size()) {
        counts_.repeated_tokens += static_cast<int>(tokens.size() - one.expected.size());
      }
      counts_.wrong_tokens += static_cast<int>(std::min(tokens.size(), one.expected.size()) - same);
      if (cancel) {
        ++counts_.cancelled;
      } else if (!status.ok() || tokens.size() < one.expected.size()) {
        ++counts_.lost_streams;
        ADD_FAILURE() << "a stream ended after " << tokens.size() << " of " << one.expected.size()
                      << " tokens: " << status;
      }
    }
  }

  /// Leases and slots of all stores that nothing should hold any more.
  uint64_t HeldPages() {
    uint64_t held = 0;
    for (const auto& store : stores_) {
      const auto stub = kvstore::v1::KvStoreService::NewStub(
          grpc::CreateChannel(store->address(), grpc::InsecureChannelCredentials()));
      grpc::ClientContext context;
      kvstore::v1::GetStatsResponse stats;
      EXPECT_TRUE(stub->GetStats(&context, {}, &stats).ok());
      held += stats.leases() + stats.pages_leased() + stats.slots_reserved() +
              stats.slots_quarantined();
    }
    return held;
  }
  /// Requests and tokens that workers still hold.
  uint64_t HeldSlots(worker::v1::GetLoadResponse* sum) {
    uint64_t held = 0;
    sum->Clear();
    for (const auto& worker : workers_) {
      const auto stub = worker::v1::WorkerService::NewStub(
          grpc::CreateChannel(worker->address(), grpc::InsecureChannelCredentials()));
      grpc::ClientContext context;
      worker::v1::GetLoadResponse load;
      EXPECT_TRUE(stub->GetLoad(&context, {}, &load).ok());
      held += load.running_requests() + load.queued_requests() + load.running_tokens();
      sum->set_recoveries(sum->recoveries() + load.recoveries());
      sum->set_recomputed_tokens(sum->recomputed_tokens() + load.recomputed_tokens());
      sum->set_reads_failed_over(sum->reads_failed_over() + load.reads_failed_over());
      sum->set_pages_discarded(sum->pages_discarded() + load.pages_discarded());
    }
    return held;
  }

  std::vector<std::unique_ptr<Program>> stores_;
  std::vector<std::string> addresses_;
  std::vector<std::unique_ptr<Program>> workers_;
  std::unique_ptr<Program> router_;
  Counts counts_;
};

TEST_F(ChaosTest, KilledAndStoppedStoresChangeNoToken) {
  const uint32_t seed = absl::GetFlag(FLAGS_seed);
  std::mt19937 random(seed);
  std::vector<Case> cases(kPrompts);
  const auto client = *Client::Connect(router_->address());
  for (int i = 0; i < kPrompts; ++i) {
    cases[i].request = MakeRequest(random, i);
    ASSERT_OK(Generate(*client, cases[i].request, SIZE_MAX, cases[i].expected));
    ASSERT_EQ(cases[i].expected.size(), cases[i].request.max_tokens());
  }
  const absl::Time start = absl::Now();
  absl::Notification stop_load, stop_faults;
  std::vector<std::thread> clients;
  for (int i = 0; i < absl::GetFlag(FLAGS_clients); ++i) {
    clients.emplace_back([&, generator = std::mt19937(random())] {
      Load(cases, generator, stop_load);
      if (HasFailure() && !stop_faults.HasBeenNotified()) {
        static std::atomic_flag once = ATOMIC_FLAG_INIT;
        if (!once.test_and_set()) stop_faults.Notify();
      }
    });
  }
  Strike(absl::GetFlag(FLAGS_faults), std::mt19937(random()), stop_faults);
  stop_load.Notify();
  for (std::thread& thread : clients) thread.join();

  // Quiet: leases of clients that died have expired, nothing is held.
  worker::v1::GetLoadResponse load;
  uint64_t leaked_pages = 1, leaked_slots = 1;
  for (const absl::Time end = absl::Now() + kQuietTimeout; absl::Now() < end;) {
    leaked_slots = HeldSlots(&load);
    leaked_pages = HeldPages();
    if (leaked_pages + leaked_slots == 0) break;
    absl::Notification never;
    never.WaitForNotificationWithTimeout(absl::Milliseconds(100));
  }
  for (auto* programs : {&workers_, &stores_}) {
    for (const auto& program : *programs) {
      program->Signal(SIGTERM);
      if (program->Wait() != 0) ++counts_.crashes;
    }
  }
  EXPECT_EQ(counts_.wrong_tokens, 0);
  EXPECT_EQ(counts_.repeated_tokens, 0);
  EXPECT_EQ(counts_.lost_streams, 0);
  EXPECT_EQ(counts_.crashes, 0);
  EXPECT_EQ(leaked_pages, 0u);
  EXPECT_EQ(leaked_slots, 0u);
  EXPECT_EQ(load.pages_discarded(), 0u) << "no page was ever damaged";
  EXPECT_EQ(counts_.kills + counts_.stops, absl::GetFlag(FLAGS_faults));
  EXPECT_GT(counts_.streams, 0);
  const std::string report = absl::StrFormat(
      "{\"faults\": %d, \"kills\": %d, \"stops\": %d, \"streams\": %d, \"cancelled\": %d, "
      "\"wrong_tokens\": %d, \"lost_streams\": %d, \"repeated_tokens\": %d, \"leaked_pages\": %d, "
      "\"leaked_slots\": %d, \"crashes\": %d, \"recoveries\": %d, \"recomputed_tokens\": %d, "
      "\"reads_failed_over\": %d, \"seconds\": %.0f, \"stores\": %d, \"replicas\": 2, "
      "\"seed\": %d, \"commit\": \"%s\", \"command\": \"%s\"}",
      counts_.kills + counts_.stops, counts_.kills.load(), counts_.stops.load(),
      counts_.streams.load(), counts_.cancelled.load(), counts_.wrong_tokens.load(),
      counts_.lost_streams.load(), counts_.repeated_tokens.load(), leaked_pages, leaked_slots,
      counts_.crashes.load(), load.recoveries(), load.recomputed_tokens(), load.reads_failed_over(),
      absl::ToDoubleSeconds(absl::Now() - start), kStores, seed, absl::GetFlag(FLAGS_commit),
      g_command);
  std::printf("%s\n", report.c_str());
  if (absl::GetFlag(FLAGS_json).empty()) return;
  std::ofstream file(absl::GetFlag(FLAGS_json));
  file << "[\n  " << report << "\n]\n";
  file.close();
  EXPECT_TRUE(file.good()) << "json: cannot write '" << absl::GetFlag(FLAGS_json) << "'";
}

}  // namespace
}  // namespace nosara

int main(int argc, char** argv) {
  nosara::g_command = absl::StrCat("chaos_test ", absl::StrJoin(argv + 1, argv + argc, " "));
  ::testing::InitGoogleTest(&argc, argv);
  absl::ParseCommandLine(argc, argv);
  return RUN_ALL_TESTS();
}
