#include "kernels/bench.h"
#include "kernels/sample/sample_reference.h"

namespace nosara::kernels::bench {

std::string BenchSample(Bench& bench) {
  const int rows = bench.options.batch;
  const size_t count = size_t(rows) * kVocabulary;
  const double bytes = 4.0 * count;
  const std::vector<float> logits = bench.random.Normals(count);
  std::vector<ArgMaxParams> all;
  for (int i = 0; i < Bench::Rotations(bytes); ++i) {
    all.push_back({bench.Upload(logits), bench.Allocate<int32_t>(rows), rows, kVocabulary});
  }
  bench.Run([&](cudaStream_t stream) { return LaunchArgMax(all[0], stream); });
  std::vector<int32_t> expected(rows);
  ArgMaxReference({logits.data(), expected.data(), rows, kVocabulary});
  const std::string error = Compare("token", Bench::Download(all[0].token, rows), expected, 0, 0);
  if (!error.empty()) return error;

  std::vector<Launch> launches;
  for (const ArgMaxParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchArgMax(p, stream); });
  }
  bench.Report({"argmax", std::to_string(rows) + " rows x 73448", bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
