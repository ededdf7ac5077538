// Resolve and OpenBlocks: random operations against the reference, and against a plain map.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "kernels/resolve/resolve_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

/// The blocks with a slot of one (sequence, record), with the step that last selected each.
using Residents = std::map<int32_t, uint32_t>;

Residents ReadResidents(CacheWorld& world, int sequence, int record) {
  const CacheView view = world.View();
  Residents residents;
  for (const int32_t block : world.Resident(sequence, record)) {
    const int64_t row = view.TableRow(sequence, record);
    residents[block] =
        view.stamp[row * view.max_frames + view.slot_of[row * view.max_blocks + block]];
  }
  return residents;
}

/// The rule of resolve.h in the plainest form: makes room for `block` and puts it in. False when
/// there is none.
bool Insert(Residents& residents, int32_t block, uint32_t step, size_t slots,
            const uint64_t* pages) {
  if (residents.size() >= slots) {
    auto victim = residents.end();
    for (auto it = residents.begin(); it != residents.end(); ++it) {
      if (pages[it->first] == 0 || it->second == step) continue;
      if (victim == residents.end() || it->second < victim->second) victim = it;
    }
    if (victim == residents.end()) return false;
    residents.erase(victim);
  }
  residents[block] = step;
  return true;
}

/// A step's selections on the host.
struct Selections {
  std::vector<StepRow> info;
  std::vector<int32_t> selected, count;
  int max_selected = 0;
};

class ResolveTest : public KernelTest {
 protected:
  /// Runs LaunchResolve for `layer` on the mirror of `world`, and checks its result against the
  /// reference and the map. `world` gets the tables of the device. Returns the number of loads.
  int CheckResolve(CacheWorld& world, DeviceMirror& mirror, const Selections& selections, int layer,
                   uint32_t step, int expected_failures = 0,
                   LaunchMode mode = LaunchMode::kDirect) {
    const int Hkv = world.options().kv_heads;
    const int rows = static_cast<int>(selections.info.size());
    const int pairs = rows * Hkv;
    const int max_selected = selections.max_selected;
    CacheWorld expected_world(world);

    std::vector<int32_t> slots = Poison<int32_t>(pairs * max_selected), blocks = slots;
    std::vector<int2> ranges = Poison<int2>(pairs);
    std::vector<Load> loads = Poison<Load>(pairs * max_selected);
    std::vector<int32_t> counters = {0, 5};           // loads, failures; both are added to
    std::vector<int2> totals(rows, make_int2(3, 4));  // these too
    const std::vector<uint32_t> steps = {step};
    DeviceArray<StepRow> device_info(selections.info);
    DeviceArray<int32_t> device_selected(selections.selected), device_count(selections.count),
        device_slots(slots), device_blocks(blocks), device_counters(counters);
    DeviceArray<uint32_t> device_step(steps);
    DeviceArray<int2> device_ranges(ranges), device_totals(totals);
    DeviceArray<Load> device_loads(loads);
    ResolveParams params;
    params.rows = rows;
    params.num_kv_heads = Hkv;
    params.layer = layer;
    params.max_selected = max_selected;
    params.rows_info = device_info.data();
    params.selected = device_selected.data();
    params.count = device_count.data();
    params.cache = mirror.View();
    params.step = device_step.data();
    params.slots = device_slots.data();
    params.blocks = device_blocks.data();
    params.ranges = device_ranges.data();
    params.loads = device_loads.data();
    params.num_loads = device_counters.data();
    params.failures = device_counters.data() + 1;
    params.totals = device_totals.data();
    Launch(LaunchResolve, params, mode);

    params.rows_info = selections.info.data();
    params.selected = selections.selected.data();
    params.count = selections.count.data();
    params.cache = expected_world.View();
    params.step = steps.data();
    params.slots = slots.data();
    params.blocks = blocks.data();
    params.ranges = ranges.data();
    params.loads = loads.data();
    params.num_loads = counters.data();
    params.failures = counters.data() + 1;
    params.totals = totals.data();
    ResolveReference(params);
    EXPECT_EQ(counters[1], 5 + expected_failures) << "the reference's own failures";

    const std::vector<int32_t> got_slots = device_slots.Download();
    const std::vector<int32_t> got_blocks = device_blocks.Download();
    const std::vector<int2> got_ranges = device_ranges.Download();
    const std::vector<Load> got_loads = device_loads.Download();
    const std::vector<int32_t> got_counters = device_counters.Download();
    CacheWorld before(world);
    mirror.DownloadTables();
    EXPECT_EQ(world.BrokenInvariant(), "");
    EXPECT_EQ(got_counters, counters) << "(loads, failures)";
    ExpectSameBytes(device_totals.Download(), totals, "totals");
    if (HasFailure()) return 0;

    const CacheView view = world.View();
    using LoadKey = std::tuple<int, int, int, int>;
    std::set<LoadKey> load_set;
    for (int i = 0; i < got_counters[0]; ++i) {
      const Load& load = got_loads[i];
      load_set.insert({load.sequence, load.record, load.block, load.slot});
    }
    EXPECT_EQ(static_cast<int>(load_set.size()), got_counters[0]) << "a load came twice";
    size_t listed_loads = 0;
    for (int r = 0; r < rows; ++r) {
      const int sequence = selections.info[r].sequence;
      for (int h = 0; h < Hkv; ++h) {
        SCOPED_TRACE(::testing::Message() << "step " << step << ", layer " << layer << ", row " << r
                                          << ", sequence " << sequence << ", head " << h);
        const int pair = r * Hkv + h;
        const int first = pair * max_selected;
        if (sequence < 0) continue;
        const int record = layer * Hkv + h;
        EXPECT_EQ(got_ranges[pair].x, ranges[pair].x) << "resident blocks";
        EXPECT_EQ(got_ranges[pair].y, ranges[pair].y) << "resident and loaded blocks";
        if (HasFailure()) return 0;

        // Resident ones in the order of the selection, all with their slots.
        for (int i = 0; i < ranges[pair].y; ++i) {
          if (i < ranges[pair].x) {
            EXPECT_EQ(got_blocks[first + i], blocks[first + i]) << "entry " << i;
          }
          EXPECT_GE(got_blocks[first + i], 0) << "entry " << i;
          EXPECT_LT(got_blocks[first + i], view.max_blocks) << "entry " << i;
          if (HasFailure()) return 0;
          EXPECT_EQ(got_slots[first + i], view.SlotOf(sequence, record, got_blocks[first + i]))
              << "entry " << i << ", block " << got_blocks[first + i];
          if (HasFailure()) return 0;
        }
        // Loaded ones are selected ones, each with its load.
        for (int i = ranges[pair].x; i < ranges[pair].y; ++i, ++listed_loads) {
          const int32_t block = got_blocks[first + i];
          EXPECT_EQ(std::count(&selections.selected[first],
                               &selections.selected[first] + selections.count[pair], block),
                    1)
              << "loaded block " << block;
          const int slot = view.slot_of[view.TableRow(sequence, record) * view.max_blocks + block];
          EXPECT_EQ(load_set.count({sequence, record, block, slot}), 1u)
              << "no load for block " << block << " in slot " << slot;
        }

        // Which of the missing blocks fail is the kernel's affair; otherwise there is one answer.
        if (expected_failures > 0) continue;
        EXPECT_EQ(std::set<int32_t>(&got_blocks[first], &got_blocks[first] + ranges[pair].y),
                  std::set<int32_t>(&blocks[first], &blocks[first] + ranges[pair].y));
        const Residents after = ReadResidents(world, sequence, record);
        EXPECT_EQ(after, ReadResidents(expected_world, sequence, record)) << "reference";
        Residents model = ReadResidents(before, sequence, record);
        for (int i = 0; i < selections.count[pair]; ++i) {
          const auto found = model.find(selections.selected[first + i]);
          if (found != model.end()) found->second = step;
        }
        for (int i = 0; i < selections.count[pair]; ++i) {
          const int32_t block = selections.selected[first + i];
          if (model.count(block) > 0) continue;
          EXPECT_TRUE(Insert(model, block, step, view.num_frames[sequence],
                             view.pages + int64_t{sequence} * view.max_blocks));
        }
        EXPECT_EQ(after, model) << "map";
        if (HasFailure()) return 0;
      }
    }
    EXPECT_EQ(listed_loads, load_set.size()) << "loads that are in no list";
    // Other layers are left alone.
    for (int s = 0; s < world.sequences(); ++s) {
      for (int record = 0; record < view.records; ++record) {
        if (record / Hkv == layer) continue;
        EXPECT_EQ(ReadResidents(world, s, record), ReadResidents(before, s, record));
      }
    }
    return got_counters[0];
  }

  /// Runs LaunchOpenBlocks and checks it likewise.
  void CheckOpenBlocks(CacheWorld& world, DeviceMirror& mirror, const std::vector<StepRow>& info,
                       uint32_t step, LaunchMode mode = LaunchMode::kDirect) {
    CacheWorld expected(world);
    CacheWorld before(world);
    std::vector<int32_t> failures = {0};
    const std::vector<uint32_t> steps = {step};
    DeviceArray<StepRow> device_info(info);
    DeviceArray<int32_t> device_failures(failures);
    DeviceArray<uint32_t> device_step(steps);
    OpenBlocksParams params{device_info.data(), mirror.View(), device_step.data(),
                            device_failures.data(), static_cast<int>(info.size())};
    Launch(LaunchOpenBlocks, params, mode);
    params = {info.data(), expected.View(), steps.data(), failures.data(),
              static_cast<int>(info.size())};
    OpenBlocksReference(params);
    EXPECT_EQ(failures[0], 0);
    EXPECT_EQ(device_failures.Download(), failures);
    mirror.DownloadTables();
    EXPECT_EQ(world.BrokenInvariant(), "") << "after opening blocks in step " << step;
    const CacheView view = world.View();
    for (int s = 0; s < world.sequences(); ++s) {
      for (int record = 0; record < view.records; ++record) {
        Residents model = ReadResidents(before, s, record);
        for (const StepRow& row : info) {
          if (row.sequence != s || row.position % 64 != 0) continue;
          EXPECT_TRUE(Insert(model, row.position / 64, step, view.num_frames[s],
                             view.pages + int64_t{s} * view.max_blocks));
        }
        const Residents after = ReadResidents(world, s, record);
        ASSERT_EQ(after, model) << "map; sequence " << s << ", record " << record << ", step "
                                << step;
        ASSERT_EQ(after, ReadResidents(expected, s, record)) << "reference";
      }
    }
  }

  /// One row for each sequence, in random order among padding, each with its own selection of
  /// `choose(sequence, head)`, ascending.
  template <typename Choose>
  Selections MakeSelections(const CacheWorld& world, int max_selected, Choose choose) {
    const int Hkv = world.options().kv_heads;
    Selections result;
    result.max_selected = max_selected;
    for (const int32_t s : random_.Sample(world.sequences(), world.sequences())) {
      if (random_.Chance(0.2)) result.info.push_back({-1, 0});
      result.info.push_back({s, 0});
    }
    result.selected = Poison<int32_t>(result.info.size() * Hkv * max_selected);
    result.count.assign(result.info.size() * Hkv, 0);
    for (size_t r = 0; r < result.info.size(); ++r) {
      if (result.info[r].sequence < 0) continue;
      for (int h = 0; h < Hkv; ++h) {
        std::vector<int32_t> blocks = choose(result.info[r].sequence, h);
        std::sort(blocks.begin(), blocks.end());
        result.count[r * Hkv + h] = static_cast<int32_t>(blocks.size());
        std::copy(blocks.begin(), blocks.end(),
                  result.selected.begin() + (r * Hkv + h) * max_selected);
      }
    }
    return result;
  }

  /// A world of tables: what the slots hold does not matter here.
  WorldOptions Tables(int kv_heads, std::vector<SequenceSpec> sequences) {
    WorldOptions options;
    options.head_dim = 64;
    options.layers = 2;
    options.kv_heads = kv_heads;
    options.with_pages = false;
    options.sequences = std::move(sequences);
    return options;
  }
};

TEST_F(ResolveTest, ManyStepsOfGrowingSequences) {
  constexpr int kTopK = 24;
  constexpr int kUnstored = 4;  // blocks not stored at a time, at most
  WorldOptions options = Tables(2, {{1, kTopK + kUnstored},
                                    {64, kTopK + kUnstored + 1},
                                    {2000, kTopK + kUnstored},
                                    {9000, 3 * kTopK},
                                    {4000, kTopK + kUnstored + 70}});
  options.spare = 160;
  CacheWorld world(options, random_);
  world.slots.clear();  // only tables matter here, and each step copies them
  ASSERT_EQ(world.BrokenInvariant(), "");
  DeviceMirror mirror(world);
  const int max_blocks = world.View().max_blocks;
  std::vector<int> blocks(world.sequences());
  for (int s = 0; s < world.sequences(); ++s) blocks[s] = world.blocks(s);
  // Query-like selections wander slowly: mostly what was selected before.
  std::map<std::pair<int, int>, std::vector<int32_t>> last;
  int64_t loads = 0, selected = 0;
  for (uint32_t step = 100; step < 400; ++step) {
    // Blocks get stored in any order, and in time.
    for (int s = 0; s < world.sequences(); ++s) {
      std::vector<int> unstored;
      for (int b = 0; b < blocks[s]; ++b) {
        if (world.pages[s * max_blocks + b] == 0) unstored.push_back(b);
      }
      for (size_t i = 0; i + 1 < unstored.size(); ++i) {
        if (unstored.size() - i > 3 || random_.Chance(0.3)) {
          world.pages[s * max_blocks + unstored[i]] = 1;
        }
      }
    }
    mirror.UploadPages();
    std::vector<StepRow> info;
    for (int s = 0; s < world.sequences(); ++s) {
      const bool opens = random_.Chance(0.3) && blocks[s] < max_blocks;
      info.push_back({s, opens ? 64 * blocks[s]++ : 64 * blocks[s] - 1 - random_.Below(63)});
      if (random_.Chance(0.2)) info.push_back({-1, 64});
    }
    CheckOpenBlocks(world, mirror, info, step,
                    step == 100 ? LaunchMode::kGraph : LaunchMode::kDirect);
    if (HasFailure()) return;

    for (const int layer : {0, 1}) {
      const Selections selections = MakeSelections(world, kTopK + 3, [&](int s, int h) {
        std::vector<int32_t>& choice = last[{s, layer * 2 + h}];
        const bool jump = random_.Chance(0.05);
        std::set<int32_t> next = {0, blocks[s] - 1, std::max(0, blocks[s] - 2)};
        for (const int32_t b : choice) {
          if (!jump && static_cast<int>(next.size()) < kTopK && random_.Chance(0.9)) next.insert(b);
        }
        const int size = std::min(kTopK, blocks[s]);
        while (static_cast<int>(next.size()) < size) next.insert(random_.Below(blocks[s]));
        choice.assign(next.begin(), next.end());
        return choice;
      });
      for (const int32_t count : selections.count) selected += count;
      loads += CheckResolve(world, mirror, selections, layer, step, 0,
                            step == 100 ? LaunchMode::kGraph : LaunchMode::kDirect);
      if (HasFailure()) return;
    }
  }
  // The test means something only if much was found and much was not.
  EXPECT_GT(loads, selected / 100);
  EXPECT_LT(loads, selected / 2);
}

TEST_F(ResolveTest, AllResidentAndNoneResident) {
  for (const int kv_heads : {1, 3, 4}) {
    CacheWorld world(Tables(kv_heads, {{12000, 70}, {12000, 129}, {8200, 140}}), random_);
    ASSERT_EQ(world.BrokenInvariant(), "");
    DeviceMirror mirror(world);
    const Selections hits = MakeSelections(world, 64, [&](int s, int h) {
      std::vector<int32_t> blocks = world.Resident(s, kv_heads + h);
      random_.Shuffle(blocks);
      blocks.resize(64);
      return blocks;
    });
    EXPECT_EQ(CheckResolve(world, mirror, hits, 1, 50), 0);
    const Selections misses = MakeSelections(world, 64, [&](int s, int h) {
      const std::vector<int32_t> resident = world.Resident(s, kv_heads + h);
      std::vector<int32_t> blocks;
      for (int b = 0; b < world.blocks(s) && blocks.size() < 50; ++b) {
        if (!std::binary_search(resident.begin(), resident.end(), b)) blocks.push_back(b);
      }
      return blocks;
    });
    int expected = 0;
    for (const int32_t count : misses.count) expected += count;
    EXPECT_GT(expected, 0);
    EXPECT_EQ(CheckResolve(world, mirror, misses, 1, 51), expected);
    if (HasFailure()) return;
  }
}

TEST_F(ResolveTest, OnlyWhatIsElsewhereIsAskedOfTheHost) {
  CacheWorld world(Tables(2, {{12000, 70}, {9000, 90}}), random_);
  for (uint64_t& page : world.pages) {
    if (page != 0) page = random_.Chance(0.5) ? kStoredElsewhere : 4096;
  }
  DeviceMirror mirror(world);
  const Selections selections = MakeSelections(world, 64, [&](int s, int) {
    std::vector<int32_t> blocks = random_.Sample(world.blocks(s), 64);
    return blocks;
  });
  const int rows = static_cast<int>(selections.info.size());
  const size_t entries = selections.selected.size();
  const DeviceArray<StepRow> info(selections.info);
  const DeviceArray<int32_t> selected(selections.selected), count(selections.count);
  const DeviceArray<uint32_t> step(std::vector<uint32_t>{9000});
  DeviceArray<int32_t> slots(Poison<int32_t>(entries)), blocks(Poison<int32_t>(entries)),
      sources(Poison<int32_t>(entries)), counters(std::vector<int32_t>{0, 0});
  DeviceArray<int2> ranges(Poison<int2>(rows * 2));
  DeviceArray<Load> loads(Poison<Load>(entries));
  ResolveParams params;
  params.rows_info = info.data();
  params.selected = selected.data();
  params.count = count.data();
  params.cache = mirror.View();
  params.step = step.data();
  params.slots = slots.data();
  params.blocks = blocks.data();
  params.ranges = ranges.data();
  params.loads = loads.data();
  params.num_loads = counters.data();
  params.sources = sources.data();
  params.failures = counters.data() + 1;
  params.rows = rows;
  params.num_kv_heads = 2;
  params.layer = 1;
  params.max_selected = 64;
  Launch(LaunchResolve, params);
  MappedMemory asked(entries * sizeof(Load)), bell(sizeof(uint32_t));
  Launch(LaunchPublishLoads,
         PublishLoadsParams{loads.data(), counters.data(), reinterpret_cast<Load*>(asked.device()),
                            reinterpret_cast<uint32_t*>(bell.device())});
  mirror.DownloadTables();

  const std::vector<int32_t> got_sources = sources.Download(), got_blocks = blocks.Download();
  const std::vector<int2> got_ranges = ranges.Download();
  const int num_loads = counters.Download()[0];
  EXPECT_EQ(counters.Download()[1], 0);
  EXPECT_EQ(*reinterpret_cast<const uint32_t*>(bell.host()), num_loads + 1u);
  const Load* host_loads = reinterpret_cast<const Load*>(asked.host());
  const CacheView view = world.View();
  std::set<int32_t> seen;
  int direct = 0;
  for (int pair = 0; pair < rows * 2; ++pair) {
    const int sequence = selections.info[pair / 2].sequence;
    if (sequence < 0) continue;
    for (int i = got_ranges[pair].x; i < got_ranges[pair].y; ++i) {
      const int32_t block = got_blocks[pair * 64 + i];
      const int32_t source = got_sources[pair * 64 + i];
      if (view.pages[int64_t{sequence} * view.max_blocks + block] != kStoredElsewhere) {
        EXPECT_EQ(source, -1);
        ++direct;
        continue;
      }
      ASSERT_GE(source, 0);
      ASSERT_LT(source, num_loads);
      EXPECT_TRUE(seen.insert(source).second);
      const Load& load = host_loads[source];
      const int record = 2 + pair % 2;
      EXPECT_EQ(load.sequence, sequence);
      EXPECT_EQ(load.record, record);
      EXPECT_EQ(load.block, block);
      EXPECT_EQ(load.slot, view.slot_of[view.TableRow(sequence, record) * view.max_blocks + block]);
    }
  }
  EXPECT_EQ(static_cast<int>(seen.size()), num_loads);
  EXPECT_GT(num_loads, 0);
  EXPECT_GT(direct, 0);
}

TEST_F(ResolveTest, NothingSelected) {
  CacheWorld world(Tables(2, {{1000, 8}, {3, 0}}), random_);
  DeviceMirror mirror(world);
  const Selections none =
      MakeSelections(world, 64, [](int, int) { return std::vector<int32_t>(); });
  EXPECT_EQ(CheckResolve(world, mirror, none, 0, 30), 0);
}

TEST_F(ResolveTest, FreeSlotsComeBeforeVictims) {
  // 40 blocks; 10 of the 30 slots are emptied first.
  CacheWorld world(Tables(2, {{2560, 30}}), random_);
  const CacheView view = world.View();
  for (int record = 0; record < view.records; ++record) {
    std::vector<int32_t> resident = world.Resident(0, record);
    random_.Shuffle(resident);
    int freed = 0;
    for (const int32_t block : resident) {
      if (freed == 10 || view.pages[block] == 0) continue;
      int32_t& slot = view.slot_of[int64_t{record} * view.max_blocks + block];
      view.block_of[int64_t{record} * view.max_frames + slot] = -1;  // its old stamp stays
      slot = -1;
      ++freed;
    }
  }
  ASSERT_EQ(world.BrokenInvariant(), "");
  DeviceMirror mirror(world);
  for (const uint32_t step : {60u, 61u, 62u}) {
    const Selections selections =
        MakeSelections(world, 16, [&](int, int) { return random_.Sample(16, 40); });
    CheckResolve(world, mirror, selections, 0, step);
    if (HasFailure()) return;
  }
}

TEST_F(ResolveTest, CountsWhatFindsNoSlot) {
  // Six slots, at most two blocks that are not stored; ten are selected.
  CacheWorld world(Tables(2, {{2000, 6}, {1500, 200}}), random_);
  DeviceMirror mirror(world);
  const CacheView view = world.View();
  int failures = 0;
  const Selections selections = MakeSelections(world, 12, [&](int s, int h) {
    std::vector<int32_t> blocks = random_.Sample(10, world.blocks(s));
    if (s == 0) {
      // Of the slots, those with a block that is not stored and not selected are lost.
      int usable = 6;
      for (const int32_t b : world.Resident(0, h)) {
        const bool selected = std::count(blocks.begin(), blocks.end(), b) > 0;
        if (!selected && view.pages[b] == 0) --usable;
      }
      failures += 10 - usable;
    }
    return blocks;
  });
  EXPECT_GT(failures, 0);
  CheckResolve(world, mirror, selections, 0, 40, failures);
}

TEST_F(ResolveTest, PaddingRowsAreLeftAsTheyAre) {
  // cache_view.h, StepRow: kernels leave the outputs of padding rows as they are.
  CacheWorld world(Tables(1, {{64}}), random_);
  DeviceMirror mirror(world);
  DeviceArray<StepRow> info(std::vector<StepRow>{{-1, 0}, {-1, 5}});
  DeviceArray<int32_t> selected(std::vector<int32_t>{0, 0}), count(std::vector<int32_t>{1, 1}),
      slots(Poison<int32_t>(2)), blocks(Poison<int32_t>(2)), counters(std::vector<int32_t>{0, 0});
  DeviceArray<uint32_t> step(std::vector<uint32_t>{30});
  DeviceArray<int2> ranges(Poison<int2>(2));
  DeviceArray<Load> loads(Poison<Load>(2));
  ResolveParams params;
  params.rows_info = info.data();
  params.selected = selected.data();
  params.count = count.data();
  params.cache = mirror.View();
  params.step = step.data();
  params.slots = slots.data();
  params.blocks = blocks.data();
  params.ranges = ranges.data();
  params.loads = loads.data();
  params.num_loads = counters.data();
  params.failures = counters.data() + 1;
  params.rows = 2;
  params.num_kv_heads = params.max_selected = 1;
  Launch(LaunchResolve, params);
  EXPECT_EQ(counters.Download(), (std::vector<int32_t>{0, 0}));
  ExpectPoison(slots.Download(), 0, 2, "slots");
  ExpectPoison(blocks.Download(), 0, 2, "blocks");
  ExpectPoison(ranges.Download(), 0, 2, "ranges");
  ExpectPoison(loads.Download(), 0, 2, "loads");
}

TEST_F(ResolveTest, ChunksOfSeveralSequences) {
  for (const int kv_heads : {1, 2, 3}) {
    CacheWorld world(Tables(kv_heads, {{9000, 90}, {64}, {3000}, {20000, 130}}), random_);
    world.slots.clear();
    DeviceMirror mirror(world);
    const CacheView host = world.View();
    for (uint32_t step = 40; step < 80; step += 2) {
      const int layer = random_.Below(2);
      SCOPED_TRACE(::testing::Message()
                   << "Hkv " << kv_heads << ", step " << step << ", layer " << layer);
      // Rows of each sequence together; their selections share a pool that its slots can hold.
      std::vector<StepRow> info;
      std::vector<std::vector<int32_t>> lists;
      const int max_selected = 40;
      for (const int32_t s : random_.Sample(4, 4)) {
        if (random_.Chance(0.4)) info.push_back({-1, 0});
        lists.resize(info.size() * kv_heads);
        const int rows = random_.Between(1, 20);
        std::vector<std::vector<int32_t>> pools;
        for (int h = 0; h < kv_heads; ++h) pools.push_back(random_.Sample(80, world.blocks(s)));
        for (int r = 0; r < rows; ++r) {
          info.push_back({s, 0});
          for (int h = 0; h < kv_heads; ++h) {
            std::vector<int32_t> list;
            const int pool = static_cast<int>(pools[h].size());
            for (const int32_t i : random_.Sample(random_.Between(0, max_selected), pool)) {
              list.push_back(pools[h][i]);
            }
            std::sort(list.begin(), list.end());
            lists.push_back(list);
          }
        }
      }
      const int rows = static_cast<int>(info.size());
      lists.resize(rows * kv_heads);
      std::vector<int32_t> selected = Poison<int32_t>(lists.size() * max_selected), count;
      for (size_t i = 0; i < lists.size(); ++i) {
        std::copy(lists[i].begin(), lists[i].end(), selected.begin() + i * max_selected);
        count.push_back(static_cast<int32_t>(lists[i].size()));
      }
      CacheWorld expected(world);
      std::vector<int32_t> counters = {0, 1};
      std::vector<int2> totals(rows, make_int2(7, 8));
      std::vector<Load> loads = Poison<Load>(lists.size() * max_selected);
      const std::vector<uint32_t> steps = {step};
      DeviceArray<StepRow> device_info(info);
      DeviceArray<int32_t> device_selected(selected), device_count(count),
          device_counters(counters);
      DeviceArray<int2> device_totals(totals);
      DeviceArray<Load> device_loads(loads);
      DeviceArray<uint32_t> device_step(steps);
      ResolveParams params;
      params.rows_info = device_info.data();
      params.selected = device_selected.data();
      params.count = device_count.data();
      params.cache = mirror.View();
      params.step = device_step.data();
      params.loads = device_loads.data();
      params.num_loads = device_counters.data();
      params.failures = device_counters.data() + 1;
      params.totals = device_totals.data();
      params.rows = rows;
      params.num_kv_heads = kv_heads;
      params.layer = layer;
      params.max_selected = max_selected;
      params.max_blocks = host.max_blocks;
      Launch(LaunchResolveChunks, params, step == 40 ? LaunchMode::kGraph : LaunchMode::kDirect);
      params.rows_info = info.data();
      params.selected = selected.data();
      params.count = count.data();
      params.cache = expected.View();
      params.step = steps.data();
      params.loads = loads.data();
      params.num_loads = counters.data();
      params.failures = counters.data() + 1;
      params.totals = totals.data();
      ResolveChunksReference(params);
      ASSERT_EQ(counters[1], 1) << "failures of the reference";
      ASSERT_EQ(device_counters.Download(), counters);
      ExpectSameBytes(device_totals.Download(), totals, "totals");
      mirror.DownloadTables();
      ASSERT_EQ(world.BrokenInvariant(), "");
      for (int s = 0; s < world.sequences(); ++s) {
        for (int record = 0; record < host.records; ++record) {
          ASSERT_EQ(ReadResidents(world, s, record), ReadResidents(expected, s, record))
              << "sequence " << s << ", record " << record;
        }
      }
      std::set<std::tuple<int, int, int>> got, wanted;
      const std::vector<Load> got_loads = device_loads.Download();
      for (int i = 0; i < counters[0]; ++i) {
        const Load& load = got_loads[i];
        got.insert({load.sequence, load.record, load.block});
        wanted.insert({loads[i].sequence, loads[i].record, loads[i].block});
        ASSERT_GE(load.sequence, 0);
        ASSERT_LT(load.sequence, world.sequences());
        EXPECT_EQ(
            load.slot,
            host.slot_of[host.TableRow(load.sequence, load.record) * host.max_blocks + load.block]);
      }
      ASSERT_EQ(got, wanted);
    }
  }
}

TEST_F(ResolveTest, AnOpenBlockIsNotOpenedAgain) {
  CacheWorld world(Tables(2, {{65, 4}}), random_);
  DeviceMirror mirror(world);
  CacheWorld before(world);
  std::vector<int32_t> failures = {0};
  DeviceArray<StepRow> info(std::vector<StepRow>{{0, 64}});
  DeviceArray<uint32_t> step(std::vector<uint32_t>{90});
  DeviceArray<int32_t> device_failures(failures);
  Launch(LaunchOpenBlocks,
         OpenBlocksParams{info.data(), mirror.View(), step.data(), device_failures.data(), 1});
  mirror.DownloadTables();
  EXPECT_EQ(world.slot_of, before.slot_of);
  EXPECT_EQ(world.block_of, before.block_of);
  EXPECT_EQ(world.stamp, before.stamp);
  EXPECT_EQ(device_failures.Download(), failures);
}

TEST_F(ResolveTest, AChunkOpensSeveralBlocks) {
  CacheWorld world(Tables(2, {{64, 20}, {640, 30}}), random_);
  DeviceMirror mirror(world);
  // The tables have room for four more blocks.
  std::vector<StepRow> info;
  for (int t = 64; t < 64 + 200; ++t) info.push_back({0, t});
  info.push_back({-1, 640});
  info.push_back({1, 640});
  CheckOpenBlocks(world, mirror, info, 77);
}

}  // namespace
}  // namespace nosara::kernels
