#include "kernels/score_select/score_select.h"

#include <algorithm>

#include "kernels/score/score_reference.h"
#include "kernels/select/select_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

struct Shape {
  int head_dim = 128;
  int group = 16;
  int kv_heads = 2;
};

class ScoreSelectTest : public KernelTest {
 protected:
  /// A row for each sequence's last position, in random order among padding, against the references
  /// of the two operations.
  void Check(const Shape& shape, const SelectionNumbers& numbers, const std::vector<int>& tokens,
             LaunchMode mode = LaunchMode::kDirect) {
    SCOPED_TRACE(::testing::Message()
                 << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
                 << ", init " << numbers.init_blocks << ", window " << numbers.window_blocks
                 << ", query " << numbers.query_blocks << ", topk " << numbers.topk_blocks);
    WorldOptions options;
    options.head_dim = shape.head_dim;
    options.layers = 2;
    options.kv_heads = shape.kv_heads;
    options.with_pages = false;
    for (const int count : tokens) options.sequences.push_back({count, 2});
    CacheWorld world(options, random_);
    std::vector<StepRow> info;
    for (const int32_t s : random_.Sample(world.sequences(), world.sequences())) {
      if (random_.Chance(0.3)) info.push_back({-1, random_.Below(9999)});
      info.push_back({s, world.tokens(s) - 1});
    }
    const int rows = static_cast<int>(info.size());
    const int Hkv = shape.kv_heads;
    const int Hq = Hkv * shape.group;
    const std::vector<__nv_bfloat16> q = random_.NormalsBf16(size_t(rows) * Hq * shape.head_dim);

    ScoreSelectParams params;
    params.numbers = numbers;
    params.rows = rows;
    params.num_heads = Hq;
    params.num_kv_heads = Hkv;
    params.layer = 1;
    params.max_selected = numbers.topk_blocks + random_.Below(5);
    for (int s = 0; s < world.sequences(); ++s) {
      params.max_blocks = std::max(params.max_blocks, world.blocks(s));
    }
    params.max_blocks += random_.Below(40);
    DeviceMirror mirror(world);
    DeviceArray<__nv_bfloat16> device_q(q);
    DeviceArray<StepRow> device_info(info);
    DeviceArray<int32_t> device_selected(Poison<int32_t>(size_t(rows) * Hkv * params.max_selected));
    DeviceArray<int32_t> device_count(Poison<int32_t>(size_t(rows) * Hkv));
    params.q = device_q.data();
    params.rows_info = device_info.data();
    params.cache = mirror.View();
    params.selected = device_selected.data();
    params.count = device_count.data();
    ASSERT_TRUE(CanScoreSelect(params));
    Launch(LaunchScoreSelect, params, mode);
    const std::vector<int32_t> selected = device_selected.Download();
    const std::vector<int32_t> count = device_count.Download();

    ScoreParams score;
    SelectParams select;
    const int max_windows = world.MaxWindows();
    const int padded = PaddedGroup(shape.group);
    std::vector<float> logits(size_t(rows) * Hkv * max_windows * padded);
    std::vector<float2> partials(size_t(rows) * Hkv * ScoreTiles(max_windows) * padded);
    score.q = q.data();
    score.rows_info = select.rows_info = info.data();
    score.cache = select.cache = world.View();
    score.logits = logits.data();
    score.partials = partials.data();
    select.logits = logits.data();
    select.partials = partials.data();
    score.num_tiles = select.rows = rows;
    score.num_heads = select.num_heads = Hq;
    score.num_kv_heads = select.num_kv_heads = Hkv;
    score.layer = select.layer = params.layer;
    score.max_windows = select.max_windows = max_windows;
    score.dense_blocks = numbers.topk_blocks;
    ScoreReference(score);
    for (int r = 0; r < rows; ++r) {
      for (int h = 0; h < Hkv; ++h) {
        const int64_t pair = int64_t{r} * Hkv + h;
        if (info[r].sequence < 0) {
          EXPECT_EQ(count[pair], 0) << "padding row " << r;
          continue;
        }
        const int t = info[r].position;
        BlockScores scores;
        if (t / 64 + 1 > numbers.topk_blocks) scores = BlockScoresReference(select, r, h);
        const Selection expected = SelectBlocks(numbers, t, scores);
        ASSERT_EQ(count[pair], static_cast<int32_t>(expected.blocks.size()))
            << "row " << r << ", head " << h << ", position " << t;
        const std::vector<int32_t> actual(&selected[pair * params.max_selected],
                                          &selected[pair * params.max_selected] + count[pair]);
        ++pairs_;
        if (expected.rounding_margin < kNearTie) {
          ++near_ties_;
          EXPECT_TRUE(std::is_sorted(actual.begin(), actual.end()));
          EXPECT_EQ(std::adjacent_find(actual.begin(), actual.end()), actual.end());
          continue;
        }
        ASSERT_EQ(actual, expected.blocks) << "row " << r << ", head " << h << ", position " << t
                                           << ", margin " << expected.rounding_margin;
      }
    }
  }

  void TearDown() override {
    EXPECT_LE(near_ties_, 3 + pairs_ / 20) << "of " << pairs_ << " selections";
    KernelTest::TearDown();
  }

  /// Relative error of a block's score: logits are sums of products in another order.
  static constexpr float kNearTie = 1e-4f;
  int pairs_ = 0;
  int near_ties_ = 0;
};

std::vector<int> ManyLengths(int topk) {
  const int limit = topk * 64;
  return {1,     31,        32,         63,         64,         65,   1000, limit - 1,
          limit, limit + 1, limit + 63, limit + 64, limit + 65, 4500, 9000};
}

TEST_F(ScoreSelectTest, AgreesWithTheReferences) {
  for (const SelectionNumbers& numbers :
       {SelectionNumbers{}, SelectionNumbers{1, 3, 8, 16}, SelectionNumbers{1, 16, 64, 64},
        SelectionNumbers{0, 1, 2, 128}, SelectionNumbers{2, 0, 3, 3},
        SelectionNumbers{1, 2, 4, 5}}) {
    for (const int head_dim : {64, 128}) {
      for (const int group : {1, 5, 8, 9, 16}) {
        Check({head_dim, group, random_.Between(1, 3)}, numbers, ManyLengths(numbers.topk_blocks));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(ScoreSelectTest, EveryNumberOfWindowsAroundTheSharesOfACluster) {
  for (int first = 64 * 64; first < 80 * 64; first += 16 * 61) {
    std::vector<int> tokens;
    for (int i = 0; i < 61; ++i) tokens.push_back(first + 16 * i);
    Check({128, 16, 2}, SelectionNumbers{1, 3, 8, 16}, tokens);
    if (HasFailure()) return;
  }
}

TEST_F(ScoreSelectTest, LongSequences) {
  Check({128, 16, 1}, SelectionNumbers{}, {66000, 200000, 640 * 64 + 17, 250000});
  Check({128, 16, 2}, SelectionNumbers{}, {131072});
  Check({64, 4, 4}, SelectionNumbers{}, {33000, 5000, 100});
}

TEST_F(ScoreSelectTest, ManyRows) {
  Check({128, 16, 2}, SelectionNumbers{}, std::vector<int>(100, 6000));
}

TEST_F(ScoreSelectTest, SaysWhatItCannot) {
  ScoreSelectParams params;
  params.rows = 1;
  params.num_heads = 16;
  params.num_kv_heads = 1;
  params.cache.head_dim = 128;
  params.max_blocks = 4000;
  EXPECT_TRUE(CanScoreSelect(params));
  params.max_blocks = 16384;
  EXPECT_FALSE(CanScoreSelect(params));
  EXPECT_EQ(LaunchScoreSelect(params, nullptr), cudaErrorInvalidValue);
  params.max_blocks = 4000;
  params.num_heads = 17;
  EXPECT_FALSE(CanScoreSelect(params));
}

TEST_F(ScoreSelectTest, CanBeCaptured) {
  Check({128, 16, 2}, SelectionNumbers{}, ManyLengths(64), LaunchMode::kGraph);
}

}  // namespace
}  // namespace nosara::kernels
