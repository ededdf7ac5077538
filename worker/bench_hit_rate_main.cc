// nosara-bench-hit-rate: how often the blocks that a trained model selects in real text have a
// slot, by the number of slots.
//
// The model runs on the CPU backend with everything resident: the first `context` tokens of the
// text as prefill, the following ones one by one as decode steps. The text itself is fed, not what
// the model would say: sampled text of a small model loops, and loops select the same blocks.
//
// The slots are simulated (worker/cache/slot_simulation.h) from the recorded selections, for each
// (layer, KV head) and each number of slots. They go through the prefill too, query by query from
// position 0 on: decode finds the blocks that were selected last. A worker prefills in chunks,
// where the queries of a chunk but for the last count as one step; what that changes is the order
// in which a few blocks give way in the first steps. Counted are the decode steps alone.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/program.h"
#include "base/status_macros.h"
#include "text/tokenizer.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/cache/slot_simulation.h"

ABSL_FLAG(std::string, model_dir, "models/nosa-tiny", "folder of the checkpoint");
ABSL_FLAG(std::string, text, "models/nosa-tiny/story.txt", "text to read, UTF-8");
ABSL_FLAG(std::vector<std::string>, context, std::vector<std::string>({"2048", "4096", "6976"}),
          "tokens before the first decode step; several: one run each");
ABSL_FLAG(int32_t, decode_tokens, 512, "decode steps, 1 or more; fewer where the text ends");
ABSL_FLAG(std::vector<std::string>, slots,
          std::vector<std::string>({"16", "17", "18", "20", "24", "28", "32", "40", "48", "64",
                                    "96"}),
          "slots per (layer, KV head), topk_blocks of the model or more");
ABSL_FLAG(std::vector<std::string>, policy, std::vector<std::string>({"nosa", "infllmv2"}),
          "nosa, infllmv2 or both");
ABSL_FLAG(int32_t, threads, 2, "compute threads");
ABSL_FLAG(int32_t, chunk_tokens, 256, "prefill chunk, tokens, 1 or more");
ABSL_FLAG(std::string, json, "", "file for the figures, a list; empty: none");
ABSL_FLAG(std::string, commit, "", "commit to note in the figures");

namespace nosara::worker {
namespace {

constexpr int kMostSlots = 65536;

struct Options {
  std::vector<int> contexts;
  std::vector<int> slots;  // ascending
  std::vector<std::pair<std::string, AttentionPolicy>> policies;
  int decode_tokens = 0;
  int chunk_tokens = 0;
};

/// What one (layer, KV head) selects at each position from 0 on.
using Selections = std::vector<std::vector<int32_t>>;

/// Counts of the decode steps of one (policy, context, slots).
struct Counts {
  int64_t selected = 0;
  int64_t loaded = 0;
  std::vector<int64_t> loaded_by_record;  // layer * Hkv + KV head

  double HitRate() const { return 1 - static_cast<double>(loaded) / selected; }
};

/// One run of the model.
struct Trace {
  std::string policy;
  int context = 0;
  int steps = 0;
  int blocks = 0;                   // that exist in the end
  std::vector<Selections> records;  // layer * Hkv + KV head

  double Heads() const { return static_cast<double>(records.size()); }
};

/// What is printed of one trace.
struct Result {
  Trace trace;
  double overlap = 0;          // share of a selection that the one before has too
  std::vector<Counts> counts;  // as Options::slots
};

absl::StatusOr<std::string> ReadFile(const std::string& flag, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();  // fails for a folder and for an empty file
  if (!file || !text) {
    return absl::NotFoundError(
        absl::StrCat(flag, " = '", path, "': must be a readable file that is not empty"));
  }
  return text.str();
}

absl::StatusOr<std::vector<int>> Numbers(const std::string& flag,
                                         const std::vector<std::string>& values, int low, int high,
                                         const std::string& why) {
  std::vector<int> numbers;
  for (const std::string& value : values) {
    int number = 0;
    if (!absl::SimpleAtoi(value, &number) || number < low || number > high) {
      return absl::InvalidArgumentError(
          absl::StrCat(flag, " = '", value, "': must be ", low, " to ", high, why));
    }
    numbers.push_back(number);
  }
  if (numbers.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " = '': must be one or more numbers, ", low, " to ", high, why));
  }
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers;
}

absl::StatusOr<Options> ReadOptions(const ModelConfig& config, int text_tokens) {
  Options options;
  const int most = std::min(text_tokens, config.max_position_embeddings) - 1;
  const std::string text = absl::GetFlag(FLAGS_text);
  if (most < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("text = '", text, "': must have 2 tokens or more, has ", text_tokens));
  }
  ASSIGN_OR_RETURN(options.contexts, Numbers("context", absl::GetFlag(FLAGS_context), 1, most,
                                             absl::StrCat(", one less than the tokens of '", text,
                                                          "' that the model can read")));
  ASSIGN_OR_RETURN(options.slots,
                   Numbers("slots", absl::GetFlag(FLAGS_slots), config.nosa.topk_blocks, kMostSlots,
                           " (the least is topk_blocks of the model)"));
  for (const std::string& name : absl::GetFlag(FLAGS_policy)) {
    if (name == "nosa") {
      options.policies.emplace_back(name, AttentionPolicy::kNosa);
    } else if (name == "infllmv2") {
      options.policies.emplace_back(name, AttentionPolicy::kInfLlmV2);
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("policy = '", name, "': must be nosa, infllmv2 or both with a comma"));
    }
  }
  if (options.policies.empty()) {
    return absl::InvalidArgumentError("policy = '': must be nosa, infllmv2 or both with a comma");
  }
  options.decode_tokens = absl::GetFlag(FLAGS_decode_tokens);
  options.chunk_tokens = absl::GetFlag(FLAGS_chunk_tokens);
  if (options.decode_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_tokens = ", options.decode_tokens, ": must be 1 or more"));
  }
  if (options.chunk_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_tokens = ", options.chunk_tokens, ": must be 1 or more"));
  }
  return options;
}

/// Lets the model read tokens [0, context + steps) and records what it selects.
absl::StatusOr<Trace> Record(const std::shared_ptr<const Checkpoint>& checkpoint,
                             const Options& options, const std::string& policy_name,
                             AttentionPolicy policy, int context,
                             const std::vector<int32_t>& tokens) {
  const ModelConfig& config = checkpoint->config();
  const int block_tokens = config.nosa.block_size;
  const int most = std::min<int>(tokens.size(), config.max_position_embeddings);
  const int end =
      static_cast<int>(std::min<int64_t>(most, int64_t{context} + options.decode_tokens));
  Trace trace;
  trace.policy = policy_name;
  trace.context = context;
  trace.steps = end - context;
  trace.blocks = (end - 1) / block_tokens + 1;
  trace.records.assign(static_cast<size_t>(config.num_layers) * config.num_kv_heads,
                       Selections(end));

  CpuBackendOptions backend_options;
  backend_options.threads = absl::GetFlag(FLAGS_threads);
  backend_options.policy = policy;
  backend_options.max_unstored_blocks = trace.blocks + 1;  // nothing is stored: all stay
  backend_options.observer = [&](SequenceId, int layer, int kv_head, int64_t position,
                                 const std::vector<int32_t>& selected, const SelectionMargins&) {
    trace.records[layer * config.num_kv_heads + kv_head][position] = selected;
  };
  ASSIGN_OR_RETURN(const auto backend, CpuBackend::Create(checkpoint, nullptr, backend_options));
  const SequenceId id{1};
  RETURN_IF_ERROR(backend->AddSequence(id, end));
  const bool progress = isatty(STDERR_FILENO) != 0;
  for (int begin = 0; begin < end;) {
    const int count = begin < context ? std::min(options.chunk_tokens, context - begin) : 1;
    const StepItem item = {id, absl::MakeConstSpan(tokens).subspan(begin, count), std::nullopt};
    RETURN_IF_ERROR(backend->Forward({item}, nullptr)[0].status);
    begin += count;
    if (progress && (begin % 256 == 0 || begin == end)) {
      std::fprintf(stderr, "\r%s, context %d: %d of %d tokens", policy_name.c_str(), context, begin,
                   end);
    }
  }
  if (progress) std::fprintf(stderr, "\n");

  for (Selections& selections : trace.records) {
    for (int t = 0; t < end; ++t) {
      const int blocks = t / block_tokens + 1;
      std::vector<int32_t>& selected = selections[t];
      // While there are few blocks every one is attended to, which the backend does not report.
      if (selected.empty() && blocks <= config.nosa.topk_blocks) {
        for (int block = 0; block < blocks; ++block) selected.push_back(block);
      }
      const int expected = std::min(blocks, config.nosa.topk_blocks);
      if (static_cast<int>(selected.size()) != expected || selected.back() != blocks - 1) {
        return absl::InternalError(absl::StrCat("wrong result: ", selected.size(),
                                                " blocks selected at position ", t, ", not ",
                                                expected, " with the query's own"));
      }
    }
  }
  return trace;
}

Counts Simulate(const Trace& trace, int slots, int block_tokens) {
  Counts counts;
  for (const Selections& selections : trace.records) {
    SlotSimulation simulation(slots, trace.blocks);
    int64_t loaded = 0;
    for (int t = 0; t < trace.context + trace.steps; ++t) {
      if (t % block_tokens == 0) simulation.Open(t / block_tokens);
      const int loads = simulation.Select(selections[t]);
      if (t < trace.context) continue;
      counts.selected += static_cast<int64_t>(selections[t].size());
      loaded += loads;
    }
    simulation.CheckIntegrity();
    counts.loaded += loaded;
    counts.loaded_by_record.push_back(loaded);
  }
  return counts;
}

/// How many blocks of the selection at position t the one at t - 1 had not.
int Changed(const Selections& selections, int t) {
  std::vector<int32_t> fresh;
  std::set_difference(selections[t].begin(), selections[t].end(), selections[t - 1].begin(),
                      selections[t - 1].end(), std::back_inserter(fresh));
  return static_cast<int>(fresh.size());
}

double Overlap(const Trace& trace) {
  int64_t selected = 0, changed = 0;
  for (const Selections& selections : trace.records) {
    for (int t = trace.context; t < trace.context + trace.steps; ++t) {
      selected += static_cast<int64_t>(selections[t].size());
      changed += Changed(selections, t);
    }
  }
  return 1 - static_cast<double>(changed) / selected;
}

/// Loads with as many slots as a selection has blocks, without a table: the slots hold the last
/// selection, so that a step loads what is new in its own. A begun block is new but not loaded; it
/// takes the slot of the smallest block of the last selection, where all are equally old, and that
/// one must come back if it is selected.
int64_t LoadsWithFewestSlots(const Trace& trace, int block_tokens) {
  int64_t loads = 0;
  for (const Selections& selections : trace.records) {
    for (int t = trace.context; t < trace.context + trace.steps; ++t) {
      loads += Changed(selections, t);
      if (t % block_tokens != 0) continue;
      const bool returns =
          std::binary_search(selections[t].begin(), selections[t].end(), selections[t - 1].front());
      loads += (returns ? 1 : 0) - 1;
    }
  }
  return loads;
}

/// Figures of a wrong result are worth nothing.
absl::Status Check(const Result& result, const Options& options, const NosaConfig& nosa) {
  const Trace& trace = result.trace;
  const std::string where =
      absl::StrCat("wrong result (", trace.policy, ", context ", trace.context, "): ");
  // Every block got a slot when it was begun: nothing can be missing that never had to go.
  const int all = std::max(trace.blocks, nosa.topk_blocks);
  const int64_t loaded = Simulate(trace, all, nosa.block_size).loaded;
  if (loaded != 0) {
    return absl::InternalError(
        absl::StrCat(where, loaded, " loads with a slot for each of ", trace.blocks, " blocks"));
  }
  // LRU inclusion, which the blocks that may not give way leave intact: all of them are selected in
  // every step.
  for (size_t i = 1; i < result.counts.size(); ++i) {
    for (size_t r = 0; r < trace.records.size(); ++r) {
      if (result.counts[i].loaded_by_record[r] <= result.counts[i - 1].loaded_by_record[r])
        continue;
      return absl::InternalError(absl::StrCat(where, "more loads with ", options.slots[i],
                                              " slots than with ", options.slots[i - 1]));
    }
  }
  if (trace.context < nosa.topk_blocks * nosa.block_size) return absl::OkStatus();
  const int64_t fewest = Simulate(trace, nosa.topk_blocks, nosa.block_size).loaded;
  const int64_t expected = LoadsWithFewestSlots(trace, nosa.block_size);
  if (fewest != expected) {
    return absl::InternalError(absl::StrCat(where, fewest, " loads with ", nosa.topk_blocks,
                                            " slots; consecutive selections differ by ", expected));
  }
  return absl::OkStatus();
}

size_t WorstRecord(const Counts& counts) {
  return std::max_element(counts.loaded_by_record.begin(), counts.loaded_by_record.end()) -
         counts.loaded_by_record.begin();
}

double MissesPerStepAndHead(const Trace& trace, const Counts& counts) {
  return static_cast<double>(counts.loaded) / trace.steps / trace.Heads();
}

void Print(const Result& result, const Options& options, const ModelConfig& config) {
  const Trace& trace = result.trace;
  std::printf("\n%s, context %d, %d decode steps, %d blocks in the end, %d selected\n",
              trace.policy.c_str(), trace.context, trace.steps, trace.blocks,
              config.nosa.topk_blocks);
  std::printf("a selection has %.2f %% of its blocks in common with the one before\n",
              100 * result.overlap);
  std::printf("%6s %9s %22s   %s\n", "slots", "hit rate", "misses/step and head",
              "worst layer, KV head: share of all misses");
  for (size_t i = 0; i < options.slots.size(); ++i) {
    const Counts& counts = result.counts[i];
    const size_t worst = WorstRecord(counts);
    std::printf("%6d %9.4f %22.4f", options.slots[i], counts.HitRate(),
                MissesPerStepAndHead(trace, counts));
    if (counts.loaded > 0) {
      std::printf("   %zu, %zu: %.1f %%", worst / config.num_kv_heads, worst % config.num_kv_heads,
                  100.0 * counts.loaded_by_record[worst] / counts.loaded);
    }
    std::printf("\n");
  }
}

std::string ToJson(const Result& result, const Counts& counts, int slots, const ModelConfig& config,
                   const std::string& command) {
  const Trace& trace = result.trace;
  const size_t worst = WorstRecord(counts);
  const auto rounded = [](double x) { return std::stod(absl::StrFormat("%.5f", x)); };
  nlohmann::ordered_json entry = {
      {"slots", slots},
      {"hit_rate", rounded(counts.HitRate())},
      {"context", trace.context},
      {"policy", trace.policy},
      {"misses_per_step_and_head", rounded(MissesPerStepAndHead(trace, counts))},
      {"overlap", rounded(result.overlap)},
      {"selected_blocks", config.nosa.topk_blocks},
      {"blocks", trace.blocks},
  };
  if (counts.loaded > 0) {
    entry["worst_head"] = {
        {"layer", worst / config.num_kv_heads},
        {"kv_head", worst % config.num_kv_heads},
        {"share_of_misses", rounded(static_cast<double>(counts.loaded_by_record[worst]) /
                                    static_cast<double>(counts.loaded))}};
  }
  entry["model"] = absl::GetFlag(FLAGS_model_dir);
  entry["text"] = absl::GetFlag(FLAGS_text);
  entry["decode_tokens"] = trace.steps;
  entry["commit"] = absl::GetFlag(FLAGS_commit);
  entry["command"] = command;
  return entry.dump();
}

absl::Status Run(const std::string& command) {
  const std::string model_dir = absl::GetFlag(FLAGS_model_dir);
  ASSIGN_OR_RETURN(std::shared_ptr<const Checkpoint> checkpoint, Checkpoint::Open(model_dir));
  const ModelConfig& config = checkpoint->config();
  ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::Load(model_dir));
  ASSIGN_OR_RETURN(const std::string text, ReadFile("text", absl::GetFlag(FLAGS_text)));
  text::EncodeOptions encode;
  encode.add_bos = tokenizer->adds_bos();
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, tokenizer->Encode(text, encode));
  ASSIGN_OR_RETURN(const Options options, ReadOptions(config, static_cast<int>(tokens.size())));

  std::vector<Result> results;
  for (const auto& [name, policy] : options.policies) {
    for (const int context : options.contexts) {
      Result result;
      ASSIGN_OR_RETURN(result.trace, Record(checkpoint, options, name, policy, context, tokens));
      result.overlap = Overlap(result.trace);
      for (const int slots : options.slots) {
        result.counts.push_back(Simulate(result.trace, slots, config.nosa.block_size));
      }
      RETURN_IF_ERROR(Check(result, options, config.nosa));
      results.push_back(std::move(result));
    }
  }
  std::printf("%s: %zu tokens, read by %s\n", absl::GetFlag(FLAGS_text).c_str(), tokens.size(),
              model_dir.c_str());
  std::printf(
      "checked: no loads with a slot for every block; with more slots no head loads more\n");
  if (options.contexts.back() >= config.nosa.topk_blocks * config.nosa.block_size) {
    std::printf("checked: with %d slots as many loads as consecutive selections differ by\n",
                config.nosa.topk_blocks);
  }
  std::vector<std::string> entries;
  for (const Result& result : results) {
    Print(result, options, config);
    for (size_t i = 0; i < options.slots.size(); ++i) {
      entries.push_back(ToJson(result, result.counts[i], options.slots[i], config, command));
    }
  }
  if (absl::GetFlag(FLAGS_json).empty()) return absl::OkStatus();
  std::ofstream file(absl::GetFlag(FLAGS_json));
  file << "[\n  " << absl::StrJoin(entries, ",\n  ") << "\n]\n";
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("json: cannot write '", absl::GetFlag(FLAGS_json), "'"));
}

}  // namespace
}  // namespace nosara::worker

int main(int argc, char** argv) {
  const std::string command =
      absl::StrCat("nosara-bench-hit-rate ", absl::StrJoin(argv + 1, argv + argc, " "));
  return nosara::RunProgram(
      argc, argv,
      {"nosara-bench-hit-rate",
       "Hit rate of the slot cache by the number of slots, on real text with a trained model.\n"
       "  nosara-bench-hit-rate --json=docs/benchmarks/hit-rate.json\n"
       "  nosara-bench-hit-rate --context=4096 --slots=16,24,32 --policy=nosa",
       "worker/bench_hit_rate_main.cc"},
      [&command] { return nosara::worker::Run(command); });
}
