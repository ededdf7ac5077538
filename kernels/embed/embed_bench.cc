#include "kernels/bench.h"
#include "kernels/embed/embed_reference.h"

namespace nosara::kernels::bench {

std::string BenchEmbed(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int kHalf = kHeadDim / 2;
  const double bytes = rows * (6.0 * kHidden + 8.0 * kHalf);
  const std::vector<__nv_bfloat16> table = bench.random.NormalsBf16(size_t{kVocabulary} * kHidden);
  std::vector<double> frequencies;
  for (int i = 0; i < kHalf; ++i) frequencies.push_back(std::pow(10000.0, -double(i) / kHalf));
  std::vector<StepRow> info;
  for (int r = 0; r < rows; ++r) info.push_back({r, bench.options.context - 1 - r});
  const __nv_bfloat16* device_table = bench.Upload(table);
  const double* device_frequencies = bench.Upload(frequencies);
  const StepRow* device_info = bench.Upload(info);
  std::vector<EmbedParams> all;
  std::vector<int32_t> first_tokens;
  for (int i = 0; i < Bench::Rotations(bytes); ++i) {
    std::vector<int32_t> tokens;
    for (int r = 0; r < rows; ++r) tokens.push_back(bench.random.Below(kVocabulary));
    if (i == 0) first_tokens = tokens;
    EmbedParams params;
    params.table = device_table;
    params.tokens = bench.Upload(tokens);
    params.rows_info = device_info;
    params.inverse_frequencies = device_frequencies;
    params.hidden = bench.Allocate<float>(size_t(rows) * kHidden);
    params.cosine = bench.Allocate<float>(size_t(rows) * kHalf);
    params.sine = bench.Allocate<float>(size_t(rows) * kHalf);
    params.rows = rows;
    params.width = kHidden;
    params.half = kHalf;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchEmbed(all[0], stream); });
  std::vector<float> hidden(size_t(rows) * kHidden), cosine(size_t(rows) * kHalf), sine = cosine;
  EmbedParams params = all[0];
  params.table = table.data();
  params.tokens = first_tokens.data();
  params.rows_info = info.data();
  params.inverse_frequencies = frequencies.data();
  params.hidden = hidden.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  EmbedReference(params);
  for (const std::string& error :
       {Compare("hidden", Bench::Download(all[0].hidden, hidden.size()), hidden, 0, 0),
        Compare("cosine", Bench::Download(all[0].cosine, cosine.size()), cosine, 1e-6, 1e-12),
        Compare("sine", Bench::Download(all[0].sine, sine.size()), sine, 1e-6, 1e-12)}) {
    if (!error.empty()) return error;
  }

  std::vector<Launch> launches;
  for (const EmbedParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchEmbed(p, stream); });
  }
  bench.Report({"embed", std::to_string(rows) + " rows x 4096", bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
