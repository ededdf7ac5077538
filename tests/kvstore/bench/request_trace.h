// Requests to replay against a store: a recorded trace, or one made up from a seed.
#pragma once

#include <cstdint>
#include <istream>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace nosara::kvstore {

/// One request: the chain of full pages of its prompt.
struct TraceRequest {
  absl::Duration arrival;  // since the first request
  /// Numbers of the pages; equal numbers are equal pages, with equal chains before them.
  std::vector<uint32_t> pages;
  uint64_t input_tokens = 0;
  uint64_t output_tokens = 0;
};

/// In order of arrival.
struct RequestTrace {
  std::vector<TraceRequest> requests;
  uint32_t distinct_pages = 0;  // page numbers are below this
};

/// Tokens of one block of a Mooncake trace.
inline constexpr int kTraceBlockTokens = 512;

/// Reads a trace in the format of kvcache-ai/Mooncake: JSON lines with timestamp (ms), input_length
/// and output_length (tokens) and hash_ids (one for each begun 512 tokens of input; equal ids mean
/// equal prefixes). Each block becomes the full pages of 64 tokens that the input has in it. What a
/// request generates has no ids in such a trace, and so no pages.
/// INVALID_ARGUMENT names the line; also when a block occurs behind two different ones.
absl::StatusOr<RequestTrace> ReadMooncakeTrace(std::istream& lines, absl::string_view name);

/// A store's bad day. A fixed set of chains is asked for again and again, by a Zipf distribution;
/// in between, documents pass that are read once.
struct ScanTraceOptions {
  uint64_t seed = 1;
  int requests = 20000;
  int chains = 2000;
  int chain_pages = 32;  // of which the first `shared_pages` are one of `prefixes`
  int shared_pages = 8;
  int prefixes = 10;
  double zipf_exponent = 0.9;
  int scan_pages = 512;
  /// Part of all pages asked for that belongs to documents.
  double scan_share = 0.75;
  absl::Duration interval = absl::Milliseconds(300);
  uint64_t output_tokens = 300;
};
RequestTrace MakeScanTrace(const ScanTraceOptions& options);

}  // namespace nosara::kvstore
