#include "kernels/bench.h"
#include "kernels/score/score_reference.h"

namespace nosara::kernels::bench {

std::string BenchScore(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int kPadded = PaddedGroup(kGroup);
  constexpr int kLayers = 8;
  const int position = bench.options.context - 1;
  const int windows = VisibleWindows(position);
  const int max_windows = ScoreTiles(windows) * kIndexWindows;
  const double bytes = double(rows) * kNumKvHeads * windows * (2.0 * kHeadDim + 4 * kPadded);
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
  const size_t num_logits = size_t(rows) * kNumKvHeads * max_windows * kPadded;
  const size_t num_partials = size_t(rows) * kNumKvHeads * ScoreTiles(max_windows) * kPadded;
  std::vector<ScoreParams> all;
  for (int layer = 0; layer < kLayers; ++layer) {
    ScoreParams params;
    params.q = bench.Upload(q);
    params.rows_info = bench.Upload(info);
    params.cache = cache->device;
    params.logits = bench.Allocate<float>(num_logits);
    params.partials = bench.Allocate<float2>(num_partials);
    params.num_tiles = rows;
    params.num_heads = kNumHeads;
    params.num_kv_heads = kNumKvHeads;
    params.layer = layer;
    params.max_windows = max_windows;
    params.dense_blocks = kTopK;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchScore(all[0], stream); });

  // The first two rows; the padding of their last tile is nobody's.
  const size_t per_row = num_logits / rows, partials_per_row = num_partials / rows;
  std::vector<float> logits(2 * per_row, 0.0f);
  std::vector<float2> partials(2 * partials_per_row);
  ScoreParams params = all[0];
  params.q = q.data();
  params.rows_info = info.data();
  params.cache = cache->host;
  params.logits = logits.data();
  params.partials = partials.data();
  params.num_tiles = 2;
  ScoreReference(params);
  std::vector<float> actual = Bench::Download(all[0].logits, 2 * per_row);
  for (size_t i = 0; i < actual.size(); ++i) {
    const bool visible = static_cast<int>(i / kPadded) % max_windows < windows;
    if (!visible) actual[i] = 0;
  }
  std::string error = Compare("logits", actual, logits, 1e-5, 1e-4);
  if (!error.empty()) return error;
  std::vector<float> log_sums, expected_log_sums;
  for (const float2& p : Bench::Download(all[0].partials, 2 * partials_per_row)) {
    log_sums.push_back(p.x + std::log(p.y));
  }
  for (const float2& p : partials) expected_log_sums.push_back(p.x + std::log(p.y));
  error = Compare("max + log of sum", log_sums, expected_log_sums, 1e-5, 2e-4);
  if (!error.empty()) return error;

  std::vector<Launch> launches;
  for (const ScoreParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchScore(p, stream); });
  }
  bench.Report({"score", std::to_string(rows) + " rows, " + std::to_string(windows) + " windows",
                bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
