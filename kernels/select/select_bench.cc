#include "kernels/select/select_reference.h"

#include <algorithm>

#include "kernels/bench.h"
#include "kernels/score/score.h"

namespace nosara::kernels::bench {

std::string BenchSelect(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int kPadded = PaddedGroup(kGroup);
  const int position = bench.options.context - 1;
  const int windows = VisibleWindows(position);
  const int tiles = ScoreTiles(windows);
  const int max_windows = tiles * kIndexWindows;
  // Logits and scores e are read once.
  const double bytes = double(rows) * kNumKvHeads * windows * (4.0 * kPadded + 4);
  const int rotations = std::min(32, Bench::Rotations(bytes));
  BenchCacheOptions options;
  options.sequences = rows;
  options.layers = 4;
  options.index_frames = tiles;
  options.max_blocks = bench.options.context / kBlockTokens;
  const std::unique_ptr<BenchCache> cache = MakeCache(bench, options);
  const int pairs = rows * kNumKvHeads;
  const std::vector<float> logits = bench.random.Normals(size_t(pairs) * max_windows * kPadded);
  std::vector<float2> partials(size_t(pairs) * tiles * kPadded);
  for (int pair = 0; pair < pairs; ++pair) {
    for (int tile = 0; tile < tiles; ++tile) {
      for (int g = 0; g < kPadded; ++g) {
        const int end = std::min(windows, (tile + 1) * kIndexWindows);
        float max = -1e30f;
        double sum = 0;
        const auto logit = [&](int w) {
          return logits[(int64_t{pair} * max_windows + w) * kPadded + g];
        };
        for (int w = tile * kIndexWindows; w < end; ++w) max = std::max(max, logit(w));
        for (int w = tile * kIndexWindows; w < end; ++w) sum += std::exp(double{logit(w)} - max);
        partials[(int64_t{pair} * tiles + tile) * kPadded + g] = {max, static_cast<float>(sum)};
      }
    }
  }
  std::vector<StepRow> info;
  for (int r = 0; r < rows; ++r) info.push_back({r, position});
  std::vector<SelectParams> all;
  for (int i = 0; i < rotations; ++i) {
    SelectParams params;
    params.rows_info = bench.Upload(info);
    params.cache = cache->device;
    params.logits = bench.Upload(logits);
    params.partials = bench.Upload(partials);
    params.selected = bench.Allocate<int32_t>(size_t(pairs) * kTopK);
    params.count = bench.Allocate<int32_t>(pairs);
    params.rows = rows;
    params.num_heads = kNumHeads;
    params.num_kv_heads = kNumKvHeads;
    params.layer = i % options.layers;
    params.max_windows = max_windows;
    params.max_selected = kTopK;
    params.max_blocks = options.max_blocks;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchSelect(all[0], stream); });
  const std::vector<int32_t> selected = Bench::Download(all[0].selected, size_t(pairs) * kTopK);
  const std::vector<int32_t> count = Bench::Download(all[0].count, pairs);
  SelectParams params = all[0];
  params.rows_info = info.data();
  params.cache = cache->host;
  params.logits = logits.data();
  params.partials = partials.data();
  // Sums in another order may select otherwise where the scores at the edge are this near.
  constexpr float kNearTie = 1e-5f;
  int near_ties = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    const Selection expected =
        SelectBlocks(params.numbers, position,
                     BlockScoresReference(params, pair / kNumKvHeads, pair % kNumKvHeads));
    if (count[pair] != kTopK) return "count of pair " + std::to_string(pair);
    if (expected.rounding_margin < kNearTie) {
      ++near_ties;
    } else if (!std::equal(expected.blocks.begin(), expected.blocks.end(),
                           selected.begin() + int64_t{pair} * kTopK)) {
      return "selection of pair " + std::to_string(pair);
    }
  }
  if (near_ties > 0) {
    std::fprintf(stderr, "select: %d of %d selections are near-ties and were not compared\n",
                 near_ties, pairs);
  }
  if (near_ties == pairs) return "nothing but near-ties: look at the inputs";

  std::vector<Launch> launches;
  for (const SelectParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchSelect(p, stream); });
  }
  bench.Report(
      {"select",
       std::to_string(rows) + " rows, 64 of " + std::to_string(options.max_blocks) + " blocks",
       bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
