// nosara-bench-eviction: hit ratio of a store by its size and by what it evicts, over a recorded
// trace of requests and over one with many documents that are read once.
//
// The requests go through the index of nosara-kvstore: each looks its chain up, reserves and
// commits what is missing and holds its leases while it generates. No bytes are moved.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "kvstore/server/page_index.h"
#include "tests/kvstore/bench/request_trace.h"

ABSL_FLAG(std::string, trace, "",
          "Trace in the format of kvcache-ai/Mooncake, JSON lines, not compressed; - reads stdin. "
          "Empty: only the made-up one.");
ABSL_FLAG(std::vector<std::string>, capacities,
          std::vector<std::string>({"1000", "3000", "10000", "30000", "100000"}),
          "Sizes of the store for the trace, in blocks of 512 tokens, 1 to 10000000.");
ABSL_FLAG(std::vector<std::string>, scan_capacities,
          std::vector<std::string>({"1000", "2000", "4000", "8000", "16000"}),
          "Sizes of the store for the made-up trace. Its chains that come again have 6000 blocks.");
ABSL_FLAG(absl::Duration, token_time, absl::Milliseconds(20),
          "How long a request holds its leases for each token that it generates.");
ABSL_FLAG(uint64_t, seed, 1, "Seed of the made-up trace.");
ABSL_FLAG(std::string, commit, "", "Commit of this build, for the JSON entries.");
ABSL_FLAG(std::string, json, "", "File for the figures; empty: only the table.");

namespace nosara::kvstore {
namespace {

constexpr uint64_t kPagesPerBlock = kTraceBlockTokens / kBlockTokens;

PageKey KeyOf(uint32_t page) {
  PageKey key;
  for (int i = 0; i < 4; ++i) key.bytes[i] = static_cast<uint8_t>(page >> (8 * i));
  key.bytes[15] = 1;  // none is all zeros: that is the key before all chains
  return key;
}

struct Result {
  uint64_t pages = 0;
  uint64_t pages_hit = 0;
  uint64_t tokens = 0;
  uint64_t tokens_hit = 0;
  uint64_t evictions = 0;
  uint64_t refused = 0;  // requests that found no room for what was missing
  absl::Duration time;   // of the replay

  double block_hit_ratio() const { return static_cast<double>(pages_hit) / pages; }
  double token_hit_ratio() const { return static_cast<double>(tokens_hit) / tokens; }
};

absl::StatusOr<Result> Replay(const RequestTrace& trace, EvictionKind eviction, uint64_t slots,
                              absl::Duration token_time) {
  PageIndex::Options options;
  options.num_slots = slots;
  options.eviction = eviction;
  // Leases are released below, not left to expire.
  options.lease_ttl = absl::Hours(24 * 365);
  PageIndex index(options);
  Result result;
  using LeaseEnd = std::pair<absl::Time, uint64_t>;
  std::priority_queue<LeaseEnd, std::vector<LeaseEnd>, std::greater<>> ends;
  std::vector<PageKey> keys;
  std::vector<PageIndex::Page> reserved;
  const absl::Time started = Clock::Real()->Now();
  for (const TraceRequest& request : trace.requests) {
    const absl::Time now = absl::UnixEpoch() + request.arrival;
    const absl::Time end = now + request.output_tokens * token_time;
    for (; !ends.empty() && ends.top().first <= now; ends.pop()) {
      index.Release({&ends.top().second, 1}, now);
    }
    result.pages += request.pages.size();
    result.tokens += request.input_tokens;
    if (request.pages.empty()) continue;
    keys.clear();
    for (const uint32_t page : request.pages) keys.push_back(KeyOf(page));
    const PageIndex::LookupResult found = index.Lookup(keys, now);
    result.pages_hit += found.pages.size();
    result.tokens_hit += found.pages.size() * kBlockTokens;
    if (found.lease_id != 0) ends.push({end, found.lease_id});
    const size_t known = found.pages.size();
    if (known == keys.size()) continue;
    const auto added = index.Reserve(absl::MakeConstSpan(keys).subspan(known),
                                     known == 0 ? PageKey() : keys[known - 1], now);
    if (absl::IsResourceExhausted(added.status())) {
      ++result.refused;
      continue;
    }
    RETURN_IF_ERROR(added.status());
    reserved.clear();
    for (const PageIndex::ReservedPage& page : added->pages) {
      if (page.state != PageIndex::ReserveState::kReserved) {
        return absl::InternalError("a page that was not found is not free to be written");
      }
      reserved.push_back(page.page);
    }
    RETURN_IF_ERROR(index.Commit(added->lease_id, reserved, now));
    ends.push({end, added->lease_id});
  }
  result.time = Clock::Real()->Now() - started;
  result.evictions = index.stats().pages_evicted;
  RETURN_IF_ERROR(index.CheckIntegrity());
  return result;
}

/// What a store without end would hit, counted without an index.
uint64_t PagesSeenBefore(const RequestTrace& trace) {
  std::vector<bool> seen(trace.distinct_pages, false);
  uint64_t count = 0;
  for (const TraceRequest& request : trace.requests) {
    bool prefix = true;
    for (const uint32_t page : request.pages) {
      prefix = prefix && seen[page];
      count += prefix;
      seen[page] = true;
    }
  }
  return count;
}

absl::StatusOr<std::vector<uint64_t>> ParseCapacities(const char* flag,
                                                      const std::vector<std::string>& texts) {
  std::vector<uint64_t> capacities;
  for (const std::string& text : texts) {
    uint64_t blocks = 0;
    if (!absl::SimpleAtoi(text, &blocks) || blocks < 1 || blocks > 10'000'000) {
      return absl::InvalidArgumentError(
          absl::StrCat(flag, " = '", text, "': must be 1 to 10000000 blocks"));
    }
    capacities.push_back(blocks);
  }
  return capacities;
}

nlohmann::json Entry(const char* trace, const char* policy, uint64_t blocks, const Result& result) {
  return {{"trace", trace},
          {"policy", policy},
          {"capacity_blocks", blocks},
          {"block_hit_ratio", result.block_hit_ratio()},
          {"token_hit_ratio", result.token_hit_ratio()},
          {"pages_evicted", result.evictions},
          {"requests_refused", result.refused}};
}

absl::Status Measure(const char* name, const RequestTrace& trace,
                     const std::vector<uint64_t>& capacities, absl::Duration token_time,
                     nlohmann::json& entries) {
  ASSIGN_OR_RETURN(const Result bound,
                   Replay(trace, EvictionKind::kLru, trace.distinct_pages, token_time));
  if (bound.pages_hit != PagesSeenBefore(trace) || bound.evictions != 0) {
    return absl::InternalError(absl::StrCat(
        name, ": a store with room for everything hits ", bound.pages_hit, " pages, evicting ",
        bound.evictions, "; it must hit ", PagesSeenBefore(trace), " and evict none"));
  }
  std::printf("%s: %zu requests, %llu pages asked for, %u distinct\n", name, trace.requests.size(),
              static_cast<unsigned long long>(bound.pages), trace.distinct_pages);
  std::printf("  %10s  %-8s  %9s  %9s  %12s  %8s  %8s\n", "blocks", "policy", "blocks hit",
              "tokens hit", "evictions", "refused", "seconds");
  const auto print = [](const std::string& blocks, absl::string_view policy, const Result& r) {
    std::printf("  %10s  %-8.*s  %8.2f %%  %8.2f %%  %12llu  %8llu  %8.2f\n", blocks.c_str(),
                static_cast<int>(policy.size()), policy.data(), 100 * r.block_hit_ratio(),
                100 * r.token_hit_ratio(), static_cast<unsigned long long>(r.evictions),
                static_cast<unsigned long long>(r.refused), absl::ToDoubleSeconds(r.time));
  };
  for (const uint64_t blocks : capacities) {
    for (const EvictionKind kind : {EvictionKind::kLru, EvictionKind::kS3Fifo}) {
      ASSIGN_OR_RETURN(const Result result,
                       Replay(trace, kind, blocks * kPagesPerBlock, token_time));
      if (result.pages_hit > bound.pages_hit) {
        return absl::InternalError(absl::StrCat(name, ": hits more than the bound"));
      }
      print(absl::StrCat(blocks), EvictionKindName(kind), result);
      entries.push_back(Entry(name, std::string(EvictionKindName(kind)).c_str(), blocks, result));
    }
  }
  print("no limit", "", bound);
  entries.push_back(Entry(name, "infinite", 0, bound));
  return absl::OkStatus();
}

absl::Status Run() {
  ASSIGN_OR_RETURN(const std::vector<uint64_t> capacities,
                   ParseCapacities("capacities", absl::GetFlag(FLAGS_capacities)));
  ASSIGN_OR_RETURN(const std::vector<uint64_t> scan_capacities,
                   ParseCapacities("scan_capacities", absl::GetFlag(FLAGS_scan_capacities)));
  const absl::Duration token_time = absl::GetFlag(FLAGS_token_time);
  if (token_time < absl::ZeroDuration() || token_time > absl::Seconds(10)) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_time = ", absl::FormatDuration(token_time), ": must be 0s to 10s"));
  }
  nlohmann::json entries = nlohmann::json::array();
  const std::string path = absl::GetFlag(FLAGS_trace);
  if (!path.empty()) {
    std::ifstream file;
    if (path != "-") {
      file.open(path);
      if (!file) return absl::NotFoundError(absl::StrCat("trace '", path, "': cannot be read"));
    }
    ASSIGN_OR_RETURN(const RequestTrace trace,
                     ReadMooncakeTrace(path == "-" ? std::cin : file, path));
    RETURN_IF_ERROR(Measure("conversation", trace, capacities, token_time, entries));
  }
  ScanTraceOptions scan;
  scan.seed = absl::GetFlag(FLAGS_seed);
  RETURN_IF_ERROR(Measure("scan", MakeScanTrace(scan), scan_capacities, token_time, entries));
  const std::string json = absl::GetFlag(FLAGS_json);
  if (!json.empty()) {
    for (nlohmann::json& entry : entries) {
      entry["commit"] = absl::GetFlag(FLAGS_commit);
      entry["seed"] = scan.seed;
      entry["token_time_ms"] = absl::ToInt64Milliseconds(token_time);
    }
    std::ofstream out(json);
    out << entries.dump(1) << "\n";
    if (!out.flush()) return absl::UnavailableError(absl::StrCat("cannot write ", json));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace nosara::kvstore

int main(int argc, char** argv) {
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-eviction",
       "Hit ratio of a store by its size and eviction policy.\n"
       "  gunzip -c conversation_trace.jsonl.gz | nosara-bench-eviction --trace=-",
       "tests/kvstore/bench/eviction_main.cc"},
      nosara::kvstore::Run);
}
