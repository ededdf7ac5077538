#include "client/stream_printer.h"

#include <google/protobuf/util/json_util.h>

#include <ostream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace nosara::client {
namespace {

using inference::v1::CacheStats;
using inference::v1::GenerateResponse;

std::string JsonLine(const GenerateResponse& event) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(event, &json, options);
  return status.ok() ? json + "\n" : absl::StrCat("{\"error\": \"", status.ToString(), "\"}\n");
}

std::string Bytes(uint64_t bytes) {
  if (bytes < 10'000) return absl::StrCat(bytes, " bytes");
  if (bytes < 10'000'000) return absl::StrFormat("%.1f kB", bytes / 1e3);
  if (bytes < 10'000'000'000) return absl::StrFormat("%.1f MB", bytes / 1e6);
  return absl::StrFormat("%.1f GB", bytes / 1e9);
}

std::string CacheLine(const CacheStats& cache) {
  std::string paths;
  const auto add = [&paths](uint64_t records, const char* path) {
    if (records == 0) return;
    absl::StrAppend(&paths, paths.empty() ? "" : ", ", records, " ", path);
  };
  add(cache.records_by_in_process(), "within the process");
  add(cache.records_by_mapped(), "through the mapped arena");
  add(cache.records_by_ucx(), "by UCX");
  return absl::StrCat("KV records: ", cache.records_selected(), " selected, ",
                      cache.records_resident(), " resident, ", cache.records_fetched(),
                      " fetched (", Bytes(cache.bytes_fetched()), paths.empty() ? "" : "; ", paths,
                      "); ", cache.pages_written(), " pages written");
}

std::string Reason(const inference::v1::Finished& finished) {
  switch (finished.reason()) {
    case inference::v1::FINISH_REASON_STOP:
      return finished.stop_text().empty()
                 ? "end token"
                 : absl::StrCat("stop text \"", absl::CEscape(finished.stop_text()), "\"");
    case inference::v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "unknown reason";
  }
}

}  // namespace

void StreamPrinter::Print(const GenerateResponse& event) {
  if (options_.json) *out_ << JsonLine(event) << std::flush;
  switch (event.event_case()) {
    case GenerateResponse::kPrefillProgress:
      if (options_.progress) {
        const auto& progress = event.prefill_progress();
        *err_ << absl::StrFormat("\rreading the prompt: %d of %d tokens", progress.done_tokens(),
                                 progress.total_tokens())
              << std::flush;
        progress_shown_ = true;
      }
      break;
    case GenerateResponse::kChunk: {
      const auto& chunk = event.chunk();
      ClearProgress();
      if (!options_.json) *out_ << chunk.text() << std::flush;
      text_ += chunk.text();
      token_ids_.insert(token_ids_.end(), chunk.token_ids().begin(), chunk.token_ids().end());
      if (options_.logprobs) {
        logprobs_.insert(logprobs_.end(), chunk.logprobs().begin(), chunk.logprobs().end());
      }
      break;
    }
    case GenerateResponse::kFinished:
      finished_ = event.finished();
      break;
    default:
      break;
  }
}

void StreamPrinter::ClearProgress() {
  if (progress_shown_) *err_ << "\r\033[K" << std::flush;
  progress_shown_ = false;
}

void StreamPrinter::End() {
  ClearProgress();
  if (!options_.json && !text_.empty() && text_.back() != '\n') *out_ << "\n";
  if (!options_.json) {
    for (const auto& token : logprobs_) {
      *out_ << absl::StrFormat("%8.4f  %6d  \"%s\"", token.logprob(), token.token_id(),
                               absl::Utf8SafeCEscape(token.text()));
      for (const auto& top : token.top()) {
        *out_ << absl::StrFormat("  \"%s\" %.4f", absl::Utf8SafeCEscape(top.text()), top.logprob());
      }
      *out_ << "\n";
    }
  }
  *out_ << std::flush;
  if (options_.statistics && finished_.has_usage()) PrintStatistics(finished_);
}

void StreamPrinter::PrintStatistics(const inference::v1::Finished& finished) {
  const auto& usage = finished.usage();
  const double first = static_cast<double>(finished.time_to_first_token_us()) / 1e6;
  const double decode = static_cast<double>(finished.total_time_us()) / 1e6 - first;
  *err_ << absl::StrFormat("%d prompt tokens (%d from the store), first token after %.2f s\n",
                           usage.prompt_tokens(), usage.cached_prompt_tokens(), first);
  *err_ << usage.completion_tokens() << " tokens";
  // The first token is the prefill's.
  if (usage.completion_tokens() > 1 && decode > 0) {
    *err_ << absl::StrFormat(", %.1f tokens/s", (usage.completion_tokens() - 1) / decode);
  }
  *err_ << "; ended by: " << Reason(finished) << "\n";
  if (finished.has_cache()) *err_ << CacheLine(finished.cache()) << "\n";
}

}  // namespace nosara::client
