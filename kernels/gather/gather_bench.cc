#include "kernels/gather/gather_reference.h"

#include <algorithm>
#include <cstring>

#include "kernels/bench.h"

namespace nosara::kernels::bench {

std::string BenchGather(Bench& bench) {
  const int sequences = bench.options.batch;
  const int blocks = bench.options.context / kBlockTokens;
  constexpr int kLayers = 2;
  constexpr int kRecords = kLayers * kNumKvHeads;
  const int64_t record_bytes = RecordBytes(kHeadDim);
  BenchCacheOptions options;
  options.sequences = sequences;
  options.layers = kLayers;
  options.slots = kSlots;
  options.max_blocks = blocks;
  options.host_slots = false;
  const std::unique_ptr<BenchCache> cache = MakeCache(bench, options);

  // Pages of random bytes in pinned memory; where there are fewer than blocks, some share one.
  const int64_t page_bytes = kRecords * record_bytes;
  const int64_t num_pages = (int64_t{bench.options.memory_mib} << 20) / page_bytes;
  if (num_pages < 16) return "--memory-mib is too small";
  std::byte* arena = bench.AllocatePinned(num_pages * page_bytes);
  for (int64_t i = 0; i + 8 <= num_pages * page_bytes; i += 8) {
    const uint64_t value = bench.random.Next();
    std::memcpy(arena + i, &value, 8);
  }
  for (size_t i = 0; i < cache->pages.size(); ++i) {
    cache->pages[i] = reinterpret_cast<uint64_t>(arena) +
                      bench.random.Below(static_cast<int>(num_pages)) * page_bytes;
  }
  cache->device.pages = bench.Upload(cache->pages);

  for (const int records : {45, 4096}) {
    // Different slots within a launch; any block.
    const int slots = sequences * kRecords * kSlots;
    if (records > slots) continue;
    std::vector<int32_t> order(slots);
    for (int i = 0; i < slots; ++i) order[i] = i;
    std::vector<std::vector<Load>> lists;
    std::vector<const Load*> device_lists;
    const int rotations = records < 1000 ? 32 : 4;
    for (int i = 0; i < rotations; ++i) {
      bench.random.Shuffle(order);
      lists.emplace_back();
      for (int j = 0; j < records; ++j) {
        const int row = order[j] / kSlots;
        lists.back().push_back(
            {row / kRecords, row % kRecords, bench.random.Below(blocks), order[j] % kSlots});
      }
      device_lists.push_back(bench.Upload(lists.back()));
    }
    const int32_t* num_loads = bench.Upload(std::vector<int32_t>{records});
    for (const int thread_blocks : {16, 24}) {
      std::vector<Launch> launches;
      for (const Load* list : device_lists) {
        const GatherParams params{list, num_loads, cache->device, nullptr, thread_blocks};
        launches.push_back([params](cudaStream_t stream) { return LaunchGather(params, stream); });
      }
      bench.Run(launches[0]);
      for (int j = 0; j < records; j += std::max(1, records / 64)) {
        const Load& load = lists[0][j];
        const uint64_t page = cache->pages[int64_t{load.sequence} * blocks + load.block];
        const std::byte* expected =
            reinterpret_cast<const std::byte*>(page) + load.record * record_bytes;
        const std::vector<std::byte> actual = Bench::Download(
            cache->device.slots +
                cache->host.SlotNumber(load.sequence, load.record, load.slot) * SlotBytes(kHeadDim),
            record_bytes);
        if (std::memcmp(actual.data(), expected, record_bytes) != 0) {
          return "bytes of record " + std::to_string(j) + " of " + std::to_string(records);
        }
      }
      bench.Report({"gather",
                    std::to_string(records) + " records, " + std::to_string(thread_blocks) +
                        " thread blocks",
                    bench.MedianUs(launches), double(records) * record_bytes, 0,
                    Limit::kHostToDevice});
    }
  }
  return "";
}

}  // namespace nosara::kernels::bench
