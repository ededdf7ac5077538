#include "kernels/append/append_reference.h"
#include "kernels/bench.h"
#include "kernels/common/record_reference.h"

namespace nosara::kernels::bench {

std::string BenchAppend(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int D = kHeadDim;
  constexpr int kWidth = (kNumHeads + 2 * kNumKvHeads) * D;
  const double bytes =
      rows * (4.0 * kWidth + 4.0 * D + 2.0 * kNumHeads * D + kNumKvHeads * (4.0 * D + 4));
  const DecodeCache decode = MakeDecodeCache(bench);
  BenchCache& cache = *decode.cache;
  const int blocks = bench.options.context / kBlockTokens;
  const std::vector<float> qkv = bench.random.Normals(size_t(rows) * kWidth);
  const std::vector<float> A = bench.random.Normals(kNumKvHeads);
  std::vector<float> delta = bench.random.Normals(kNumKvHeads * kNumKvHeads * D);
  for (float& x : delta) x *= 0.05f;
  std::vector<float> cosine, sine;
  for (int i = 0; i < rows * D / 2; ++i) {
    cosine.push_back(static_cast<float>(std::cos(i)));
    sine.push_back(static_cast<float>(std::sin(i)));
  }
  // Every launch writes to the last 17 blocks, which all records hold, at another place.
  std::vector<StepRow> first_info;
  std::vector<AppendParams> all;
  const float* device_A = bench.Upload(A);
  const float* device_delta = bench.Upload(delta);
  for (int i = 0; i < Bench::Rotations(bytes); ++i) {
    std::vector<StepRow> info;
    for (int r = 0; r < rows; ++r) {
      info.push_back({r, (blocks - 17 + i % 17) * kBlockTokens + (i + r) % kBlockTokens});
    }
    if (i == 0) first_info = info;
    AppendParams params;
    params.qkv = bench.Upload(qkv);
    params.A = device_A;
    params.delta = device_delta;
    params.cosine = bench.Upload(cosine);
    params.sine = bench.Upload(sine);
    params.rows_info = bench.Upload(info);
    params.q = bench.Allocate<__nv_bfloat16>(size_t(rows) * kNumHeads * D);
    params.cache = cache.device;
    params.rows = rows;
    params.num_heads = kNumHeads;
    params.num_kv_heads = kNumKvHeads;
    params.layer = i % 2;
    all.push_back(params);
  }
  bench.Run([&](cudaStream_t stream) { return LaunchAppend(all[0], stream); });

  std::vector<__nv_bfloat16> q(size_t(rows) * kNumHeads * D);
  AppendParams params = all[0];
  params.qkv = qkv.data();
  params.A = A.data();
  params.delta = delta.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  params.rows_info = first_info.data();
  params.q = q.data();
  params.cache = cache.host;
  AppendReference(params);
  std::string error = Compare("q", Bench::Download(all[0].q, q.size()), q, kBf16Step, 1e-5);
  if (!error.empty()) return error;
  for (const int r : {0, rows / 2, rows - 1}) {
    const StepRow row = first_info[r];
    const int token = row.position % kBlockTokens;
    const int64_t number =
        cache.host.SlotOf(row.sequence, kNumKvHeads - 1, row.position / kBlockTokens);
    std::byte* expected = cache.host.Slot(number);
    std::vector<std::byte> actual = Bench::Download(cache.device.Slot(number), SlotBytes(D));
    const auto rows_of = [&](const __nv_bfloat16* from) {
      return std::vector<__nv_bfloat16>(from, from + D);
    };
    for (const std::string& wrong :
         {Compare("k", rows_of(RecordKey(actual.data(), D, token)),
                  rows_of(RecordKey(expected, D, token)), kBf16Step, 1e-5),
          Compare("v", rows_of(RecordValue(actual.data(), D, token)),
                  rows_of(RecordValue(expected, D, token)), 0, 0),
          Compare("c", std::vector<float>{RecordBias(actual.data(), D)[token]},
                  std::vector<float>{RecordBias(expected, D)[token]}, 1e-4, 1e-5)}) {
      if (!wrong.empty()) return wrong;
    }
  }

  std::vector<Launch> launches;
  for (const AppendParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchAppend(p, stream); });
  }
  bench.Report({"append", std::to_string(rows) + " rows, Hq 32, Hkv 2, D 128",
                bench.MedianUs(launches), bytes});
  return "";
}

}  // namespace nosara::kernels::bench
