#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/direct_attention.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using AttendTest = KernelTest;

/// How much of each list is missing.
enum class Missing { kNone, kAny, kAllThatMay };

struct Shape {
  int head_dim, group, kv_heads;
  int splits = 1;
  AttendMissing where = AttendMissing::kInSlots;
  Missing missing = Missing::kAny;
  AttendBias bias = AttendBias::kCache;
  float query_scale = 1;
};

/// Everything of one batch but the splits.
struct Batch {
  std::vector<StepRow> info;
  std::vector<__nv_bfloat16> q;
  std::vector<int32_t> slots, blocks;
  std::vector<int2> ranges;
  int max_selected = 70;
};

/// One row of each sequence, whose lists end with the missing blocks: some that have a slot in the
/// world, and some that take the place of one that has. The row's own block never is one of them.
Batch MakeBatch(CacheWorld& world, int group, Missing missing, float query_scale, Random& random) {
  const int Hkv = world.options().kv_heads;
  Batch batch;
  for (const int32_t s : random.Sample(world.sequences(), world.sequences())) {
    if (random.Chance(0.3)) batch.info.push_back({-1, 77});
    // Some do not see the end of their last block.
    const int back = random.Chance(0.3) ? random.Below(3) : 0;
    batch.info.push_back({s, std::max(0, world.tokens(s) - 1 - back)});
  }
  const int rows = static_cast<int>(batch.info.size());
  batch.q = random.NormalsBf16(size_t(rows) * Hkv * group * world.options().head_dim, query_scale);
  batch.slots = Poison<int32_t>(rows * Hkv * batch.max_selected);
  batch.blocks = batch.slots;
  batch.ranges.assign(rows * Hkv, make_int2(0, 0));
  const CacheView view = world.View();
  for (int r = 0; r < rows; ++r) {
    const StepRow row = batch.info[r];
    if (row.sequence < 0) continue;
    for (int h = 0; h < Hkv; ++h) {
      const int own = row.position / kBlockTokens;
      const auto stored = [&](int32_t b) {
        return view.pages[int64_t{row.sequence} * view.max_blocks + b] != 0;
      };
      // Of the blocks with a slot up to the row's own, some, and always the own one; any order.
      std::vector<int32_t> with_slot, without_slot;
      for (int32_t b = 0; b < own; ++b) {
        (view.SlotOf(row.sequence, Hkv + h, b) >= 0 ? with_slot : without_slot).push_back(b);
      }
      random.Shuffle(with_slot);
      random.Shuffle(without_slot);
      const int others = std::min<int>(with_slot.size(), batch.max_selected - 1);
      with_slot.resize(random.Chance(0.5) ? others : random.Below(others + 1));
      const int may = static_cast<int>(std::count_if(with_slot.begin(), with_slot.end(), stored));
      int num_missing = missing == Missing::kAllThatMay ? may : 0;
      if (missing == Missing::kAny) num_missing = random.Below(may + 1);
      struct Entry {
        int32_t slot, block;
      };
      std::vector<Entry> here, away;
      for (const int32_t b : with_slot) {
        const int32_t slot = static_cast<int32_t>(view.SlotOf(row.sequence, Hkv + h, b));
        if (!stored(b) || static_cast<int>(away.size()) == num_missing) {
          here.push_back({slot, b});
        } else if (!without_slot.empty() && random.Chance(0.5)) {
          away.push_back({slot, without_slot.back()});
          without_slot.pop_back();
        } else {
          away.push_back({slot, b});
        }
      }
      here.push_back({static_cast<int32_t>(view.SlotOf(row.sequence, Hkv + h, own)), own});
      random.Shuffle(here);
      batch.ranges[r * Hkv + h] = make_int2(here.size(), here.size() + away.size());
      here.insert(here.end(), away.begin(), away.end());
      for (size_t i = 0; i < here.size(); ++i) {
        batch.slots[(r * Hkv + h) * batch.max_selected + i] = here[i].slot;
        batch.blocks[(r * Hkv + h) * batch.max_selected + i] = here[i].block;
      }
    }
  }
  return batch;
}

/// Writes poison over the slots of what is missing, in `before`, and the records of their pages, in
/// `after`. Returns how many there are.
int FillMissing(const Batch& batch, CacheWorld& before, CacheWorld& after) {
  const CacheView poisoned = before.View(), filled = after.View();
  const int Hkv = before.options().kv_heads;
  const int64_t bytes = RecordBytes(filled.head_dim);
  int count = 0;
  for (size_t pair = 0; pair < batch.ranges.size(); ++pair) {
    const int sequence = batch.info[pair / Hkv].sequence;
    for (int i = batch.ranges[pair].x; i < batch.ranges[pair].y; ++i) {
      const int64_t entry = pair * batch.max_selected + i;
      const uint64_t page =
          filled.pages[int64_t{sequence} * filled.max_blocks + batch.blocks[entry]];
      const int record = Hkv + static_cast<int>(pair) % Hkv;
      std::memcpy(filled.Slot(batch.slots[entry]),
                  reinterpret_cast<const std::byte*>(page) + record * bytes, bytes);
      std::memset(poisoned.Slot(batch.slots[entry]), 0xff, bytes);
      ++count;
    }
  }
  return count;
}

/// Attention over the slots of `world`, as its formula says.
std::vector<DirectAttention> ExpectedOutput(const Batch& batch, const Shape& shape,
                                            CacheWorld& world) {
  const CacheView view = world.View();
  const int Hq = shape.kv_heads * shape.group;
  std::vector<DirectAttention> all;
  for (size_t r = 0; r < batch.info.size(); ++r) {
    for (int head = 0; head < Hq; ++head) {
      const int64_t pair = int64_t(r) * shape.kv_heads + head / shape.group;
      std::vector<std::pair<std::byte*, int>> list;
      for (int i = 0; i < batch.ranges[pair].y; ++i) {
        const int64_t at = pair * batch.max_selected + i;
        list.push_back({view.Slot(batch.slots[at]), batch.blocks[at]});
      }
      all.push_back(AttendDirectly(&batch.q[(r * Hq + head) * shape.head_dim], shape.head_dim,
                                   batch.info[r].position, shape.bias, list));
    }
  }
  return all;
}

/// Expects `out` to be `expected`, and zeros in padding rows.
void CheckOutput(const Batch& batch, const Shape& shape, const std::vector<__nv_bfloat16>& out,
                 const std::vector<DirectAttention>& expected) {
  const int D = shape.head_dim;
  const int Hq = shape.kv_heads * shape.group;
  Comparison comparison("output, at row");
  for (size_t i = 0; i < expected.size(); ++i) {
    const int r = static_cast<int>(i) / Hq;
    for (int d = 0; d < D; ++d) {
      const double actual = ToFloat(out[i * D + d]);
      if (batch.info[r].sequence < 0) {
        comparison.Near(actual, 0, 0, r);
        continue;
      }
      // Large queries: the logit's own f32 error counts, relative in p.
      const double size = expected[i].size[d];
      comparison.Near(
          actual, expected[i].output[d],
          RoundedAttentionTolerance(expected[i].output[d], size) + 2e-6 * shape.query_scale * size,
          r);
    }
  }
}

/// `replays`: 0 for a direct launch, otherwise how often it is replayed after a capture. Adds the
/// records that it saw fetched to `fetched`, where given.
void CheckShape(Random& random, CacheWorld& world, const Shape& shape, int replays = 0,
                int* fetched = nullptr) {
  const bool in_pages = shape.where != AttendMissing::kInSlots;
  const bool arriving = shape.where == AttendMissing::kArriving;
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
               << ", splits " << shape.splits << ", missing ones in "
               << (arriving   ? "pages and on their way"
                   : in_pages ? "pages"
                              : "slots")
               << ", with bias " << (shape.bias == AttendBias::kCache) << ", query scale "
               << shape.query_scale << ", replays " << replays);
  const Batch batch = MakeBatch(world, shape.group, shape.missing, shape.query_scale, random);
  const int rows = static_cast<int>(batch.info.size());
  const int Hq = shape.kv_heads * shape.group;
  CacheWorld before(world), after(world);
  const int missing = FillMissing(batch, before, after);
  if (fetched != nullptr) *fetched += missing;
  const std::vector<DirectAttention> expected = ExpectedOutput(batch, shape, after);
  const std::vector<std::byte> initial_slots = in_pages ? before.slots : after.slots;
  std::copy(initial_slots.begin(), initial_slots.end(), before.slots.begin());

  DeviceMirror mirror(before);
  DeviceArray<__nv_bfloat16> q(batch.q), out(Poison<__nv_bfloat16>(batch.q.size()));
  DeviceArray<StepRow> info(batch.info);
  DeviceArray<int32_t> slots(batch.slots), blocks(batch.blocks);
  DeviceArray<int2> ranges(batch.ranges);
  const std::vector<float2> poison_mz =
      Poison<float2>(size_t(rows) * shape.kv_heads * shape.splits * shape.group);
  const std::vector<float> poison_o = Poison<float>(poison_mz.size() * shape.head_dim);
  DeviceArray<float> partial_o(poison_o);
  DeviceArray<float2> partial_mz(poison_mz);
  const std::vector<int32_t> zeros(rows * shape.kv_heads * ((shape.group + 15) / 16), 0);
  DeviceArray<int32_t> finished(zeros);
  AttendParams params;
  params.q = q.data();
  params.rows_info = info.data();
  params.slots = slots.data();
  params.blocks = blocks.data();
  params.ranges = ranges.data();
  params.cache = mirror.View();
  params.partial_o = partial_o.data();
  params.partial_mz = partial_mz.data();
  params.finished = finished.data();
  params.out = out.data();
  params.rows = rows;
  params.num_heads = Hq;
  params.num_kv_heads = shape.kv_heads;
  params.layer = 1;
  params.max_selected = batch.max_selected;
  params.num_splits = shape.splits;
  params.missing = shape.where;
  params.bias = shape.bias;

  // Some of the missing records come by the host, while the kernel runs.
  constexpr uint32_t kStep = 77;
  const DeviceArray<uint32_t> step(std::vector<uint32_t>{kStep});
  std::vector<int32_t> sources(batch.slots.size(), 12345);
  std::vector<std::pair<int32_t, const std::byte*>> sent;  // slot of the record, its bytes
  if (arriving) {
    for (size_t pair = 0; pair < batch.ranges.size(); ++pair) {
      for (int i = batch.ranges[pair].x; i < batch.ranges[pair].y; ++i) {
        const size_t entry = pair * batch.max_selected + i;
        sources[entry] = random.Chance(0.7) ? static_cast<int32_t>(sent.size()) : -1;
        if (sources[entry] < 0) continue;
        sent.emplace_back(batch.slots[entry], after.View().Slot(batch.slots[entry]));
      }
    }
  }
  const int64_t record_bytes = RecordBytes(shape.head_dim);
  const DeviceArray<int32_t> device_sources(sources);
  MappedMemory landing(sent.size() * record_bytes), arrived(sent.size() * sizeof(uint64_t));
  params.arrivals = {device_sources.data(), landing.device(),
                     reinterpret_cast<const uint64_t*>(arrived.device()), step.data()};
  std::memset(arrived.host(), 0, arrived.bytes());
  const auto send = [&] {
    std::vector<int32_t> order(sent.size());
    std::iota(order.begin(), order.end(), 0);
    random.Shuffle(order);
    for (const int32_t i : order) {
      std::memcpy(landing.host() + i * record_bytes, sent[i].second, record_bytes);
      std::atomic_ref<uint64_t>(reinterpret_cast<uint64_t*>(arrived.host())[i])
          .store(ArrivalTag(kStep, 1), std::memory_order_release);
    }
  };
  const auto reset = [&] {
    std::copy(initial_slots.begin(), initial_slots.end(), before.slots.begin());
    mirror.UploadSlots();
    out.Upload(Poison<__nv_bfloat16>(batch.q.size()));
    partial_o.Upload(poison_o);
    partial_mz.Upload(poison_mz);
  };
  const auto check = [&] {
    CheckOutput(batch, shape, out.Download(), expected);
    ExpectSameBytes(finished.Download(), zeros, "counters of finished shares");
    partial_o.Download();  // looks at the guards
    partial_mz.Download();
    // The records of the missing blocks, and nothing else.
    mirror.Download();
    ExpectSameBytes(before.slots, after.slots, "bytes of slots");
  };
  if (arriving) {
    // Half of the runs find everything there, half wait.
    if (random.Chance(0.5)) send();
    ASSERT_EQ(LaunchAttend(params, nullptr), cudaSuccess);
    send();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    check();
  } else if (replays == 0) {
    Launch(LaunchAttend, params);
    check();
  } else {
    const CapturedLaunch captured(LaunchAttend, params);
    for (int i = 0; i < replays; ++i) {
      if (i > 0) reset();
      captured.Replay();
      check();
    }
  }
  if (!in_pages || ::testing::Test::HasFailure()) return;

  // Once they are in their slots they may as well be read from there.
  const std::vector<__nv_bfloat16> by_pages = out.Download();
  params.missing = AttendMissing::kInSlots;
  out.Upload(Poison<__nv_bfloat16>(batch.q.size()));
  Launch(LaunchAttend, params);
  check();
  if (shape.splits > 1 && missing > 0) return;
  // A single share has the same entries in the same order either way: the same but for what the
  // compiler makes of two loops, which may now and then round a probability the other way.
  const std::vector<__nv_bfloat16> by_slots = out.Download();
  Comparison comparison("output from pages and from slots, at");
  for (size_t i = 0; i < by_slots.size(); ++i) {
    const double value = ToFloat(by_slots[i]);
    comparison.Near(ToFloat(by_pages[i]), value, kBf16Step * std::abs(value) + 1e-3, i);
  }
}

std::unique_ptr<CacheWorld> MakeWorld(int head_dim, int kv_heads, Random& random) {
  WorldOptions options;
  options.head_dim = head_dim;
  options.layers = 2;
  options.kv_heads = kv_heads;
  options.sequences = {{1}, {2}, {63}, {64}, {65}, {1000, 9}, {2000, 14}, {5000, 40}};
  return std::make_unique<CacheWorld>(options, random);
}

TEST_F(AttendTest, AgreesWithAttentionInDoublePrecision) {
  for (const int head_dim : {64, 128}) {
    for (const int kv_heads : {1, 2, 3}) {
      const auto world = MakeWorld(head_dim, kv_heads, random_);
      for (const int group : {1, 4, 8, 16, 32}) {
        for (const AttendMissing where : {AttendMissing::kInSlots, AttendMissing::kInPages}) {
          Shape shape{head_dim, group, kv_heads, random_.Between(1, 6), where};
          if (random_.Chance(0.2)) shape.bias = AttendBias::kNone;
          CheckShape(random_, *world, shape);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(AttendTest, AnyNumberOfSplitsGivesTheSame) {
  // Up to more of them than any list has blocks: 40 at most.
  const auto world = MakeWorld(128, 2, random_);
  for (const AttendMissing where : {AttendMissing::kInSlots, AttendMissing::kInPages}) {
    for (const int splits : {1, 2, 3, 4, 7, 8, 16, 32}) {
      CheckShape(random_, *world, {128, 16, 2, splits, where});
      if (HasFailure()) return;
    }
  }
}

TEST_F(AttendTest, FetchesNothingSomeOrAllOfAList) {
  const auto world = MakeWorld(128, 2, random_);
  for (const Missing missing : {Missing::kNone, Missing::kAny, Missing::kAllThatMay}) {
    int fetched = 0;
    for (const int splits : {1, 2, 3, 8}) {
      Shape shape{128, 16, 2, splits, AttendMissing::kInPages};
      shape.missing = missing;
      CheckShape(random_, *world, shape, /*replays=*/0, &fetched);
      if (HasFailure()) return;
    }
    if (missing == Missing::kNone) {
      EXPECT_EQ(fetched, 0);
    }
    if (missing == Missing::kAllThatMay) {
      EXPECT_GE(fetched, 50) << "too few for several in a share";
    }
  }
}

TEST_F(AttendTest, WaitsForWhatTheHostBrings) {
  for (const int head_dim : {64, 128}) {
    const auto world = MakeWorld(head_dim, 2, random_);
    int fetched = 0;
    for (const int splits : {1, 2, 3, 8}) {
      Shape shape{head_dim, 16, 2, splits, AttendMissing::kArriving};
      shape.missing = splits == 2 ? Missing::kAllThatMay : Missing::kAny;
      CheckShape(random_, *world, shape, /*replays=*/0, &fetched);
      if (HasFailure()) return;
    }
    EXPECT_GT(fetched, 0);
  }
}

TEST_F(AttendTest, PeakedAndFlatDistributions) {
  const auto world = MakeWorld(128, 2, random_);
  for (const float scale : {0.0f, 0.01f, 20.0f}) {
    for (const AttendBias bias : {AttendBias::kNone, AttendBias::kCache}) {
      for (const AttendMissing where : {AttendMissing::kInSlots, AttendMissing::kInPages}) {
        CheckShape(random_, *world, {128, 16, 2, 6, where, Missing::kAny, bias, scale});
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(AttendTest, LargestGroup) {
  for (const AttendMissing where : {AttendMissing::kInSlots, AttendMissing::kInPages}) {
    const auto wide = MakeWorld(128, 1, random_);
    CheckShape(random_, *wide, {128, kMaxGroup, 1, 5, where});
    CheckShape(random_, *wide, {128, 17, 1, 2, where});
    CheckShape(random_, *wide, {128, 5, 1, 5, where});
    const auto narrow = MakeWorld(64, 1, random_);
    CheckShape(random_, *narrow, {64, kMaxGroup, 1, 5, where});
  }
}

TEST_F(AttendTest, CanBeCapturedAndReplayed) {
  const auto world = MakeWorld(128, 2, random_);
  for (const AttendMissing where : {AttendMissing::kInSlots, AttendMissing::kInPages}) {
    for (const int splits : {1, 4}) {
      CheckShape(random_, *world, {128, 16, 2, splits, where}, /*replays=*/3);
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace nosara::kernels
