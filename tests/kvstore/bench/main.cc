// nosara-bench-store: how fast records come out of a store, over each path, against the bare
// transport in the same run; what verifying them costs; how fast pages go in; and how many lookups
// a store answers.
//
// Store and client are threads of this process: the arena, the control plane and the UCX target are
// those of nosara-kvstore. Records are read in random order; each is verified, as always.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "kvstore/client/control_client.h"
#include "kvstore/client/grpc_store_client.h"
#include "kvstore/server/kvstore_server.h"
#include "tests/kvstore/bench/bench_report.h"
#include "tests/kvstore/bench/ucx_bare_loop.h"

ABSL_FLAG(absl::Duration, duration, absl::Seconds(2), "How long each figure is measured.");
ABSL_FLAG(int, depth, 32, "Reads in flight, 1 to 1024.");
ABSL_FLAG(int, pages, 48, "Pages of the 8B shape (2.2 MB each) in the store, 1 to 4096.");
ABSL_FLAG(std::vector<std::string>, paths,
          std::vector<std::string>({"in-process", "mapped", "ucx:tcp", "ucx:sm,self"}),
          "Paths to measure: in-process, mapped, ucx:<transports>; separate them by ';' inside UCX "
          "lists as in ucx:sm;self.");
ABSL_FLAG(std::string, json, "", "File for the figures; empty: only the table.");
ABSL_FLAG(std::string, commit, "", "Commit to note there.");

namespace nosara::kvstore {
namespace {

struct Settings {
  absl::Duration duration;
  size_t depth = 0;
  int pages = 0;
};

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
      const absl::Time start = Clock::Real()->Now();
      auto written = Await<absl::StatusOr<WriteResult>>([&](auto done) {
        client.Write(position, {{pages->keys[i], kBlockTokens, absl::MakeSpan(bytes)}},
                     std::move(done));
      });
      if (!written.ok()) return written.status();
      pages->write_time += Clock::Real()->Now() - start;
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
  absl::Duration write_time;        // of all, one after the other
};

struct ReadFigures {
  double reads_per_s = 0;
  double p50_us = 0;  // of a call of `batch` reads
  double p99_us = 0;
  size_t batch = 0;
};

/// Reads random records with `depth` in flight, one batch of `depth / 4` (at least one) a call.
absl::StatusOr<ReadFigures> ClientReads(StoreClient& client, const Pages& pages,
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
    std::vector<double> call_us;
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
    client.ReadRecords(
        std::move(reads), [&, i, posted = Clock::Real()->Now()](absl::Status status) {
          bool again;
          {
            absl::MutexLock lock(&state.mu);
            state.call_us.push_back(absl::ToDoubleMicroseconds(Clock::Real()->Now() - posted));
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
  ReadFigures figures;
  figures.reads_per_s =
      static_cast<double>(state.done) / absl::ToDoubleSeconds(Clock::Real()->Now() - start);
  std::sort(state.call_us.begin(), state.call_us.end());
  figures.p50_us = state.call_us[state.call_us.size() / 2];
  figures.p99_us = state.call_us[state.call_us.size() * 99 / 100];
  figures.batch = batch;
  return figures;
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

/// Seconds that verifying one record takes once it has landed: of copies that are verified, less
/// those of copies that are not, the middle of several rounds.
double VerifySeconds(const PageLayout& layout, const KvStoreServer& server,
                     const std::vector<uint64_t>& offsets) {
  std::vector<std::byte> landing(layout.record_bytes());
  std::vector<double> differences;
  uint64_t sum = 0;
  for (int round = 0; round < 9; ++round) {
    double seconds[2];
    for (const bool verify : {false, true}) {
      const absl::Time start = Clock::Real()->Now();
      for (const uint64_t offset : offsets) {
        std::memcpy(landing.data(), server.arena().data() + offset, landing.size());
        if (verify) sum ^= PageChecksum(PageKey{}, offset, 0, landing);
      }
      seconds[verify] = absl::ToDoubleSeconds(Clock::Real()->Now() - start) / offsets.size();
    }
    differences.push_back(seconds[1] - seconds[0]);
  }
  // Keeps the compiler from dropping the loop.
  const std::atomic<uint64_t> sink(sum);
  (void)sink.load();
  std::nth_element(differences.begin(), differences.begin() + 4, differences.end());
  return std::max(0.0, differences[4]);
}

double CpuSeconds() {
  rusage usage;
  CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
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
  ASSIGN_OR_RETURN(const ReadFigures reads, ClientReads(*client, *pages, settings));
  const double verify = VerifySeconds(layout, *server, offsets);
  const double gigabytes = static_cast<double>(layout.record_bytes()) / 1e9;
  return nlohmann::json{
      {"transport", path},
      {"record_bytes", layout.record_bytes()},
      {"depth", settings.depth},
      {"reads_per_s", reads.reads_per_s},
      {"gb_per_s", reads.reads_per_s * gigabytes},
      {"bare", is_ucx ? "ucp_get loop" : "memcpy loop"},
      {"bare_gb_per_s", bare * gigabytes},
      {is_ucx ? "fraction_of_bare_ucx" : "fraction_of_bare_copy", reads.reads_per_s / bare},
      {"reads_per_call", reads.batch},
      {"call_p50_us", reads.p50_us},
      {"call_p99_us", reads.p99_us},
      {"put_gb_per_s", 1e-9 * static_cast<double>(layout.page_bytes()) * settings.pages /
                           absl::ToDoubleSeconds(pages->write_time)},
      {"verify_cost", verify * reads.reads_per_s}};
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
  const double cpu_start = CpuSeconds();
  const absl::Time start = Clock::Real()->Now();
  ASSIGN_OR_RETURN(const double chains, Lookups(*client, pages->keys, settings));
  const double cores =
      (CpuSeconds() - cpu_start) / absl::ToDoubleSeconds(Clock::Real()->Now() - start);
  ASSIGN_OR_RETURN(const double single, Lookups(*client, {pages->keys[0]}, settings));
  // Server and client together: what the client takes counts against the store.
  return nlohmann::json{{"transport", absl::StrCat("lookup:", path)},
                        {"keys_per_call", kKeys},
                        {"calls_per_s", chains},
                        {"keys_per_s", chains * kKeys},
                        {"cores", cores},
                        {"lookups_per_s_core", chains * kKeys / cores},
                        {"single_key_calls_per_s", single}};
}

absl::Status Run(const std::string& command) {
  RETURN_IF_ERROR(InitLogging("nosara-bench-store", "warning"));
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
  std::vector<nlohmann::json> all;
  const auto add = [&all, &command](nlohmann::json row) {
    row["commit"] = absl::GetFlag(FLAGS_commit);
    row["command"] = command;
    all.push_back(std::move(row));
  };
  std::printf("%-14s %10s %6s %10s %8s %8s %8s %7s %9s\n", "path", "records/s", "GB/s", "bare GB/s",
              "of bare", "p50 us", "p99 us", "verify", "put GB/s");
  for (std::string path : absl::GetFlag(FLAGS_paths)) {
    for (char& c : path) c = c == ';' ? ',' : c;
    ASSIGN_OR_RETURN(const nlohmann::json row, Measure(path, settings));
    const double rate = row["gb_per_s"].get<double>();
    const double bare = row["bare_gb_per_s"].get<double>();
    std::printf("%-14s %10.0f %6.2f %10.2f %7.0f%% %8.0f %8.0f %6.1f%% %9.2f\n", path.c_str(),
                row["reads_per_s"].get<double>(), rate, bare, 100 * rate / bare,
                row["call_p50_us"].get<double>(), row["call_p99_us"].get<double>(),
                100 * row["verify_cost"].get<double>(), row["put_gb_per_s"].get<double>());
    add(row);
  }
  for (const std::string channel : {"in-process", "tcp"}) {
    ASSIGN_OR_RETURN(const nlohmann::json row, MeasureLookups(channel, settings));
    std::printf(
        "lookups over %-10s %8.0f calls/s of one key; %8.0f/s of 128 keys: %.0f keys/s on "
        "%.1f cores\n",
        channel.c_str(), row["single_key_calls_per_s"].get<double>(),
        row["calls_per_s"].get<double>(), row["keys_per_s"].get<double>(),
        row["cores"].get<double>());
    add(row);
  }
  return WriteRows(absl::GetFlag(FLAGS_json), all);
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  const std::string command =
      absl::StrCat("nosara-bench-store ", absl::StrJoin(argv + 1, argv + argc, " "));
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-store", "Measures reads and lookups of a KV store in this process.",
       "tests/kvstore/bench/main.cc"},
      [&command] { return nosara::kvstore::Run(command); });
}
