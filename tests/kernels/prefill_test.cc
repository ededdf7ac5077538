#include "kernels/prefill/prefill_reference.h"

#include <algorithm>

#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/direct_attention.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using PrefillTest = KernelTest;

struct Shape {
  int head_dim, group, kv_heads;
  AttendBias bias = AttendBias::kCache;
  float query_scale = 1;
  bool padding = false;  // tiles of rows with sequence -1
  int max_selected = 24;
};

void CheckShape(Random& random, const Shape& shape, LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
               << ", with bias " << (shape.bias == AttendBias::kCache) << ", query scale "
               << shape.query_scale << ", padding " << shape.padding);
  const int D = shape.head_dim;
  const int Hkv = shape.kv_heads;
  const int G = shape.group;
  const int Hq = Hkv * G;
  WorldOptions options;
  options.head_dim = D;
  options.layers = 2;
  options.kv_heads = Hkv;
  options.sequences = {{1}, {7}, {64}, {71}, {130}, {1000}, {2600}};
  CacheWorld world(options, random);
  const CacheView view = world.View();

  // The last rows of each sequence, cut into tiles of any size.
  std::vector<StepRow> info;
  std::vector<RowTile> tiles;
  for (const int32_t s : random.Sample(world.sequences(), world.sequences())) {
    if (shape.padding && random.Chance(0.5)) {
      const int rows = random.Between(1, kPrefillTileRows);
      tiles.push_back({static_cast<int32_t>(info.size()), rows});
      for (int i = 0; i < rows; ++i) info.push_back({-1, 0});
    }
    int rows = std::min(world.tokens(s), random.Between(1, 30));
    int t = world.tokens(s) - rows;
    while (rows > 0) {
      const int in_tile =
          std::min(rows, random.Chance(0.5) ? kPrefillTileRows : random.Between(1, 8));
      tiles.push_back({static_cast<int32_t>(info.size()), in_tile});
      for (int i = 0; i < in_tile; ++i) info.push_back({s, t++});
      rows -= in_tile;
    }
  }
  const int rows = static_cast<int>(info.size());
  const std::vector<__nv_bfloat16> q = random.NormalsBf16(size_t(rows) * Hq * D, shape.query_scale);
  std::vector<int32_t> selected = Poison<int32_t>(size_t(rows) * Hkv * shape.max_selected);
  std::vector<int32_t> count(rows * Hkv, 0);
  int max_blocks = 0;
  for (int r = 0; r < rows; ++r) {
    if (info[r].sequence < 0) continue;
    const int own = info[r].position / 64;
    max_blocks = std::max(max_blocks, own + 1);
    for (int h = 0; h < Hkv; ++h) {
      // Each row has its own blocks, always with its own one; now and then only that.
      const int others =
          random.Chance(0.1) ? 0 : random.Between(0, std::min(own, shape.max_selected - 1));
      std::vector<int32_t> blocks = random.Sample(others, own);
      blocks.push_back(own);
      std::sort(blocks.begin(), blocks.end());
      count[r * Hkv + h] = static_cast<int32_t>(blocks.size());
      std::copy(blocks.begin(), blocks.end(),
                selected.begin() + (int64_t{r} * Hkv + h) * shape.max_selected);
    }
  }
  DeviceMirror mirror(world);
  DeviceArray<__nv_bfloat16> device_q(q);
  DeviceArray<StepRow> device_info(info);
  DeviceArray<RowTile> device_tiles(tiles);
  DeviceArray<int32_t> device_selected(selected), device_count(count);
  DeviceArray<__nv_bfloat16> device_out(Poison<__nv_bfloat16>(q.size()));
  PrefillParams params;
  params.q = device_q.data();
  params.rows_info = device_info.data();
  params.tiles = device_tiles.data();
  params.selected = device_selected.data();
  params.count = device_count.data();
  params.cache = mirror.View();
  params.out = device_out.data();
  params.num_tiles = static_cast<int>(tiles.size());
  params.num_heads = Hq;
  params.num_kv_heads = Hkv;
  params.layer = 1;
  params.max_selected = shape.max_selected;
  params.max_blocks = max_blocks;
  params.bias = shape.bias;
  Launch(LaunchPrefill, params, mode);

  const std::vector<__nv_bfloat16> out = device_out.Download();
  Comparison comparison("out, at row");
  for (int r = 0; r < rows; ++r) {
    for (int head = 0; head < Hq; ++head) {
      const int64_t first = (int64_t{r} * Hq + head) * D;
      if (info[r].sequence < 0) {
        ExpectPoison(out, first, first + D, "out of a padding row");
        continue;
      }
      const int64_t pair = int64_t{r} * Hkv + head / G;
      std::vector<std::pair<std::byte*, int>> list;
      for (int i = 0; i < count[pair]; ++i) {
        const int block = selected[pair * shape.max_selected + i];
        list.push_back({view.Slot(view.SlotOf(info[r].sequence, Hkv + head / G, block)), block});
      }
      const DirectAttention expected =
          AttendDirectly(&q[first], D, info[r].position, shape.bias, list);
      for (int d = 0; d < D; ++d) {
        comparison.Near(ToFloat(out[first + d]), expected.output[d],
                        RoundedAttentionTolerance(expected.output[d], expected.size[d]) +
                            2e-6 * shape.query_scale * expected.size[d],
                        r);
      }
    }
  }
}

TEST_F(PrefillTest, AgreesWithAttentionInDoublePrecision) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 4, 8, 16, 32}) {
      for (const int kv_heads : {1, 2, 3}) {
        Shape shape{head_dim, group, kv_heads};
        if (random_.Chance(0.2)) shape.bias = AttendBias::kNone;
        CheckShape(random_, shape);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(PrefillTest, PeakedAndFlatDistributions) {
  for (const float scale : {0.0f, 20.0f}) {
    CheckShape(random_, {128, 16, 2, AttendBias::kCache, scale});
    CheckShape(random_, {64, 4, 1, AttendBias::kNone, scale});
  }
}

TEST_F(PrefillTest, LargestGroup) {
  CheckShape(random_, {128, kMaxGroup, 1});
  CheckShape(random_, {64, kMaxGroup, 1});
  CheckShape(random_, {64, 5, 2});
}

TEST_F(PrefillTest, PaddingRowsAreLeftAsTheyAre) {
  Shape shape{128, 16, 2};
  shape.padding = true;
  CheckShape(random_, shape);
}

TEST_F(PrefillTest, CanBeCaptured) { CheckShape(random_, {128, 16, 2}, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
