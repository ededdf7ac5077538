#include "kernels/attend/attend_reference.h"

#include "kernels/bench.h"

namespace nosara::kernels::bench {

std::string BenchAttend(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int D = kHeadDim;
  constexpr int kLayers = 2;
  const int pairs = rows * kNumKvHeads;
  const DecodeCache decode = MakeDecodeCache(bench);
  const BenchCache& cache = *decode.cache;
  const std::vector<__nv_bfloat16> q = bench.random.NormalsBf16(size_t(rows) * kNumHeads * D);
  std::vector<StepRow> info;
  for (int r = 0; r < rows; ++r) info.push_back({r, bench.options.context - 1});
  const std::vector<int2> ranges(pairs, make_int2(kTopK, kTopK));
  const __nv_bfloat16* device_q = bench.Upload(q);
  const StepRow* device_info = bench.Upload(info);
  const int2* device_ranges = bench.Upload(ranges);
  std::vector<std::vector<int32_t>> slots(kLayers), blocks(kLayers);
  std::vector<const int32_t*> device_slots, device_blocks;
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int pair = 0; pair < pairs; ++pair) {
      const int sequence = pair / kNumKvHeads;
      const int record = layer * kNumKvHeads + pair % kNumKvHeads;
      for (const int32_t n : decode.selected[cache.host.TableRow(sequence, record)]) {
        blocks[layer].push_back(n);
        slots[layer].push_back(static_cast<int32_t>(cache.host.SlotOf(sequence, record, n)));
      }
    }
    device_slots.push_back(bench.Upload(slots[layer]));
    device_blocks.push_back(bench.Upload(blocks[layer]));
  }

  for (const int splits : {1, 2, 4, 8}) {
    const size_t num_partials = size_t(pairs) * splits * kGroup;
    std::vector<AttendParams> all;
    for (int layer = 0; layer < kLayers; ++layer) {
      AttendParams params;
      params.q = device_q;
      params.rows_info = device_info;
      params.slots = device_slots[layer];
      params.blocks = device_blocks[layer];
      params.ranges = device_ranges;
      params.cache = cache.device;
      params.partial_o = bench.Allocate<float>(num_partials * D);
      params.partial_mz = bench.Allocate<float2>(num_partials);
      params.rows = rows;
      params.num_heads = kNumHeads;
      params.num_kv_heads = kNumKvHeads;
      params.max_selected = kTopK;
      params.num_splits = params.total_splits = splits;
      all.push_back(params);
    }
    const double merge_bytes = num_partials * (4.0 * D + 8) + 2.0 * rows * kNumHeads * D;
    std::vector<MergeParams> merges;
    bench.Run([&](cudaStream_t stream) { return LaunchAttend(all[0], stream); });
    const std::vector<float> partial_o = Bench::Download(all[0].partial_o, num_partials * D);
    const std::vector<float2> partial_mz = Bench::Download(all[0].partial_mz, num_partials);
    for (int i = 0; i < Bench::Rotations(merge_bytes); ++i) {
      merges.push_back({bench.Upload(partial_o), bench.Upload(partial_mz), device_info,
                        bench.Allocate<__nv_bfloat16>(q.size()), rows, kNumHeads, kNumKvHeads, D,
                        splits});
    }
    bench.Run([&](cudaStream_t stream) { return LaunchMerge(merges[0], stream); });

    // The first two rows, from the reference's own partial results.
    constexpr int kRows = 2;
    const size_t some_partials = size_t{kRows} * kNumKvHeads * splits * kGroup;
    std::vector<float> expected_o(some_partials * D);
    std::vector<float2> expected_mz(some_partials);
    std::vector<__nv_bfloat16> expected(size_t{kRows} * kNumHeads * D);
    AttendParams params = all[0];
    params.q = q.data();
    params.rows_info = info.data();
    params.slots = slots[0].data();
    params.blocks = blocks[0].data();
    params.ranges = ranges.data();
    params.cache = cache.host;
    params.partial_o = expected_o.data();
    params.partial_mz = expected_mz.data();
    params.rows = kRows;
    AttendReference(params);
    MergeReference({expected_o.data(), expected_mz.data(), info.data(), expected.data(), kRows,
                    kNumHeads, kNumKvHeads, D, splits});
    // Rounded probabilities err by 2^-8 of themselves each; over some hundred tokens that count, by
    // 1e-4 together.
    const std::string error = Compare("output", Bench::Download(merges[0].out, expected.size()),
                                      expected, kBf16Step, 1e-3);
    if (!error.empty()) return error + " (" + std::to_string(splits) + " splits)";

    std::vector<Launch> launches;
    for (const AttendParams& p : all) {
      launches.push_back([p](cudaStream_t stream) { return LaunchAttend(p, stream); });
    }
    const std::string shape = std::to_string(rows) + " rows, 64 blocks, " + std::to_string(splits) +
                              (splits == 1 ? " split" : " splits");
    bench.Report(
        {"attend", shape, bench.MedianUs(launches), double(pairs) * kTopK * RecordBytes(D)});
    launches.clear();
    for (const MergeParams& p : merges) {
      launches.push_back([p](cudaStream_t stream) { return LaunchMerge(p, stream); });
    }
    bench.Report({"merge", shape, bench.MedianUs(launches), merge_bytes});
  }
  return "";
}

}  // namespace nosara::kernels::bench
