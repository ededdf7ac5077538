// nosara-bench-cpu: prefill and decode speed of the CPU backend, one stream.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "worker/backend/cpu/cpu_backend.h"

ABSL_FLAG(std::string, model_dir, "models/nosa-tiny", "folder of the checkpoint");
ABSL_FLAG(int32_t, context, 8192, "tokens of the prompt");
ABSL_FLAG(int32_t, decode_tokens, 128, "tokens decoded behind it, 1 or more");
ABSL_FLAG(int32_t, threads, 2, "compute threads");
ABSL_FLAG(int32_t, chunk_tokens, 256, "prefill chunk, tokens");
ABSL_FLAG(std::string, attention, "nosa", "nosa, infllmv2 or full");
ABSL_FLAG(std::string, json, "", "file for the figures; empty: none");
ABSL_FLAG(std::string, commit, "", "commit to note in the figures");

namespace nosara::worker {
namespace {

/// Stretches of tokens around changing topics, so that blocks differ; no text needs to be shipped.
std::vector<int32_t> MakePrompt(int tokens, int vocab) {
  std::mt19937 random(7);
  std::vector<int32_t> prompt;
  int topic = 0;
  for (int i = 0; i < tokens; ++i) {
    if (i % 53 == 0) topic = static_cast<int>(random() % vocab);
    prompt.push_back(static_cast<int32_t>((topic + random() % 40) % vocab));
  }
  return prompt;
}

std::string MachineName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

absl::Status Run(const std::string& command) {
  ASSIGN_OR_RETURN(std::shared_ptr<const Checkpoint> checkpoint,
                   Checkpoint::Open(absl::GetFlag(FLAGS_model_dir)));
  const ModelConfig& config = checkpoint->config();
  const int context = absl::GetFlag(FLAGS_context);
  const int decode_tokens = absl::GetFlag(FLAGS_decode_tokens);
  const int chunk = absl::GetFlag(FLAGS_chunk_tokens);
  if (context < 1 || decode_tokens < 1 || chunk < 1 ||
      context + decode_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(
        absl::StrCat("context, decode_tokens and chunk_tokens must be positive, context + "
                     "decode_tokens at most ",
                     config.max_position_embeddings));
  }
  CpuBackendOptions options;
  options.threads = absl::GetFlag(FLAGS_threads);
  options.max_unstored_blocks = (context + decode_tokens) / 64 + 2;
  const std::string policy = absl::GetFlag(FLAGS_attention);
  if (policy == "infllmv2") {
    options.policy = AttentionPolicy::kInfLlmV2;
  } else if (policy == "full") {
    options.policy = AttentionPolicy::kFull;
  } else if (policy != "nosa") {
    return absl::InvalidArgumentError(
        absl::StrCat("attention = '", policy, "': must be nosa, infllmv2 or full"));
  }
  ASSIGN_OR_RETURN(const auto backend, CpuBackend::Create(checkpoint, nullptr, options));

  const bool progress = isatty(STDERR_FILENO) != 0;
  std::vector<std::vector<float>> logits;
  const auto feed = [&](SequenceId id, absl::Span<const int32_t> tokens) {
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const StepItem item = {id, tokens.subspan(begin, chunk), std::nullopt};
      const absl::Status status = backend->Forward({item}, &logits)[0].status;
      if (!status.ok()) return status;
      if (progress) {
        std::fprintf(stderr, "\rprefill %zu of %zu tokens", std::min(begin + chunk, tokens.size()),
                     tokens.size());
      }
    }
    if (progress) std::fprintf(stderr, "\n");
    return absl::OkStatus();
  };
  std::vector<int32_t> tokens = MakePrompt(context, config.vocab_size);
  const SequenceId id{1};
  RETURN_IF_ERROR(backend->AddSequence(id, context + decode_tokens));
  auto start = std::chrono::steady_clock::now();
  RETURN_IF_ERROR(feed(id, tokens));
  const double prefill_s = SecondsSince(start);

  std::vector<double> step_s;
  for (int i = 0; i < decode_tokens; ++i) {
    const auto best = std::max_element(logits[0].begin(), logits[0].end());
    tokens.push_back(static_cast<int32_t>(best - logits[0].begin()));
    const StepItem item = {id, absl::MakeConstSpan(tokens).last(1), std::nullopt};
    start = std::chrono::steady_clock::now();
    const absl::Status status = backend->Forward({item}, &logits)[0].status;
    step_s.push_back(SecondsSince(start));
    RETURN_IF_ERROR(status);
  }
  const std::vector<float> decoded = logits[0];
  std::sort(step_s.begin(), step_s.end());
  const double median_s = step_s[step_s.size() / 2];

  // Figures of a wrong result are worth nothing: prefill of the whole must end as decode did.
  backend->RemoveSequence(id);
  const SequenceId check{2};
  RETURN_IF_ERROR(backend->AddSequence(check, tokens.size()));
  RETURN_IF_ERROR(feed(check, tokens));
  double difference = 0, size = 0;
  for (size_t i = 0; i < decoded.size(); ++i) {
    difference += std::pow(double{decoded[i]} - logits[0][i], 2);
    size += std::pow(double{decoded[i]}, 2);
  }
  const double relative = std::sqrt(difference / size);
  if (!(relative < 0.02)) {
    return absl::InternalError(
        absl::StrCat("decode and prefill disagree: relative difference of the logits ", relative));
  }

  const std::string json = absl::StrFormat(
      "{\"decode_tokens_per_s\": %.1f, \"prefill_tokens_per_s\": %.1f, \"context\": %d, "
      "\"decode_tokens\": %d, \"threads\": %d, \"attention\": \"%s\", \"residency\": \"resident\", "
      "\"machine\": \"%s\", \"commit\": \"%s\", \"command\": \"%s\"}\n",
      1 / median_s, context / prefill_s, context, decode_tokens, options.threads, policy,
      MachineName(), absl::GetFlag(FLAGS_commit), command);
  std::printf("%s, context %d, %d threads, attention %s, everything resident\n",
              MachineName().c_str(), context, options.threads, policy.c_str());
  std::printf("prefill %8.1f tokens/s\n", context / prefill_s);
  std::printf("decode  %8.1f tokens/s (median step %.2f ms, p90 %.2f ms)\n", 1 / median_s,
              median_s * 1e3, step_s[step_s.size() * 9 / 10] * 1e3);
  std::printf("checked: logits of decode and prefill differ by %.1e\n", relative);
  if (!absl::GetFlag(FLAGS_json).empty()) {
    std::ofstream file(absl::GetFlag(FLAGS_json));
    file << json;
    file.close();
    if (!file) {
      return absl::UnavailableError(
          absl::StrCat("json: cannot write '", absl::GetFlag(FLAGS_json), "'"));
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace nosara::worker

int main(int argc, char** argv) {
  const std::string command =
      absl::StrCat("nosara-bench-cpu ", absl::StrJoin(argv + 1, argv + argc, " "));
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-cpu",
       "Prefill and decode speed of the CPU backend, one stream, everything resident.\n"
       "  nosara-bench-cpu --context=8192 --json=docs/benchmarks/cpu.json",
       "worker/bench_cpu_main.cc"},
      [&command] { return nosara::worker::Run(command); });
}
