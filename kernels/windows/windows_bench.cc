#include "kernels/bench.h"
#include "kernels/common/record_reference.h"
#include "kernels/windows/windows_reference.h"

namespace nosara::kernels::bench {

std::string BenchWindows(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int D = kHeadDim;
  const double bytes = rows * kNumKvHeads * (kWindowTokens * (2.0 * D + 4) + 2.0 * D + 4);
  const DecodeCache decode = MakeDecodeCache(bench);
  BenchCache& cache = *decode.cache;
  const int blocks = bench.options.context / kBlockTokens;
  // Every row completes a window, which happens once in 16 steps; in the last 17 blocks, which all
  // records hold.
  std::vector<std::vector<StepRow>> infos;
  std::vector<WindowsParams> all;
  for (int i = 0; i < 34; ++i) {
    infos.emplace_back();
    for (int r = 0; r < rows; ++r) {
      infos.back().push_back({r, (blocks - 17 + i / 2) * kBlockTokens + (r % 2 == 0 ? 63 : 47)});
    }
    all.push_back({bench.Upload(infos.back()), cache.device, rows, kNumKvHeads, i % 2});
  }
  bench.Run([&](cudaStream_t stream) { return LaunchWindows(all[0], stream); });
  WindowsReference({infos[0].data(), cache.host, rows, kNumKvHeads, 0});
  for (int r = 0; r < rows; r += std::max(1, rows / 8)) {
    const int window = (infos[0][r].position - 31) / kWindowStride;
    std::byte* expected = cache.host.IndexSlot(r, 1, window);
    std::vector<std::byte> actual =
        Bench::Download(cache.device.slots + (expected - cache.host.slots), SlotBytes(D));
    const __nv_bfloat16* key = IndexKey(actual.data(), D, window);
    const __nv_bfloat16* expected_key = IndexKey(expected, D, window);
    for (const std::string& error :
         {Compare("kc", std::vector<__nv_bfloat16>(key, key + D),
                  std::vector<__nv_bfloat16>(expected_key, expected_key + D), kBf16Step, 1e-6),
          Compare("e", std::vector<float>{*IndexScore(actual.data(), D, window)},
                  std::vector<float>{*IndexScore(expected, D, window)}, 1e-5, 1e-6)}) {
      if (!error.empty()) return error;
    }
  }

  std::vector<Launch> launches;
  for (const WindowsParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchWindows(p, stream); });
  }
  bench.Report({"windows", std::to_string(rows) + " rows, each completes a window",
                bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
