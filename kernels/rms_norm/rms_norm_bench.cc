#include "kernels/bench.h"
#include "kernels/rms_norm/rms_norm_reference.h"

namespace nosara::kernels::bench {

std::string BenchRmsNorm(Bench& bench) {
  const int rows = bench.options.batch;
  const size_t count = size_t(rows) * kHidden;
  const double bytes = 14.0 * count;
  const std::vector<float> weight = bench.random.Normals(kHidden);
  const std::vector<float> hidden = bench.random.Normals(count),
                           addend = bench.random.Normals(count);
  std::vector<RmsNormParams> all;
  for (int i = 0; i < Bench::Rotations(bytes); ++i) {
    RmsNormParams params;
    params.hidden = bench.Upload(hidden);
    params.addend = bench.Upload(addend);
    params.weight = bench.Upload(weight);
    params.out = bench.Allocate<__nv_bfloat16>(count);
    params.rows = rows;
    params.width = kHidden;
    params.eps = 1e-5f;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchRmsNorm(all[0], stream); });
  std::vector<float> expected_hidden = hidden;
  std::vector<__nv_bfloat16> expected(count);
  RmsNormParams params = all[0];
  params.hidden = expected_hidden.data();
  params.addend = addend.data();
  params.weight = weight.data();
  params.out = expected.data();
  RmsNormReference(params);
  std::string error =
      Compare("hidden", Bench::Download(all[0].hidden, count), expected_hidden, 0, 0);
  if (!error.empty()) return error;
  error = Compare("out", Bench::Download(all[0].out, count), expected, kBf16Step, 1e-20);
  if (!error.empty()) return error;

  std::vector<Launch> launches;
  for (const RmsNormParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchRmsNorm(p, stream); });
  }
  bench.Report({"rms_norm", std::to_string(rows) + " rows x 4096, with addend",
                bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
