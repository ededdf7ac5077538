#include "client/generate.h"

#include <unistd.h>

#include <fstream>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "client/client.h"
#include "client/sampling_flags.h"
#include "client/stream_printer.h"

namespace nosara::client {
namespace {

constexpr absl::string_view kUsage =
    "nosara generate: continues a text, which streams to stdout.\n"
    "  nosara generate --prompt=\"Once upon a time\" --max_tokens=100\n"
    "  nosara generate --prompt_file=story.txt --temperature=0\n"
    "  cat story.txt | nosara generate\n"
    "Progress and statistics go to stderr.\n";

struct Flags {
  std::string address = std::string(kDefaultAddress);
  std::string prompt;
  std::string prompt_file;
  SamplingFlags sampling;
  bool ignore_eos = false;
  std::optional<uint32_t> logprobs;
  std::string request_id;
  absl::Duration timeout = absl::InfiniteDuration();
  bool json = false;
  bool progress = isatty(STDERR_FILENO) != 0;
  bool statistics = true;
  std::string token_ids_file;
};

absl::StatusOr<std::string> Prompt(const Flags& flags) {
  if (!flags.prompt.empty() && !flags.prompt_file.empty()) {
    return absl::InvalidArgumentError("--prompt and --prompt_file: give one of them");
  }
  if (!flags.prompt.empty()) return flags.prompt;
  if (!flags.prompt_file.empty()) return ReadText(flags.prompt_file);
  if (isatty(STDIN_FILENO) != 0) {
    return absl::InvalidArgumentError(
        "no prompt: give --prompt=TEXT, --prompt_file=FILE, or text on stdin");
  }
  return ReadText("-");
}

absl::Status WriteTokenIds(const std::string& path, const std::vector<uint32_t>& ids) {
  std::ofstream file(path);
  file << absl::StrJoin(ids, " ") << "\n";
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("--token_ids_file: cannot write '", path, "'"));
}

absl::Status Generate(const Flags& flags, const std::string& prompt) {
  inference::v1::GenerateRequest request;
  request.set_text(prompt);
  flags.sampling.Fill(&request);
  request.set_ignore_eos(flags.ignore_eos);
  if (flags.logprobs) request.set_top_logprobs(*flags.logprobs);
  request.set_request_id(flags.request_id);

  ASSIGN_OR_RETURN(const auto client, Client::Connect(flags.address));
  StreamPrinter::Options options;
  options.progress = flags.progress;
  options.statistics = flags.statistics;
  options.json = flags.json;
  options.logprobs = flags.logprobs.has_value();
  StreamPrinter printer(options, &std::cout, &std::cerr);
  const absl::Status status = client->Generate(
      request,
      [&printer](const inference::v1::GenerateResponse& event) {
        printer.Print(event);
        // A closed pipe: nobody reads the text any more.
        return std::cout ? Continue::kYes : Continue::kNo;
      },
      flags.timeout);
  printer.End();
  if (!flags.token_ids_file.empty()) {
    RETURN_IF_ERROR(WriteTokenIds(flags.token_ids_file, printer.token_ids()));
  }
  return status;
}

int Run(const std::vector<std::string>& args) {
  Flags flags;
  FlagSet set;
  AddAddressFlag(&set, &flags.address);
  set.Add("prompt", &flags.prompt, "the text to continue");
  set.Add("prompt_file", &flags.prompt_file, "a file with the text to continue; -: stdin");
  flags.sampling.AddTo(&set);
  set.Add("ignore_eos", &flags.ignore_eos, "go on after the model's end token");
  set.Add("logprobs", &flags.logprobs,
          "print each token's log-probability, and this many best ones, 0 to 20");
  set.Add("request_id", &flags.request_id, "names the request in the router's and worker's logs");
  set.Add("timeout", &flags.timeout, "give up after this time, e.g. 30s");
  set.Add("json", &flags.json, "print each event of the stream as one line of JSON");
  set.Add("progress", &flags.progress,
          "show how far the prompt is read; default: when stderr is a terminal");
  set.Add("statistics", &flags.statistics, "print times and cache statistics at the end");
  set.Add("token_ids_file", &flags.token_ids_file, "write the ids of the generated tokens there");
  if (const auto exit = ParseFlags(set, kUsage, args, 0, nullptr)) return *exit;
  const absl::StatusOr<std::string> prompt = Prompt(flags);
  if (!prompt.ok()) {
    Report(prompt.status());
    return kExitUsage;
  }
  return Report(Generate(flags, *prompt));
}

}  // namespace

Command GenerateCommand() { return {"generate", "continue a text", Run}; }

}  // namespace nosara::client
