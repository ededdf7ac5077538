#include "kernels/score_select/score_select.h"

#include <algorithm>

#include "kernels/bench.h"
#include "kernels/score/score_reference.h"
#include "kernels/select/select_reference.h"

namespace nosara::kernels::bench {
namespace {

/// Compares the first rows with the references; "" where they agree.
std::string Check(const ScoreSelectParams& device, const BenchCache& cache,
                  const std::vector<__nv_bfloat16>& q, const std::vector<StepRow>& info) {
  constexpr int kRows = 4;
  constexpr int kPadded = PaddedGroup(kGroup);
  const int rows = std::min(kRows, device.rows);
  const int max_windows = ScoreTiles(VisibleWindows(info[0].position)) * kIndexWindows;
  std::vector<float> logits(size_t(rows) * kNumKvHeads * max_windows * kPadded);
  std::vector<float2> partials(size_t(rows) * kNumKvHeads * ScoreTiles(max_windows) * kPadded);
  ScoreParams score;
  score.q = q.data();
  score.rows_info = info.data();
  score.cache = cache.host;
  score.logits = logits.data();
  score.partials = partials.data();
  score.num_tiles = rows;
  score.num_heads = kNumHeads;
  score.num_kv_heads = kNumKvHeads;
  score.layer = device.layer;
  score.max_windows = max_windows;
  score.dense_blocks = kTopK;
  ScoreReference(score);
  SelectParams select;
  select.rows_info = info.data();
  select.cache = cache.host;
  select.logits = logits.data();
  select.partials = partials.data();
  select.num_heads = kNumHeads;
  select.num_kv_heads = kNumKvHeads;
  select.layer = device.layer;
  select.max_windows = max_windows;
  const int pairs = rows * kNumKvHeads;
  const std::vector<int32_t> selected = Bench::Download(device.selected, size_t(pairs) * kTopK);
  const std::vector<int32_t> count = Bench::Download(device.count, pairs);
  // Sums in another order may select otherwise where the scores at the edge are this near.
  constexpr float kNearTie = 1e-4f;
  int near_ties = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    const Selection expected =
        SelectBlocks(device.numbers, info[0].position,
                     BlockScoresReference(select, pair / kNumKvHeads, pair % kNumKvHeads));
    if (count[pair] != kTopK) return "count of pair " + std::to_string(pair);
    if (expected.rounding_margin < kNearTie) {
      ++near_ties;
    } else if (!std::equal(expected.blocks.begin(), expected.blocks.end(),
                           selected.begin() + int64_t{pair} * kTopK)) {
      return "selection of pair " + std::to_string(pair);
    }
  }
  return near_ties == pairs ? "nothing but near-ties: look at the inputs" : "";
}

}  // namespace

std::string BenchScoreSelect(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int kLayers = 8;
  const int position = bench.options.context - 1;
  const int windows = VisibleWindows(position);
  BenchCacheOptions options;
  options.sequences = rows;
  options.layers = kLayers;
  options.index_frames = ScoreTiles(windows);
  options.max_blocks = bench.options.context / kBlockTokens;
  const std::unique_ptr<BenchCache> cache = MakeCache(bench, options);
  const std::vector<__nv_bfloat16> q =
      bench.random.NormalsBf16(size_t(rows) * kNumHeads * kHeadDim);
  std::vector<StepRow> info;
  for (int r = 0; r < rows; ++r) info.push_back({r, position});
  std::vector<Launch> launches;
  ScoreSelectParams first;
  for (int layer = 0; layer < kLayers; ++layer) {
    ScoreSelectParams params;
    params.q = bench.Upload(q);
    params.rows_info = bench.Upload(info);
    params.cache = cache->device;
    params.selected = bench.Allocate<int32_t>(size_t(rows) * kNumKvHeads * kTopK);
    params.count = bench.Allocate<int32_t>(rows * kNumKvHeads);
    params.rows = rows;
    params.num_heads = kNumHeads;
    params.num_kv_heads = kNumKvHeads;
    params.layer = layer;
    params.max_selected = kTopK;
    params.max_blocks = options.max_blocks;
    if (!CanScoreSelect(params)) return "this device cannot score and select at once";
    if (layer == 0) first = params;
    launches.push_back([params](cudaStream_t stream) { return LaunchScoreSelect(params, stream); });
  }
  bench.Run(launches[0]);
  const std::string error = Check(first, *cache, q, info);
  if (!error.empty()) return error;
  const double bytes = double(rows) * kNumKvHeads * windows * (2.0 * kHeadDim + 4);
  bench.Report(
      {"score_select",
       std::to_string(rows) + " rows, 64 of " + std::to_string(options.max_blocks) + " blocks",
       bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
