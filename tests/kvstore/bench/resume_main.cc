// nosara-bench-resume: a sequence that goes on at a worker that never saw it, against a new prefill
// and against a load of all its keys and values.
//
// The store is in this process; its bytes come by the path that --path names.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/notification.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "kvstore/client/grpc_store_client.h"
#include "kvstore/server/kvstore_server.h"
#include "tests/kvstore/bench/bench_report.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/engine/engine.h"
#include "worker/model/checkpoint.h"

ABSL_FLAG(std::string, model_dir, "models/nosa-tiny", "Checkpoint that is run on the CPU.");
ABSL_FLAG(int, context, 8000, "Tokens of its sequence, 64 or more.");
ABSL_FLAG(int, large_context, 65536,
          "Tokens of a sequence of the 8B shape, whose pages are random and which nobody computes; "
          "0: none.");
ABSL_FLAG(int, threads, 2, "Compute threads.");
ABSL_FLAG(std::string, path, "ucx:tcp", "mapped, or ucx:<transports>.");
ABSL_FLAG(int, rounds, 3, "Resumes, of which the middle one counts; 1 or more.");
ABSL_FLAG(std::string, json, "", "File for the figures; empty: only the table.");
ABSL_FLAG(std::string, commit, "", "Commit to note there.");

namespace nosara::kvstore {
namespace {

using worker::Completion;
using worker::CpuBackend;
using worker::CpuBackendOptions;
using worker::Engine;
using worker::EngineOptions;
using worker::Request;
using worker::SampledToken;

double MsSince(absl::Time start) {
  return absl::ToDoubleMilliseconds(Clock::Real()->Now() - start);
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

absl::StatusOr<std::unique_ptr<KvStoreServer>> StartStore(uint64_t bytes) {
  KvStoreServerOptions options;
  options.arena_bytes = bytes;
  const std::string path = absl::GetFlag(FLAGS_path);
  options.ucx = path == "mapped" ? KvStoreServerOptions::Ucx::kOff : KvStoreServerOptions::Ucx::kOn;
  if (path != "mapped") options.ucx_tls = path.substr(4);
  return KvStoreServer::Create(options);
}

absl::StatusOr<std::unique_ptr<GrpcStoreClient>> Connect(const KvStoreServer& store,
                                                         const PageLayout& layout) {
  const std::string path = absl::GetFlag(FLAGS_path);
  GrpcStoreClientOptions options(layout);
  options.stores.push_back({store.address(), nullptr, {}});
  options.data_path = path == "mapped" ? DataPath::kMapped : DataPath::kUcx;
  if (path != "mapped") options.ucx_tls = path.substr(4);
  return GrpcStoreClient::Create(options);
}

/// What reading a chain took.
struct Load {
  double index_ms = 0;   // look-up and index parts
  double record_ms = 0;  // then the records of `blocks` of its blocks
};

/// Looks `keys` up, pulls the index parts, then all records of the last `blocks` blocks.
absl::StatusOr<Load> LoadChain(StoreClient& client, const std::vector<PageKey>& keys,
                               size_t blocks) {
  const PageLayout& layout = client.layout();
  Load load;
  absl::Time start = Clock::Real()->Now();
  ASSIGN_OR_RETURN(LookupResult found, Await<absl::StatusOr<LookupResult>>([&](auto done) {
                     client.Lookup(keys, std::move(done));
                   }));
  if (found.pages.size() != keys.size()) {
    return absl::DataLossError(
        absl::StrCat(found.pages.size(), " of ", keys.size(), " pages were found"));
  }
  std::vector<std::byte> prefixes(keys.size() * layout.prefix_bytes());
  std::vector<PrefixRead> reads;
  const auto prefix = [&](size_t page) {
    return absl::MakeSpan(prefixes).subspan(page * layout.prefix_bytes(), layout.prefix_bytes());
  };
  for (size_t i = 0; i < keys.size(); ++i) reads.push_back({found.pages[i], prefix(i)});
  ASSIGN_OR_RETURN(const std::vector<PageRef> pages,
                   Await<absl::StatusOr<std::vector<PageRef>>>(
                       [&](auto done) { client.ReadPrefixes(std::move(reads), std::move(done)); }));
  load.index_ms = MsSince(start);

  std::vector<std::byte> landing(blocks * layout.num_records() * layout.record_bytes());
  start = Clock::Real()->Now();
  std::vector<RecordRead> records;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t page = keys.size() - blocks + i;
    for (int r = 0; r < layout.num_records(); ++r) {
      records.push_back(
          {pages[page], r, RecordChecksum(layout, prefix(page), r),
           absl::MakeSpan(landing).subspan((i * layout.num_records() + r) * layout.record_bytes(),
                                           layout.record_bytes())});
    }
  }
  RETURN_IF_ERROR(Await<absl::Status>(
      [&](auto done) { client.ReadRecords(std::move(records), std::move(done)); }));
  load.record_ms = MsSince(start);
  client.Release(found.leases);
  return load;
}

/// Tells when the first token came, and the end.
class TimingSink final : public worker::RequestSink {
 public:
  void OnAccepted(int64_t) override {}
  void OnPrefillProgress(int64_t, int64_t) override {}
  void OnToken(const SampledToken& token) override {
    tokens.push_back(token.id);
    if (tokens.size() == 1) first_token = Clock::Real()->Now();
  }
  void OnCompleted(const Completion& how) override {
    completion = how;
    done.Notify();
  }
  void OnFailed(const absl::Status& why) override {
    status = why;
    done.Notify();
  }

  std::vector<int32_t> tokens;
  absl::Time first_token;
  Completion completion;
  absl::Status status;
  absl::Notification done;
};

struct Served {
  double first_token_ms = 0;
  std::vector<int32_t> tokens;
  Completion completion;
  PageKey root;  // of its chains
};

/// A worker of its own answers one request.
absl::StatusOr<Served> Serve(const std::shared_ptr<const worker::Checkpoint>& checkpoint,
                             const KvStoreServer& store, const PageLayout& layout,
                             const std::vector<int32_t>& prompt) {
  ASSIGN_OR_RETURN(const auto client, Connect(store, layout));
  CpuBackendOptions options;
  options.threads = absl::GetFlag(FLAGS_threads);
  options.slots_per_head = checkpoint->config().nosa.topk_blocks;
  ASSIGN_OR_RETURN(auto backend, CpuBackend::Create(checkpoint, client.get(), options));
  const PageKey root = NamespaceKey(backend->model_fingerprint(), layout.fingerprint(),
                                    absl::StrCat("theta=", checkpoint->config().rope_theta), "");
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(std::move(backend), client.get(),
                                                     Clock::Real(), EngineOptions()));
  Request request;
  request.request_id = "resume";
  request.prompt = prompt;
  request.max_tokens = 8;
  request.sampling.temperature = 0;
  const auto sink = std::make_shared<TimingSink>();
  const absl::Time start = Clock::Real()->Now();
  RETURN_IF_ERROR(engine->Submit(std::move(request), sink).status());
  sink->done.WaitForNotification();
  engine->Stop();  // after this all finished blocks are stored
  RETURN_IF_ERROR(sink->status);
  return Served{absl::ToDoubleMilliseconds(sink->first_token - start), sink->tokens,
                sink->completion, root};
}

/// The demo model: a prefill, then resumes by workers that know nothing.
absl::StatusOr<nlohmann::json> MeasureModel() {
  ASSIGN_OR_RETURN(auto opened, worker::Checkpoint::Open(absl::GetFlag(FLAGS_model_dir)));
  const std::shared_ptr<const worker::Checkpoint> checkpoint = std::move(opened);
  ASSIGN_OR_RETURN(const PageLayout layout, CpuBackend::LayoutFor(checkpoint->config()));
  const int context = absl::GetFlag(FLAGS_context);
  ASSIGN_OR_RETURN(
      const auto store,
      StartStore((static_cast<uint64_t>(context) / kBlockTokens + 64) * layout.page_bytes()));
  std::mt19937 random(7);
  std::vector<int32_t> prompt(context);
  for (int32_t& token : prompt) {
    token = 10 + static_cast<int32_t>(random() % (checkpoint->config().vocab_size - 10));
  }
  ASSIGN_OR_RETURN(const Served first, Serve(checkpoint, *store, layout, prompt));
  std::vector<double> resume_ms;
  Served resumed;
  for (int i = 0; i < absl::GetFlag(FLAGS_rounds); ++i) {
    ASSIGN_OR_RETURN(resumed, Serve(checkpoint, *store, layout, prompt));
    if (resumed.tokens != first.tokens) {
      return absl::InternalError("wrong result: the resumed sequence goes on with other tokens");
    }
    resume_ms.push_back(resumed.first_token_ms);
  }
  const size_t pages = resumed.completion.cached_prompt_tokens / kBlockTokens;
  std::vector<PageKey> keys = ChainKeys(first.root, prompt);
  keys.resize(pages);
  ASSIGN_OR_RETURN(const auto client, Connect(*store, layout));
  std::vector<double> load_ms;
  for (int i = 0; i < absl::GetFlag(FLAGS_rounds); ++i) {
    ASSIGN_OR_RETURN(const Load load, LoadChain(*client, keys, pages));
    load_ms.push_back(load.index_ms + load.record_ms);
  }
  return nlohmann::json{
      {"context", context},
      {"model", absl::GetFlag(FLAGS_model_dir)},
      {"cached_tokens", resumed.completion.cached_prompt_tokens},
      {"index_bytes", pages * layout.prefix_bytes()},
      {"record_bytes", resumed.completion.cache.bytes_fetched},
      {"bytes_moved", pages * layout.prefix_bytes() + resumed.completion.cache.bytes_fetched},
      {"kv_bytes", pages * layout.num_records() * layout.record_bytes()},
      {"resume_ms", Median(resume_ms)},
      {"full_load_ms", Median(load_ms)},
      {"prefill_ms", first.first_token_ms}};
}

/// The 8B shape: what moves, by random pages.
absl::StatusOr<nlohmann::json> MeasureLarge() {
  ASSIGN_OR_RETURN(const PageLayout layout, PageLayout::Create(32, 2, 128, 2));
  const size_t pages = static_cast<size_t>(absl::GetFlag(FLAGS_large_context)) / kBlockTokens;
  constexpr size_t kSelected = 64;  // blocks that a step attends to
  ASSIGN_OR_RETURN(const auto store, StartStore((pages + 16) * layout.page_bytes()));
  ASSIGN_OR_RETURN(const auto client, Connect(*store, layout));
  std::mt19937_64 random(1);
  const PageKey root = NamespaceKey("bench", layout.fingerprint(), "", "");
  std::vector<int32_t> tokens(pages * kBlockTokens);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 1000);
  const std::vector<PageKey> keys = ChainKeys(root, tokens);
  std::vector<std::byte> bytes(layout.page_bytes());
  for (size_t at = 0; at + 8 <= bytes.size(); at += 8) {
    const uint64_t value = random();
    std::memcpy(bytes.data() + at, &value, 8);
  }
  for (size_t i = 0; i < pages; ++i) {
    const ChainPosition position{i, keys[i - i % kGroupBlocks], i == 0 ? root : keys[i - 1], root};
    ASSIGN_OR_RETURN(const WriteResult written, Await<absl::StatusOr<WriteResult>>([&](auto done) {
                       client->Write(position, {{keys[i], kBlockTokens, absl::MakeSpan(bytes)}},
                                     std::move(done));
                     }));
    client->Release(written.leases);
  }
  std::vector<double> index_ms, first_ms, full_ms;
  for (int i = 0; i < absl::GetFlag(FLAGS_rounds); ++i) {
    ASSIGN_OR_RETURN(const Load first, LoadChain(*client, keys, std::min(kSelected, pages)));
    index_ms.push_back(first.index_ms);
    first_ms.push_back(first.index_ms + first.record_ms);
    ASSIGN_OR_RETURN(const Load full, LoadChain(*client, keys, pages));
    full_ms.push_back(full.index_ms + full.record_ms);
  }
  const size_t index_bytes = pages * layout.prefix_bytes();
  const size_t first_bytes =
      std::min(kSelected, pages) * layout.num_records() * layout.record_bytes();
  return nlohmann::json{{"context", absl::GetFlag(FLAGS_large_context)},
                        {"model", "8B shape, random pages"},
                        {"index_bytes", index_bytes},
                        {"record_bytes", first_bytes},
                        {"bytes_moved", index_bytes},
                        {"kv_bytes", pages * layout.num_records() * layout.record_bytes()},
                        {"resume_ms", Median(index_ms)},
                        {"resume_and_first_step_ms", Median(first_ms)},
                        {"full_load_ms", Median(full_ms)}};
}

absl::Status Run(const std::string& command) {
  RETURN_IF_ERROR(InitLogging("nosara-bench-resume", "warning"));
  const std::string path = absl::GetFlag(FLAGS_path);
  if (path != "mapped" && path.substr(0, 4) != "ucx:") {
    return absl::InvalidArgumentError(
        absl::StrCat("path = '", path, "': must be mapped or ucx:<transports>"));
  }
  if (absl::GetFlag(FLAGS_context) < kBlockTokens || absl::GetFlag(FLAGS_rounds) < 1 ||
      absl::GetFlag(FLAGS_large_context) < 0) {
    return absl::InvalidArgumentError(
        "context must be 64 or more, rounds 1 or more, large_context 0 or more");
  }
  std::vector<nlohmann::json> rows;
  const auto add = [&](nlohmann::json row) {
    const double moved = row["bytes_moved"].get<double>();
    const double all = row["kv_bytes"].get<double>();
    const double ms = row["resume_ms"].get<double>();
    std::printf(
        "%s, %d tokens: %.1f MB moved of %.1f (%.1fx fewer), resumed after %.1f ms; all of "
        "it after %.1f ms (%.1fx)",
        row["model"].get<std::string>().c_str(), row["context"].get<int>(), moved / 1e6, all / 1e6,
        all / moved, ms, row["full_load_ms"].get<double>(), row["full_load_ms"].get<double>() / ms);
    if (row.contains("prefill_ms")) {
      std::printf("; new prefill %.0f ms (%.0fx)", row["prefill_ms"].get<double>(),
                  row["prefill_ms"].get<double>() / ms);
    }
    if (row.contains("resume_and_first_step_ms")) {
      std::printf("; with the records of the first step %.1f ms",
                  row["resume_and_first_step_ms"].get<double>());
    }
    std::printf("\n");
    row["where"] = absl::StrCat("one machine, ", path);
    row["commit"] = absl::GetFlag(FLAGS_commit);
    row["command"] = command;
    rows.push_back(std::move(row));
  };
  ASSIGN_OR_RETURN(nlohmann::json model, MeasureModel());
  add(std::move(model));
  if (absl::GetFlag(FLAGS_large_context) >= kBlockTokens) {
    ASSIGN_OR_RETURN(nlohmann::json large, MeasureLarge());
    add(std::move(large));
  }
  return WriteRows(absl::GetFlag(FLAGS_json), rows);
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  const std::string command =
      absl::StrCat("nosara-bench-resume ", absl::StrJoin(argv + 1, argv + argc, " "));
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-resume",
       "Measures what a resumed sequence moves and how long it takes, against a new prefill and a "
       "load of all of it.",
       "tests/kvstore/bench/resume_main.cc"},
      [&command] { return nosara::kvstore::Run(command); });
}
