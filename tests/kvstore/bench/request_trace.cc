#include "tests/kvstore/bench/request_trace.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "kvstore/api/page_key.h"

namespace nosara::kvstore {
namespace {

constexpr uint64_t kPagesPerBlock = kTraceBlockTokens / kBlockTokens;
constexpr int64_t kNoBlock = -1;

struct Line {
  int64_t timestamp_ms = 0;
  uint64_t input_tokens = 0;
  uint64_t output_tokens = 0;
  std::vector<int64_t> blocks;
};

absl::StatusOr<Line> ParseLine(const std::string& text) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("is no JSON object");
  for (const char* field : {"timestamp", "input_length", "output_length"}) {
    if (!json.contains(field) || !json[field].is_number_unsigned()) {
      return absl::InvalidArgumentError(absl::StrCat(field, ": must be a number, 0 or more"));
    }
  }
  Line line;
  line.timestamp_ms = json["timestamp"].get<int64_t>();
  line.input_tokens = json["input_length"].get<uint64_t>();
  line.output_tokens = json["output_length"].get<uint64_t>();
  if (!json.contains("hash_ids") || !json["hash_ids"].is_array()) {
    return absl::InvalidArgumentError("hash_ids: must be a list of numbers");
  }
  for (const nlohmann::json& id : json["hash_ids"]) {
    if (!id.is_number_unsigned()) {
      return absl::InvalidArgumentError("hash_ids: must be a list of numbers, 0 or more");
    }
    line.blocks.push_back(id.get<int64_t>());
  }
  const uint64_t expected = (line.input_tokens + kTraceBlockTokens - 1) / kTraceBlockTokens;
  if (line.blocks.size() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("hash_ids: has ", line.blocks.size(),
                     " elements for input_length = ", line.input_tokens, ", must have ", expected));
  }
  return line;
}

}  // namespace

absl::StatusOr<RequestTrace> ReadMooncakeTrace(std::istream& lines, absl::string_view name) {
  RequestTrace trace;
  struct Block {
    int64_t before = kNoBlock;
    uint32_t first_page = 0;
  };
  absl::flat_hash_map<int64_t, Block> blocks;
  std::string text;
  int64_t first_ms = 0;
  for (int number = 1; std::getline(lines, text); ++number) {
    if (text.empty()) continue;
    const auto fail = [&](absl::string_view why) {
      return absl::InvalidArgumentError(absl::StrCat(name, ":", number, ": ", why));
    };
    const absl::StatusOr<Line> line = ParseLine(text);
    if (!line.ok()) return fail(line.status().message());
    if (trace.requests.empty()) first_ms = line->timestamp_ms;
    TraceRequest request;
    request.arrival = absl::Milliseconds(line->timestamp_ms - first_ms);
    if (!trace.requests.empty() && request.arrival < trace.requests.back().arrival) {
      return fail("timestamp: is before that of the line before");
    }
    request.input_tokens = line->input_tokens;
    request.output_tokens = line->output_tokens;
    int64_t before = kNoBlock;
    for (const int64_t id : line->blocks) {
      const auto [block, is_new] = blocks.try_emplace(id, Block{before, trace.distinct_pages});
      if (is_new) trace.distinct_pages += kPagesPerBlock;
      if (block->second.before != before) {
        return fail(absl::StrCat("hash_ids: block ", id, " is behind block ", before,
                                 ", before it was behind block ", block->second.before));
      }
      for (uint64_t i = 0; i < kPagesPerBlock; ++i) {
        request.pages.push_back(block->second.first_page + static_cast<uint32_t>(i));
      }
      before = id;
    }
    request.pages.resize(request.input_tokens / kBlockTokens);
    trace.requests.push_back(std::move(request));
  }
  if (trace.requests.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": has no requests"));
  }
  return trace;
}

RequestTrace MakeScanTrace(const ScanTraceOptions& options) {
  std::mt19937_64 random(options.seed);
  std::vector<double> weights;
  for (int i = 0; i < options.chains; ++i) {
    weights.push_back(std::pow(i + 1, -options.zipf_exponent));
  }
  std::discrete_distribution<int> popular(weights.begin(), weights.end());
  // So many of the requests are documents that they have their part of the pages.
  const double documents = options.scan_share / options.scan_pages;
  const double others = (1 - options.scan_share) / options.chain_pages;
  std::bernoulli_distribution is_document(documents / (documents + others));

  RequestTrace trace;
  const auto own_pages = options.chain_pages - options.shared_pages;
  const auto first_own = options.prefixes * options.shared_pages;
  trace.distinct_pages = static_cast<uint32_t>(first_own + options.chains * own_pages);
  for (int i = 0; i < options.requests; ++i) {
    TraceRequest request;
    request.arrival = i * options.interval;
    request.output_tokens = options.output_tokens;
    if (is_document(random)) {
      for (int page = 0; page < options.scan_pages; ++page) {
        request.pages.push_back(trace.distinct_pages++);
      }
    } else {
      const int chain = popular(random);
      const int prefix = chain % options.prefixes;
      for (int page = 0; page < options.shared_pages; ++page) {
        request.pages.push_back(static_cast<uint32_t>(prefix * options.shared_pages + page));
      }
      for (int page = 0; page < own_pages; ++page) {
        request.pages.push_back(static_cast<uint32_t>(first_own + chain * own_pages + page));
      }
    }
    request.input_tokens = request.pages.size() * kBlockTokens;
    trace.requests.push_back(std::move(request));
  }
  return trace;
}

}  // namespace nosara::kvstore
