// nosara-bench-kvstore: how fast records come out of a store, over each path, against the bare
// transport in the same run; and how many lookups a store answers.
//
// Store and client are threads of this process: the arena, the control plane and the UCX target are
// those of nosara-kvstore. Records are read in random order; each is verified, as always.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "kvstore/client/control_client.h"
#include "kvstore/client/grpc_store_client.h"
#include "kvstore/server/kvstore_server.h"
#include "tests/kvstore/bench/ucx_bare_loop.h"

ABSL_FLAG(absl::Duration, duration, absl::Seconds(2), "How long each figure is measured.");
ABSL_FLAG(int, depth, 32, "Reads in flight, 1 to 1024.");
ABSL_FLAG(int, pages, 48, "Pages of the 8B shape (2.2 MB each) in the store, 1 to 4096.");
ABSL_FLAG(std::vector<std::string>, paths,
          std::vector<std::string>({"in-process", "mapped", "ucx:tcp", "ucx:sm,self"}),
          "Paths to measure: in-process, mapped, ucx:<transports>; separate them by ';' inside UCX "
          "lists as in ucx:sm;self.");
ABSL_FLAG(std::string, json, "", "File for the figures; empty: only the table.");

namespace nosara::kvstore {
namespace {

struct Settings {
  absl::Duration duration;
  size_t depth = 0;
  int pages = 0;
};

template <typename T, typename Start>
T Await(Start start) {
  absl::Notification done;
  std::optional<T> result;
  start([&](T value) {
    result.emplace(std::move(value));
    done.Notify();
  });
  done.WaitForNotification();
  return *std::move(result);
}

/// Pages of random bytes, written to the store through `client`.
class Pages final {
 public:
  static absl::StatusOr<std::unique_ptr<Pages>> Write(StoreClient& client, int count) {
    auto pages = std::make_unique<Pages>();
    const PageLayout& layout = client.layout();
    std::mt19937_64 random(1);
    const PageKey root = NamespaceKey("bench", layout.fingerprint(), "", "");
    std::vector<int32_t> tokens(static_cast<size_t>(count) * kBlockTokens);
    for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 1000);
    pages->keys = ChainKeys(root, tokens);
    std::vector<std::byte> bytes(layout.page_bytes());
    for (int i = 0; i < count; ++i) {
      for (size_t at = 0; at + 8 <= bytes.size(); at += 8) {
        const uint64_t value = random();
        std::memcpy(bytes.data() + at, &value, 8);
      }
      const size_t block = static_cast<size_t>(i);
      const ChainPosition position{block, pages->keys[block - block % kGroupBlocks],
                                   i == 0 ? root : pages->keys[i - 1], root};
      auto written = Await<absl::StatusOr<WriteResult>>([&](auto done) {
        client.Write(position, {{pages->keys[i], kBlockTokens, absl::MakeSpan(bytes)}},
                     std::move(done));
      });
      if (!written.ok()) return written.status();
      pages->refs.push_back(written->pages[0]);
      for (int record = 0; record < layout.num_records(); ++record) {
        pages->checksums.push_back(RecordChecksum(layout, bytes, record));
      }
    }
    return pages;
  }

  std::vector<PageKey> keys;
  std::vector<PageRef> refs;
  std::vector<uint64_t> checksums;  // page by page
};

/// Reads random records with `depth` in flight, one batch of `depth / 4` (at least one) a call.
absl::StatusOr<double> ClientReads(StoreClient& client, const Pages& pages,
                                   const Settings& settings) {
  const PageLayout& layout = client.layout();
  const size_t batch = std::max<size_t>(1, settings.depth / 4);
  const size_t batches = settings.depth / batch + 1;  // one more than fits: the window stays full
  struct State {
    absl::Mutex mu;
    size_t running = 0;
    uint64_t done = 0;
    absl::Status status;
    std::mt19937_64 random{2};
  } state;
  std::vector<std::vector<std::byte>> landings(batches);
  for (auto& landing : landings) landing.resize(batch * layout.record_bytes());
  const absl::Time start = Clock::Real()->Now();
  std::function<void(size_t)> post = [&](size_t i) {
    std::vector<RecordRead> reads;
    reads.reserve(batch);
    {
      absl::MutexLock lock(&state.mu);
      for (size_t n = 0; n < batch; ++n) {
        const size_t which = state.random() % pages.checksums.size();
        reads.push_back({pages.refs[which / layout.num_records()],
                         static_cast<int>(which % layout.num_records()), pages.checksums[which],
                         absl::MakeSpan(landings[i])
                             .subspan(n * layout.record_bytes(), layout.record_bytes())});
      }
    }
    client.ReadRecords(std::move(reads), [&, i](absl::Status status) {
      bool again;
      {
        absl::MutexLock lock(&state.mu);
        if (state.status.ok()) state.status = status;
        state.done += batch;
        again = state.status.ok() && Clock::Real()->Now() - start < settings.duration;
        if (!again) --state.running;
      }
      if (again) post(i);
    });
  };
  state.running = batches;
  for (size_t i = 0; i < batches; ++i) post(i);
  absl::MutexLock lock(&state.mu);
  const auto idle = [&] { return state.running == 0; };
  state.mu.Await(absl::Condition(&idle));
  if (!state.status.ok()) return state.status;
  return static_cast<double>(state.done) / absl::ToDoubleSeconds(Clock::Real()->Now() - start);
}

/// Copies of random records out of the arena by memcpy, on one thread.
double BareCopies(const KvStoreServer& server, const PageLayout& layout,
                  const std::vector<uint64_t>& offsets, const Settings& settings) {
  std::vector<std::byte> landing(settings.depth * layout.record_bytes());
  uint64_t done = 0;
  const absl::Time start = Clock::Real()->Now();
  absl::Time now = start;
  while (now - start < settings.duration) {
    for (size_t i = 0; i < settings.depth; ++i) {
      std::memcpy(landing.data() + i * layout.record_bytes(),
                  server.arena().data() + offsets[done % offsets.size()], layout.record_bytes());
      ++done;
    }
    now = Clock::Real()->Now();
  }
  return static_cast<double>(done) / absl::ToDoubleSeconds(now - start);
}

/// Lookups of the whole chain, 64 in flight, each released.
absl::StatusOr<double> Lookups(StoreClient& client, const std::vector<PageKey>& keys,
                               const Settings& settings) {
  struct State {
    absl::Mutex mu;
    size_t running = 64;
    uint64_t done = 0;
    absl::Status status;
  } state;
  const absl::Time start = Clock::Real()->Now();
  std::function<void()> post = [&] {
    client.Lookup(keys, [&](absl::StatusOr<LookupResult> result) {
      if (result.ok()) client.Release(result->leases);
      bool again;
      {
        absl::MutexLock lock(&state.mu);
        if (state.status.ok()) state.status = result.status();
        if (state.status.ok() && result->pages.size() != keys.size()) {
          state.status = absl::DataLossError("lookup found too few pages");
        }
        ++state.done;
        again = state.status.ok() && Clock::Real()->Now() - start < settings.duration;
        if (!again) --state.running;
      }
      if (again) post();
    });
  };
  for (int i = 0; i < 64; ++i) post();
  absl::MutexLock lock(&state.mu);
  const auto idle = [&] { return state.running == 0; };
  state.mu.Await(absl::Condition(&idle));
  if (!state.status.ok()) return state.status;
  return static_cast<double>(state.done) / absl::ToDoubleSeconds(Clock::Real()->Now() - start);
}

/// Seconds that verifying one record takes.
double VerifySeconds(const PageLayout& layout, const KvStoreServer& server,
                     const std::vector<uint64_t>& offsets) {
  uint64_t sum = 0, count = 0;
  const absl::Time start = Clock::Real()->Now();
  while (Clock::Real()->Now() - start < absl::Milliseconds(300)) {
    sum ^= PageChecksum(
        PageKey{}, count, 0,
        server.arena().subspan(offsets[count % offsets.size()], layout.record_bytes()));
    ++count;
  }
  // Keeps the compiler from dropping the loop.
  std::atomic<uint64_t> sink(sum);
  return 0.3 / static_cast<double>(count) + 0 * static_cast<double>(sink.load() & 1);
}

/// What the bare loop needs to know of the store.
absl::StatusOr<ArenaAddress> UcxArena(const std::string& address) {
  ControlClient control(address, nullptr);
  ASSIGN_OR_RETURN(const v1::GetInfoResponse info,
                   Await<absl::StatusOr<v1::GetInfoResponse>>(
                       [&](auto done) { control.GetInfo({}, std::move(done)); }));
  ArenaAddress arena;
  arena.ucx_address = info.ucx_address();
  arena.ucx_rkey = info.ucx_rkey();
  arena.remote_address = info.remote_address();
  return arena;
}

absl::StatusOr<nlohmann::json> Measure(const std::string& path, const Settings& settings) {
  ASSIGN_OR_RETURN(const PageLayout layout, PageLayout::Create(32, 2, 128, 2));
  const bool is_ucx = path.substr(0, 4) == "ucx:";
  KvStoreServerOptions server_options;
  server_options.arena_bytes = static_cast<uint64_t>(settings.pages) * layout.page_bytes();
  server_options.ucx = is_ucx ? KvStoreServerOptions::Ucx::kOn : KvStoreServerOptions::Ucx::kOff;
  GrpcStoreClientOptions options(layout);
  options.window = settings.depth;
  if (is_ucx) {
    options.data_path = DataPath::kUcx;
    options.ucx_tls = path.substr(4);
    server_options.ucx_tls = options.ucx_tls;
  } else if (path == "in-process") {
    options.data_path = DataPath::kInProcess;
  } else if (path == "mapped") {
    options.data_path = DataPath::kMapped;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("path '", path, "': must be in-process, mapped or ucx:<transports>"));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<KvStoreServer> server,
                   KvStoreServer::Create(server_options));
  options.stores.push_back({server->address(), nullptr, {}});
  if (path == "in-process") {
    options.stores[0].channel = server->InProcessChannel();
    options.stores[0].in_process_arena = server->arena();
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<GrpcStoreClient> client, GrpcStoreClient::Create(options));
  ASSIGN_OR_RETURN(const std::unique_ptr<Pages> pages, Pages::Write(*client, settings.pages));

  std::vector<uint64_t> offsets;
  std::mt19937_64 random(3);
  for (int i = 0; i < 4096; ++i) {
    offsets.push_back(random() % settings.pages * layout.page_bytes() +
                      layout.record_offset(static_cast<int>(random() % layout.num_records())));
  }
  double bare = 0;
  if (is_ucx) {
    ASSIGN_OR_RETURN(const ArenaAddress arena, UcxArena(server->address()));
    ASSIGN_OR_RETURN(bare, BareUcxGets(arena, options.ucx_tls, layout.record_bytes(), offsets,
                                       settings.depth, settings.duration));
  } else {
    bare = BareCopies(*server, layout, offsets, settings);
  }
  ASSIGN_OR_RETURN(const double reads, ClientReads(*client, *pages, settings));
  const double verify = VerifySeconds(layout, *server, offsets);
  const double gigabytes = static_cast<double>(layout.record_bytes()) / 1e9;
  return nlohmann::json{{"path", path},
                        {"record_bytes", layout.record_bytes()},
                        {"depth", settings.depth},
                        {"reads_per_s", reads},
                        {"gb_per_s", reads * gigabytes},
                        {"bare", is_ucx ? "ucp_get loop" : "memcpy loop"},
                        {"bare_gb_per_s", bare * gigabytes},
                        {"fraction_of_bare", reads / bare},
                        {"verify_cost", verify * reads}};
}

absl::StatusOr<nlohmann::json> MeasureLookups(const std::string& path, const Settings& settings) {
  ASSIGN_OR_RETURN(const PageLayout layout, PageLayout::Create(1, 1, 16, 2));
  KvStoreServerOptions server_options;
  server_options.arena_bytes = 256 * layout.page_bytes();
  server_options.ucx = KvStoreServerOptions::Ucx::kOff;
  ASSIGN_OR_RETURN(const std::unique_ptr<KvStoreServer> server,
                   KvStoreServer::Create(server_options));
  GrpcStoreClientOptions options(layout);
  options.stores.push_back({server->address(), nullptr, {}});
  if (path == "in-process") options.stores[0].channel = server->InProcessChannel();
  ASSIGN_OR_RETURN(const std::unique_ptr<GrpcStoreClient> client, GrpcStoreClient::Create(options));
  constexpr int kKeys = 128;  // a prompt of 8K tokens
  ASSIGN_OR_RETURN(const std::unique_ptr<Pages> pages, Pages::Write(*client, kKeys));
  ASSIGN_OR_RETURN(const double chains, Lookups(*client, pages->keys, settings));
  ASSIGN_OR_RETURN(const double single, Lookups(*client, {pages->keys[0]}, settings));
  return nlohmann::json{{"channel", path},
                        {"chains_of_128_keys_per_s", chains},
                        {"keys_per_s", chains * kKeys},
                        {"single_key_lookups_per_s", single}};
}

absl::Status Run() {
  RETURN_IF_ERROR(InitLogging("nosara-bench-kvstore", "warning"));
  Settings settings;
  settings.duration = absl::GetFlag(FLAGS_duration);
  if (absl::GetFlag(FLAGS_depth) < 1 || absl::GetFlag(FLAGS_depth) > 1024) {
    return absl::InvalidArgumentError("--depth: must be 1 to 1024");
  }
  if (absl::GetFlag(FLAGS_pages) < 1 || absl::GetFlag(FLAGS_pages) > 4096) {
    return absl::InvalidArgumentError("--pages: must be 1 to 4096");
  }
  settings.depth = static_cast<size_t>(absl::GetFlag(FLAGS_depth));
  settings.pages = absl::GetFlag(FLAGS_pages);
  nlohmann::json all;
  std::printf("%-14s %12s %8s %10s %10s %8s\n", "path", "records/s", "GB/s", "bare GB/s", "of bare",
              "verify");
  for (std::string path : absl::GetFlag(FLAGS_paths)) {
    for (char& c : path) c = c == ';' ? ',' : c;
    ASSIGN_OR_RETURN(const nlohmann::json row, Measure(path, settings));
    std::printf("%-14s %12.0f %8.2f %10.2f %9.0f%% %7.1f%%\n", path.c_str(),
                row["reads_per_s"].get<double>(), row["gb_per_s"].get<double>(),
                row["bare_gb_per_s"].get<double>(), 100 * row["fraction_of_bare"].get<double>(),
                100 * row["verify_cost"].get<double>());
    all["reads"].push_back(row);
  }
  for (const std::string channel : {"in-process", "tcp"}) {
    ASSIGN_OR_RETURN(const nlohmann::json row, MeasureLookups(channel, settings));
    std::printf("lookups over %-10s %8.0f/s of one key; %8.0f/s of 128 keys = %.0f keys/s\n",
                channel.c_str(), row["single_key_lookups_per_s"].get<double>(),
                row["chains_of_128_keys_per_s"].get<double>(), row["keys_per_s"].get<double>());
    all["lookups"].push_back(row);
  }
  if (const std::string file = absl::GetFlag(FLAGS_json); !file.empty()) {
    std::ofstream out(file);
    out << all.dump(2) << "\n";
    out.close();
    if (!out) return absl::UnavailableError(absl::StrCat("--json: cannot write ", file));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-kvstore", "Measures reads and lookups of a KV store in this process.",
       "tests/kvstore/bench/main.cc"},
      nosara::kvstore::Run);
}
