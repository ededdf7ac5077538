#include "kernels/resolve/resolve_reference.h"

#include <algorithm>

#include "kernels/bench.h"

namespace nosara::kernels::bench {

std::string BenchResolve(Bench& bench) {
  const int rows = bench.options.batch;
  constexpr int kLayers = 4;
  constexpr int kSteps = 8;
  const int blocks = bench.options.context / kBlockTokens;
  const int pairs = rows * kNumKvHeads;
  BenchCacheOptions options;
  options.sequences = rows;
  options.layers = kLayers;
  options.slots = std::min(kSlots, blocks);
  options.max_blocks = blocks;
  options.host_slots = options.device_slots = false;  // tables only
  options.resident = [&](int, int) {
    std::vector<int32_t> resident = RandomSelection(bench.random, blocks - 1);
    for (int n = 0; static_cast<int>(resident.size()) < options.slots; ++n) {
      if (!std::binary_search(resident.begin(), resident.begin() + kTopK, n)) resident.push_back(n);
    }
    return resident;
  };
  const std::unique_ptr<BenchCache> cache = MakeCache(bench, options);
  const std::vector<int32_t> slot_of = cache->slot_of, block_of = cache->block_of;
  const std::vector<uint32_t> stamp = cache->stamp;
  const int32_t* saved_slot_of = bench.Upload(slot_of);
  const int32_t* saved_block_of = bench.Upload(block_of);
  const uint32_t* saved_stamp = bench.Upload(stamp);
  std::vector<StepRow> info;
  for (int r = 0; r < rows; ++r) info.push_back({r, bench.options.context - 1});
  const StepRow* device_info = bench.Upload(info);
  // Loads and failures of each launch side by side: cleared by one copy.
  const std::vector<int32_t> zeros(2 * kLayers * kSteps, 0);
  const int32_t* device_zeros = bench.Upload(zeros);
  int32_t* device_counters = bench.Upload(zeros);

  // The selections of a run with this rate of hits, which the reference goes through.
  std::vector<ResolveParams> all;
  std::vector<int32_t> counters = zeros, slots(pairs * kTopK), listed(pairs * kTopK);
  std::vector<int2> ranges(pairs);
  std::vector<Load> loads(pairs * kTopK);
  int64_t selected_blocks = 0, missed_blocks = 0;
  for (uint32_t step = 2; step < 2 + kSteps; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<int32_t> selected;
      for (int pair = 0; pair < pairs; ++pair) {
        const int64_t row =
            cache->host.TableRow(pair / kNumKvHeads, layer * kNumKvHeads + pair % kNumKvHeads);
        std::vector<int32_t> resident, missing;
        for (int n = 1; n < blocks - 17; ++n) {
          (cache->slot_of[row * blocks + n] >= 0 ? resident : missing).push_back(n);
        }
        bench.random.Shuffle(resident);
        bench.random.Shuffle(missing);
        std::vector<int32_t> choice = {0};
        for (int n = blocks - 17; n < blocks; ++n) choice.push_back(n);
        while (static_cast<int>(choice.size()) < kTopK) {
          // Every block counts for the rate, the forced ones too, which never miss.
          const bool miss =
              !missing.empty() && bench.random.Chance((1 - kHitRate) * kTopK / (kTopK - 18.0));
          std::vector<int32_t>& from = miss || resident.empty() ? missing : resident;
          choice.push_back(from.back());
          from.pop_back();
        }
        std::sort(choice.begin(), choice.end());
        selected.insert(selected.end(), choice.begin(), choice.end());
      }
      const std::vector<int32_t> count(pairs, kTopK);
      int32_t* counter = counters.data() + 2 * all.size();
      ResolveParams params;
      params.rows = rows;
      params.num_kv_heads = kNumKvHeads;
      params.layer = layer;
      params.max_selected = kTopK;
      params.rows_info = info.data();
      params.selected = selected.data();
      params.count = count.data();
      params.cache = cache->host;
      params.step = &step;
      params.slots = slots.data();
      params.blocks = listed.data();
      params.ranges = ranges.data();
      params.loads = loads.data();
      params.num_loads = counter;
      params.failures = counter + 1;
      ResolveReference(params);
      selected_blocks += int64_t{pairs} * kTopK;
      missed_blocks += counter[0];

      params.rows_info = device_info;
      params.selected = bench.Upload(selected);
      params.count = bench.Upload(count);
      params.cache = cache->device;
      params.step = bench.Upload(std::vector<uint32_t>{step});
      params.slots = bench.Allocate<int32_t>(pairs * kTopK);
      params.blocks = bench.Allocate<int32_t>(pairs * kTopK);
      params.ranges = bench.Allocate<int2>(pairs);
      params.loads = bench.Allocate<Load>(pairs * kTopK);
      params.num_loads = device_counters + 2 * all.size();
      params.failures = params.num_loads + 1;
      all.push_back(params);
    }
  }
  const CacheView view = cache->device;
  const Launch reset = [=](cudaStream_t stream) {
    const auto copy = [&](void* to, const void* from, size_t bytes) {
      return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
    };
    cudaError_t error = copy(view.slot_of, saved_slot_of, slot_of.size() * 4);
    if (error == cudaSuccess) error = copy(view.block_of, saved_block_of, block_of.size() * 4);
    if (error == cudaSuccess) error = copy(view.stamp, saved_stamp, stamp.size() * 4);
    if (error == cudaSuccess) error = copy(device_counters, device_zeros, zeros.size() * 4);
    return error;
  };
  bench.Run(reset);
  for (const ResolveParams& p : all) {
    bench.Run([&](cudaStream_t stream) { return LaunchResolve(p, stream); });
  }
  if (Bench::Download(device_counters, zeros.size()) != counters) return "loads or failures";
  const std::vector<int32_t> got_slot_of = Bench::Download(view.slot_of, slot_of.size());
  for (size_t i = 0; i < slot_of.size(); ++i) {
    if ((got_slot_of[i] >= 0) != (cache->slot_of[i] >= 0)) {
      return "block " + std::to_string(i % blocks) + " of table row " + std::to_string(i / blocks);
    }
  }

  std::vector<Launch> launches;
  for (const ResolveParams& p : all) {
    launches.push_back([p](cudaStream_t stream) { return LaunchResolve(p, stream); });
  }
  char shape[100];
  std::snprintf(shape, sizeof(shape), "%d rows, %d slots, hit rate %.4f", rows, options.slots,
                1 - double(missed_blocks) / selected_blocks);
  bench.Report({"resolve", shape, bench.MedianUs(launches, reset), 0, 0, Limit::kNone});
  return "";
}

}  // namespace nosara::kernels::bench
