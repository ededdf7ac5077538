#include "kernels/bench.h"
#include "kernels/sample/sample_reference.h"

namespace nosara::kernels::bench {

std::string BenchSample(Bench& bench) {
  const int rows = bench.options.batch;
  const size_t count = size_t(rows) * kVocabulary;
  std::vector<float> logits = bench.random.Normals(count);
  for (float& logit : logits) logit *= 3;
  const auto draws = [&](float temperature, int top_k, float top_p) {
    std::vector<DrawParams> draw(rows);
    for (DrawParams& one : draw) {
      one.seed = bench.random.Next();
      one.temperature = temperature;
      one.top_k = top_k;
      one.top_p = top_p;
    }
    return draw;
  };
  struct Case {
    const char* name;
    std::vector<DrawParams> draw;
  };
  const Case cases[] = {{"sample greedy", draws(0, 0, 1)},
                        {"sample temperature", draws(1, 0, 1)},
                        {"sample top_p", draws(1, 0, 0.9f)},
                        {"sample top_k top_p", draws(1, 50, 0.9f)}};
  const double bytes = 4.0 * count;
  std::vector<float*> inputs;
  for (int i = 0; i < Bench::Rotations(bytes); ++i) inputs.push_back(bench.Upload(logits));
  for (const Case& one : cases) {
    const DrawParams* draw = bench.Upload(one.draw);
    std::vector<SampleParams> all;
    for (const float* input : inputs) {
      all.push_back({input, draw, bench.Allocate<int32_t>(rows), rows, kVocabulary});
    }
    bench.Run([&](cudaStream_t stream) { return LaunchSample(all[0], stream); });
    std::vector<int32_t> expected(rows);
    SampleReference({logits.data(), one.draw.data(), expected.data(), rows, kVocabulary});
    const std::string error = Compare("token", Bench::Download(all[0].token, rows), expected, 0, 0);
    if (!error.empty()) return error;

    std::vector<Launch> launches;
    for (const SampleParams& p : all) {
      launches.push_back([p](cudaStream_t stream) { return LaunchSample(p, stream); });
    }
    bench.Report(
        {one.name, std::to_string(rows) + " rows x 73448", bench.MedianUs(launches), bytes});
  }
  return "";
}

}  // namespace nosara::kernels::bench
