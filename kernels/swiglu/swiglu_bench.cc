#include "kernels/bench.h"
#include "kernels/swiglu/swiglu_reference.h"

namespace nosara::kernels::bench {

std::string BenchSwiGlu(Bench& bench) {
  const int rows = bench.options.batch;
  const size_t count = size_t(rows) * kFeedForward;
  const double bytes = 10.0 * count;
  const std::vector<float> gate_up = bench.random.Normals(2 * count);
  std::vector<SwiGluParams> all;
  for (int i = 0; i < Bench::Rotations(bytes); ++i) {
    all.push_back(
        {bench.Upload(gate_up), bench.Allocate<__nv_bfloat16>(count), rows, kFeedForward});
  }
  bench.Run([&](cudaStream_t stream) { return LaunchSwiGlu(all[0], stream); });
  std::vector<__nv_bfloat16> expected(count);
  SwiGluReference({gate_up.data(), expected.data(), rows, kFeedForward});
  const std::string error =
      Compare("out", Bench::Download(all[0].out, count), expected, kBf16Step, 1e-20);
  if (!error.empty()) return error;

  std::vector<Launch> launches;
  for (const SwiGluParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchSwiGlu(p, stream); });
  }
  bench.Report({"swiglu", std::to_string(rows) + " rows x 16384", bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
