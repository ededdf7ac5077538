// Export, import of index parts, and shrinking.
#include "kernels/pages/pages_reference.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "kernels/common/record_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using PagesTest = KernelTest;

/// Pages as the store lays them out: some header, the index part, the records.
struct PageShape {
  PageOffsets offsets;
  int64_t bytes = 0;

  PageShape(int records, int head_dim) {
    const auto align = [](int64_t x) { return (x + 127) / 128 * 128; };
    offsets.index = align(64 + 8 * records);
    offsets.records = align(offsets.index + int64_t{records} * (8 * head_dim + 16));
    bytes = offsets.records + records * RecordBytes(head_dim);
  }
};

/// Blocks that are finished and have slots in all records, in random order.
std::vector<PageOfBlock> FinishedBlocks(CacheWorld& world, Random& random) {
  std::vector<PageOfBlock> blocks;
  const CacheView view = world.View();
  for (int s = 0; s < world.sequences(); ++s) {
    for (int b = 0; b < world.tokens(s) / kBlockTokens; ++b) {
      bool resident = true;
      for (int r = 0; r < view.records; ++r) resident &= view.SlotOf(s, r, b) >= 0;
      if (resident) blocks.push_back({s, b, nullptr});
    }
  }
  random.Shuffle(blocks);
  return blocks;
}

WorldOptions SomeSequences(int head_dim, int layers, int kv_heads) {
  WorldOptions options;
  options.head_dim = head_dim;
  options.layers = layers;
  options.kv_heads = kv_heads;
  // 2200 tokens: the windows of block 32 lie in two index frames.
  options.sequences = {{63}, {64}, {65}, {200}, {1000, 12}, {2200}};
  return options;
}

TEST_F(PagesTest, ExportAndImportAgreeWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const auto& [layers, kv_heads] : {std::pair{1, 1}, {2, 2}, {3, 3}}) {
      SCOPED_TRACE(::testing::Message()
                   << "D " << head_dim << ", L " << layers << ", Hkv " << kv_heads);
      CacheWorld world(SomeSequences(head_dim, layers, kv_heads), random_);
      const PageShape shape(layers * kv_heads, head_dim);
      std::vector<PageOfBlock> blocks = FinishedBlocks(world, random_);
      ASSERT_GT(blocks.size(), 30u);
      const int count = static_cast<int>(blocks.size());
      MappedMemory pages(count * shape.bytes), device_list(count * sizeof(PageOfBlock));
      std::memset(pages.host(), 0xff, pages.bytes());
      std::vector<std::byte> expected(pages.host(), pages.host() + pages.bytes());
      const auto list_pages = [&](std::byte* base) {
        for (int i = 0; i < count; ++i) blocks[i].page = base + i * shape.bytes;
      };

      DeviceMirror mirror(world);
      list_pages(pages.device());
      std::memcpy(device_list.host(), blocks.data(), device_list.bytes());
      ExportParams params{reinterpret_cast<const PageOfBlock*>(device_list.device()), mirror.View(),
                          shape.offsets, count};
      Launch(LaunchExport, params);
      list_pages(expected.data());
      ExportReference({blocks.data(), world.View(), shape.offsets, count});
      ExpectSameBytes(std::vector<std::byte>(pages.host(), pages.host() + pages.bytes()), expected,
                      "pages");
      CacheWorld before(world);
      mirror.Download();
      ExpectSameBytes(world.slots, before.slots, "slots after an export");
      if (HasFailure()) return;

      // Back into a cache whose index frames hold other things.
      CacheWorld other(world);
      for (std::byte& byte : other.slots) byte = static_cast<std::byte>(random_.Next());
      CacheWorld wanted(other);
      DeviceMirror other_mirror(other);
      params.cache = other_mirror.View();
      Launch(LaunchImportIndex, params);
      ImportIndexReference({blocks.data(), wanted.View(), shape.offsets, count});
      other_mirror.Download();
      ExpectSameBytes(other.slots, wanted.slots, "slots after an import");
      if (HasFailure()) return;
    }
  }
}

TEST_F(PagesTest, NoBlocks) {
  CacheWorld world(SomeSequences(64, 1, 1), random_);
  CacheWorld before(world);
  DeviceMirror mirror(world);
  const ExportParams params{nullptr, mirror.View(), PageShape(1, 64).offsets, 0};
  Launch(LaunchExport, params);
  Launch(LaunchImportIndex, params);
  mirror.Download();
  ExpectSameBytes(world.slots, before.slots, "slots");
}

/// The records of a sequence that have slots: (record, block) -> (stamp, bytes).
std::map<std::pair<int, int>, std::pair<uint32_t, std::vector<std::byte>>> Contents(
    CacheWorld& world, int sequence) {
  std::map<std::pair<int, int>, std::pair<uint32_t, std::vector<std::byte>>> contents;
  const CacheView view = world.View();
  for (int r = 0; r < view.records; ++r) {
    const int64_t row = view.TableRow(sequence, r);
    for (const int32_t b : world.Resident(sequence, r)) {
      const std::byte* slot = view.Slot(view.SlotOf(sequence, r, b));
      contents[{r, b}] = {
          view.stamp[row * view.max_frames + view.slot_of[row * view.max_blocks + b]],
          {slot, slot + RecordBytes(view.head_dim)}};
    }
  }
  return contents;
}

void CheckShrink(CacheWorld& world, int sequence, int keep) {
  SCOPED_TRACE(::testing::Message() << "sequence " << sequence << ", keep " << keep);
  const auto before = Contents(world, sequence);
  CacheWorld expected(world);
  CacheWorld original(world);
  DeviceMirror mirror(world);
  Launch(LaunchShrink, ShrinkParams{sequence, keep, mirror.View()});
  mirror.Download();
  ShrinkReference({sequence, keep, expected.View()});
  ASSERT_EQ(world.BrokenInvariant(), "");
  ASSERT_EQ(expected.BrokenInvariant(), "") << "of the reference";

  const auto after = Contents(world, sequence);
  const CacheView view = world.View();
  for (int r = 0; r < view.records; ++r) {
    const int64_t row = view.TableRow(sequence, r);
    for (int i = keep; i < view.num_frames[sequence]; ++i) {
      EXPECT_EQ(view.block_of[row * view.max_frames + i], -1)
          << "record " << r << ": slot " << i << " still holds a block";
    }
    // The most recently selected blocks survive; which ones among equals is free. Blocks that are
    // not stored are among them.
    std::multiset<uint32_t> stamps, expected_stamps;
    for (const int32_t b : world.Resident(sequence, r)) stamps.insert(after.at({r, b}).first);
    const auto reference = Contents(expected, sequence);
    for (const int32_t b : expected.Resident(sequence, r)) {
      expected_stamps.insert(reference.at({r, b}).first);
    }
    EXPECT_EQ(stamps, expected_stamps) << "record " << r;
    EXPECT_LE(world.Resident(sequence, r).size(), static_cast<size_t>(keep));
  }
  for (const auto& [key, content] : after) {
    const auto found = before.find(key);
    ASSERT_NE(found, before.end()) << "block " << key.second << " came from nowhere";
    EXPECT_TRUE(content == found->second)
        << "record " << key.first << ", block " << key.second << " changed";
  }
  for (int s = 0; s < world.sequences(); ++s) {
    if (s != sequence) {
      EXPECT_TRUE(Contents(world, s) == Contents(original, s)) << "sequence " << s << " changed";
    }
  }
}

TEST_F(PagesTest, ShrinkKeepsTheMostRecentlySelected) {
  for (const int head_dim : {64, 128}) {
    for (int round = 0; round < 6; ++round) {
      WorldOptions options;
      options.head_dim = head_dim;
      options.kv_heads = random_.Between(1, 3);
      // Few slots; as many as blocks (where half of the blocks are not stored); many free ones.
      options.sequences = {{3000, 30}, {1200, 0}, {900, 40}};
      CacheWorld world(options, random_);
      const CacheView view = world.View();
      for (const int s : {0, 2, 1}) {
        int unstored = 0;
        for (int b = 0; b < world.blocks(s); ++b) {
          unstored += view.pages[int64_t{s} * view.max_blocks + b] == 0;
        }
        const int slots = view.num_frames[s];
        for (const int keep : {slots, random_.Between(unstored, slots), unstored}) {
          CacheWorld copy(world);
          CheckShrink(copy, s, keep);
          if (HasFailure()) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace nosara::kernels
