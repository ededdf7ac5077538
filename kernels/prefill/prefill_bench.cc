#include "kernels/prefill/prefill_reference.h"

#include <algorithm>

#include "kernels/bench.h"

namespace nosara::kernels::bench {

std::string BenchPrefill(Bench& bench) {
  constexpr int kRows = 1024;
  constexpr int D = kHeadDim;
  constexpr int kLayers = 4;
  const int first = bench.options.context;  // position of the first row
  BenchCacheOptions options;
  options.sequences = 1;
  options.layers = kLayers;
  options.max_blocks = options.slots = (first + kRows) / kBlockTokens;
  options.resident = [&](int, int) {
    std::vector<int32_t> all;
    for (int n = 0; n < options.slots; ++n) all.push_back(n);
    bench.random.Shuffle(all);
    return all;
  };
  const std::unique_ptr<BenchCache> cache = MakeCache(bench, options);
  const std::vector<__nv_bfloat16> q = bench.random.NormalsBf16(size_t{kRows} * kNumHeads * D);
  std::vector<StepRow> info;
  std::vector<RowTile> tiles;
  for (int r = 0; r < kRows; ++r) {
    info.push_back({0, first + r});
    if (r % kPrefillTileRows == 0) tiles.push_back({r, kPrefillTileRows});
  }
  // What a query chooses by itself, 15 or so of 64 blocks, changes by a tenth from row to row; the
  // rest stays.
  std::vector<int32_t> selected(size_t{kRows} * kNumKvHeads * kTopK);
  const std::vector<int32_t> count(kRows * kNumKvHeads, kTopK);
  for (int h = 0; h < kNumKvHeads; ++h) {
    std::vector<int32_t> choice = RandomSelection(bench.random, first / kBlockTokens);
    int own = first / kBlockTokens;
    for (int r = 0; r < kRows; ++r) {
      // A new block pushes another one out of the window that is always selected.
      if (info[r].position / kBlockTokens != own) {
        own = info[r].position / kBlockTokens;
        *std::find(choice.begin(), choice.end(), own - 17) = own;
      }
      for (int i = 0; i < 16; ++i) {
        if (!bench.random.Chance(0.1)) continue;
        int32_t& out = choice[bench.random.Below(kTopK)];
        if (out == 0 || out >= own - 16) continue;
        const int32_t in = 1 + bench.random.Below(own - 17);
        if (std::find(choice.begin(), choice.end(), in) == choice.end()) out = in;
      }
      std::vector<int32_t> sorted = choice;
      std::sort(sorted.begin(), sorted.end());
      std::copy(sorted.begin(), sorted.end(),
                selected.begin() + (int64_t{r} * kNumKvHeads + h) * kTopK);
    }
  }
  std::vector<PrefillParams> all;
  for (int layer = 0; layer < kLayers; ++layer) {
    PrefillParams params;
    params.q = bench.Upload(q);
    params.rows_info = bench.Upload(info);
    params.tiles = bench.Upload(tiles);
    params.selected = bench.Upload(selected);
    params.count = bench.Upload(count);
    params.cache = cache->device;
    params.out = bench.Allocate<__nv_bfloat16>(q.size());
    params.num_tiles = static_cast<int>(tiles.size());
    params.num_heads = kNumHeads;
    params.num_kv_heads = kNumKvHeads;
    params.layer = layer;
    params.max_selected = kTopK;
    params.max_blocks = options.max_blocks;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchPrefill(all[0], stream); });
  const std::vector<__nv_bfloat16> out = Bench::Download(all[0].out, q.size());
  std::vector<__nv_bfloat16> expected(q.size());
  const std::vector<RowTile> some = {{0, 1}, {kRows / 2 + 3, 1}, {kRows - 1, 1}};
  PrefillParams params = all[0];
  params.q = q.data();
  params.rows_info = info.data();
  params.tiles = some.data();
  params.num_tiles = static_cast<int>(some.size());
  params.selected = selected.data();
  params.count = count.data();
  params.cache = cache->host;
  params.out = expected.data();
  PrefillReference(params);
  for (const RowTile& tile : some) {
    const int64_t at = int64_t{tile.first_row} * kNumHeads * D;
    const auto row = [&](const std::vector<__nv_bfloat16>& from) {
      return std::vector<__nv_bfloat16>(from.begin() + at, from.begin() + at + kNumHeads * D);
    };
    // As in BenchAttend.
    const std::string error = Compare("output", row(out), row(expected), kBf16Step, 1e-3);
    if (!error.empty()) return error + " of row " + std::to_string(tile.first_row);
  }

  std::vector<Launch> launches;
  for (const PrefillParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchPrefill(p, stream); });
  }
  // Two products of 2 * 64 * D operations for each row, query head and selected block.
  const double flops = 4.0 * kBlockTokens * D * kTopK * kNumHeads * kRows;
  bench.Report({"prefill",
                std::to_string(kRows) + " rows at " + std::to_string(first) + ", 64 blocks each",
                bench.MedianUs(launches), 0, flops, Limit::kNone});
  return "";
}

}  // namespace nosara::kernels::bench
