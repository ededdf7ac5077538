#include "kernels/attend/attend_reference.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/bench.h"

namespace nosara::kernels::bench {
namespace {

constexpr int D = kHeadDim;
constexpr int kLayers = 2;
constexpr int kCheckedRows = 2;

/// The lists of one launch, on the host and on the device.
struct Lists {
  std::vector<int32_t> slots, blocks;
  std::vector<int2> ranges;
  AttendParams params;
};

/// What all launches have in common, and what they are made of.
struct Inputs {
  Bench& bench;
  const DecodeCache& decode;
  std::vector<StepRow> info;
  std::vector<__nv_bfloat16> q;
  AttendParams params;  // without lists, partials and an output
};

/// Blocks that may be missing: all but the first and the last 17.
constexpr int kFirstForced = 1;
constexpr int kLastForced = 17;

/// The lists of a layer with `missing` records in pages, at random places but for the first of
/// them, which the rows that are checked have.
Lists MakeLists(Inputs& inputs, int layer, int missing) {
  Bench& bench = inputs.bench;
  const CacheView& cache = inputs.decode.cache->host;
  const int pairs = inputs.params.rows * kNumKvHeads;
  constexpr int kMay = kTopK - kFirstForced - kLastForced;
  std::vector<int> places(pairs * kMay);
  std::iota(places.begin(), places.end(), 0);
  bench.random.Shuffle(places);
  std::swap(places[0], *std::min_element(places.begin(), places.end()));
  std::vector<char> is_missing(pairs * kTopK, 0);
  for (int i = 0; i < missing; ++i) {
    is_missing[places[i] / kMay * kTopK + kFirstForced + places[i] % kMay] = 1;
  }
  Lists lists;
  for (int pair = 0; pair < pairs; ++pair) {
    const int sequence = pair / kNumKvHeads;
    const int record = layer * kNumKvHeads + pair % kNumKvHeads;
    const std::vector<int32_t>& selected = inputs.decode.selected[cache.TableRow(sequence, record)];
    const int before = static_cast<int>(lists.blocks.size());
    int resident = 0;
    for (const char wanted : {0, 1}) {
      for (int i = 0; i < kTopK; ++i) {
        if (is_missing[pair * kTopK + i] != wanted) continue;
        lists.blocks.push_back(selected[i]);
        lists.slots.push_back(static_cast<int32_t>(cache.SlotOf(sequence, record, selected[i])));
      }
      if (wanted == 0) resident = static_cast<int>(lists.blocks.size()) - before;
    }
    lists.ranges.push_back(make_int2(resident, kTopK));
  }
  lists.params = inputs.params;
  lists.params.layer = layer;
  lists.params.slots = bench.Upload(lists.slots);
  lists.params.blocks = bench.Upload(lists.blocks);
  lists.params.ranges = bench.Upload(lists.ranges);
  return lists;
}

/// Memory for the results of a launch of `splits` shares.
void Allocate(Bench& bench, int splits, AttendParams& params) {
  const int pairs = params.rows * kNumKvHeads;
  params.num_splits = splits;
  params.partial_o = bench.Allocate<float>(size_t(pairs) * splits * kGroup * D);
  params.partial_mz = bench.Allocate<float2>(size_t(pairs) * splits * kGroup);
  params.finished = bench.Upload(std::vector<int32_t>(pairs * ((kGroup + 15) / 16), 0));
  params.out = bench.Allocate<__nv_bfloat16>(size_t(params.rows) * kNumHeads * D);
}

/// Launches and compares the first rows with the reference, in pages also what is in their slots.
std::string Check(Inputs& inputs, const Lists& lists) {
  inputs.bench.Run([&](cudaStream_t stream) { return LaunchAttend(lists.params, stream); });
  const CacheView& cache = inputs.decode.cache->host;
  std::vector<__nv_bfloat16> expected(size_t{kCheckedRows} * kNumHeads * D);
  AttendParams params = lists.params;
  params.q = inputs.q.data();
  params.rows_info = inputs.info.data();
  params.slots = lists.slots.data();
  params.blocks = lists.blocks.data();
  params.ranges = lists.ranges.data();
  params.cache = cache;
  params.out = expected.data();
  params.rows = kCheckedRows;
  AttendReference(params);
  // Rounded probabilities err by 2^-8 of themselves each; over some hundred tokens that count, by
  // 1e-4 together.
  const std::string error = Compare("output", Bench::Download(lists.params.out, expected.size()),
                                    expected, kBf16Step, 1e-3);
  if (!error.empty() || params.missing == AttendMissing::kInSlots) return error;
  for (int pair = 0; pair < kCheckedRows * kNumKvHeads; ++pair) {
    for (int i = lists.ranges[pair].x; i < kTopK; ++i) {
      const int32_t slot = lists.slots[pair * kTopK + i];
      const std::vector<std::byte> actual =
          Bench::Download(lists.params.cache.Slot(slot), RecordBytes(D));
      if (std::memcmp(actual.data(), cache.Slot(slot), RecordBytes(D)) != 0) {
        return "bytes of missing record " + std::to_string(i) + " of pair " + std::to_string(pair);
      }
    }
  }
  return "";
}

double MedianUs(Bench& bench, const std::vector<Lists>& all) {
  std::vector<Launch> launches;
  for (const Lists& lists : all) {
    const AttendParams& p = lists.params;
    launches.push_back([p](cudaStream_t stream) { return LaunchAttend(p, stream); });
  }
  return bench.MedianUs(launches);
}

/// Pages in pinned memory with the records of random slots; every block has one of them.
void MakePages(Bench& bench, BenchCache& cache) {
  constexpr int kRecords = kLayers * kNumKvHeads;
  constexpr int kPages = 2048;
  constexpr int64_t kRecordBytes = RecordBytes(D);
  std::byte* pages = bench.AllocatePinned(kPages * kRecords * kRecordBytes);
  const int num_frames = static_cast<int>(cache.frames.size());
  for (int64_t i = 0; i < kPages * kRecords; ++i) {
    const int32_t frame = cache.frames[bench.random.Below(num_frames)];
    std::memcpy(pages + i * kRecordBytes, cache.host.Slot(int64_t{frame} * kRecords + i % kRecords),
                kRecordBytes);
  }
  for (uint64_t& page : cache.pages) {
    page = reinterpret_cast<uint64_t>(pages) + bench.random.Below(kPages) * kRecords * kRecordBytes;
  }
  cache.device.pages = bench.Upload(cache.pages);
}

}  // namespace

std::string BenchAttend(Bench& bench) {
  const int rows = bench.options.batch;
  const int records = rows * kNumKvHeads * kTopK;
  const DecodeCache decode = MakeDecodeCache(bench);
  MakePages(bench, *decode.cache);
  Inputs inputs{bench, decode, {}, bench.random.NormalsBf16(size_t(rows) * kNumHeads * D), {}};
  for (int r = 0; r < rows; ++r) inputs.info.push_back({r, bench.options.context - 1});
  inputs.params.q = bench.Upload(inputs.q);
  inputs.params.rows_info = bench.Upload(inputs.info);
  inputs.params.cache = decode.cache->device;
  inputs.params.rows = rows;
  inputs.params.num_heads = kNumHeads;
  inputs.params.num_kv_heads = kNumKvHeads;
  inputs.params.max_selected = kTopK;

  std::vector<Lists> all;
  for (int layer = 0; layer < kLayers; ++layer) all.push_back(MakeLists(inputs, layer, 0));
  for (const int splits : {1, 2, 4, 8}) {
    const std::string shape = std::to_string(rows) + " rows, 64 blocks, " + std::to_string(splits) +
                              (splits == 1 ? " split" : " splits");
    for (Lists& lists : all) Allocate(bench, splits, lists.params);
    const std::string error = Check(inputs, all[0]);
    if (!error.empty()) return error + " (" + shape + ")";
    bench.Report({"attend", shape, MedianUs(bench, all), double(records) * RecordBytes(D)});
  }

  // Last, since it changes what is in the slots. Launch after launch fetches other records.
  constexpr int kSplits = 2;
  constexpr int kRotations = 16;
  const int missing = std::max(1, static_cast<int>(std::lround(records * (1 - kHitRate))));
  all.clear();
  for (int i = 0; i < kRotations; ++i) {
    all.push_back(MakeLists(inputs, i % kLayers, missing));
    all.back().params.missing = AttendMissing::kInPages;
    Allocate(bench, kSplits, all.back().params);
  }
  const std::string shape = std::to_string(rows) + " rows, " + std::to_string(missing) + " of " +
                            std::to_string(records) + " from pages, 2 splits";
  const std::string error = Check(inputs, all[0]);
  if (!error.empty()) return error + " (" + shape + ")";
  bench.Report({"attend", shape, MedianUs(bench, all), double(records) * RecordBytes(D)});
  return "";
}

}  // namespace nosara::kernels::bench
