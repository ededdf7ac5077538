#include "kernels/select/select_reference.h"

#include <algorithm>
#include <limits>
#include <set>

#include "kernels/common/record_reference.h"
#include "kernels/score/score.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Rows at their positions with the scores of their windows, on the host.
struct Scores {
  std::vector<StepRow> info;
  int group = 1;
  int max_windows = 0;
  std::vector<float> logits;
  std::vector<float2> partials;
};

class SelectTest : public KernelTest {
 protected:
  /// A world without records: only the scores e of its windows matter.
  std::unique_ptr<CacheWorld> MakeWorld(int kv_heads, const std::vector<int>& tokens) {
    WorldOptions options;
    options.head_dim = 64;
    options.layers = 2;
    options.kv_heads = kv_heads;
    options.with_pages = false;
    for (const int count : tokens) options.sequences.push_back({count, 2});
    return std::make_unique<CacheWorld>(options, random_);
  }

  /// A row for each sequence's last position, in random order, with some padding; logits random.
  Scores MakeScores(const CacheWorld& world, int group) {
    Scores scores;
    scores.group = group;
    scores.max_windows = world.MaxWindows() + 128 * random_.Below(2);
    for (const int32_t s : random_.Sample(world.sequences(), world.sequences())) {
      if (random_.Chance(0.3)) scores.info.push_back({-1, random_.Below(9999)});
      scores.info.push_back({s, world.tokens(s) - 1});
    }
    const int Hkv = world.options().kv_heads;
    const int Gp = PaddedGroup(group);
    scores.logits = Poison<float>(scores.info.size() * Hkv * scores.max_windows * Gp);
    for (size_t r = 0; r < scores.info.size(); ++r) {
      ForEachWindow(scores, Hkv, r, [&](int, int, float* logits) {
        for (int g = 0; g < Gp; ++g) logits[g] = g < group ? 2 * random_.Normal() : 0;
      });
    }
    return scores;
  }

  /// Calls edit(head, window, logits of the window) for the visible windows of row r.
  template <typename Edit>
  static void ForEachWindow(Scores& scores, int Hkv, int r, Edit edit) {
    if (scores.info[r].sequence < 0) return;
    const int Gp = PaddedGroup(scores.group);
    for (int h = 0; h < Hkv; ++h) {
      for (int w = 0; w < VisibleWindows(scores.info[r].position); ++w) {
        edit(h, w, &scores.logits[((int64_t{r} * Hkv + h) * scores.max_windows + w) * Gp]);
      }
    }
  }

  /// (max, sum) of each tile, as LaunchScore leaves them; NaN logits are left out.
  static void FillPartials(Scores& scores, int Hkv) {
    const int Gp = PaddedGroup(scores.group);
    const int tiles = ScoreTiles(scores.max_windows);
    scores.partials = Poison<float2>(scores.info.size() * Hkv * tiles * Gp);
    for (size_t r = 0; r < scores.info.size(); ++r) {
      if (scores.info[r].sequence < 0) continue;
      const int windows = VisibleWindows(scores.info[r].position);
      for (int h = 0; h < Hkv; ++h) {
        const int64_t pair = int64_t(r) * Hkv + h;
        for (int tile = 0; tile < ScoreTiles(windows); ++tile) {
          for (int g = 0; g < Gp; ++g) {
            const auto logit = [&](int w) {
              return scores.logits[(pair * scores.max_windows + w) * Gp + g];
            };
            const int end = std::min(windows, (tile + 1) * kIndexWindows);
            float max = -kInfinity;
            double sum = 0;
            for (int w = tile * kIndexWindows; w < end; ++w) max = std::fmax(max, logit(w));
            for (int w = tile * kIndexWindows; w < end; ++w) {
              if (!std::isnan(logit(w))) sum += std::exp(double{logit(w)} - max);
            }
            scores.partials[(pair * tiles + tile) * Gp + g] = {max, static_cast<float>(sum)};
          }
        }
      }
    }
  }

  enum class NearTies { kExcused, kNotExcused };

  /// Runs the kernel and compares with the reference; counts pairs and those excused.
  void Check(CacheWorld& world, const Scores& scores, const SelectionNumbers& numbers,
             NearTies near_ties, LaunchMode mode = LaunchMode::kDirect) {
    const int Hkv = world.options().kv_heads;
    const int rows = static_cast<int>(scores.info.size());
    SCOPED_TRACE(::testing::Message()
                 << "Hkv " << Hkv << ", G " << scores.group << ", rows " << rows << ", init "
                 << numbers.init_blocks << ", window " << numbers.window_blocks << ", query "
                 << numbers.query_blocks << ", topk " << numbers.topk_blocks);
    SelectParams params;
    params.numbers = numbers;
    params.rows = rows;
    params.num_heads = Hkv * scores.group;
    params.num_kv_heads = Hkv;
    params.layer = 1;
    params.max_windows = scores.max_windows;
    params.max_selected = numbers.topk_blocks + random_.Below(5);
    for (int s = 0; s < world.sequences(); ++s) {
      params.max_blocks = std::max(params.max_blocks, world.blocks(s));
    }

    DeviceMirror mirror(world);
    DeviceArray<StepRow> device_info(scores.info);
    DeviceArray<float> device_logits(scores.logits);
    DeviceArray<float2> device_partials(scores.partials);
    DeviceArray<int32_t> device_selected(Poison<int32_t>(size_t(rows) * Hkv * params.max_selected));
    DeviceArray<int32_t> device_count(Poison<int32_t>(size_t(rows) * Hkv));
    params.rows_info = device_info.data();
    params.cache = mirror.View();
    params.logits = device_logits.data();
    params.partials = device_partials.data();
    params.selected = device_selected.data();
    params.count = device_count.data();
    Launch(LaunchSelect, params, mode);
    const std::vector<int32_t> selected = device_selected.Download();
    const std::vector<int32_t> count = device_count.Download();

    params.rows_info = scores.info.data();
    params.cache = world.View();
    params.logits = scores.logits.data();
    params.partials = scores.partials.data();
    for (int r = 0; r < rows; ++r) {
      for (int h = 0; h < Hkv; ++h) {
        const int64_t pair = int64_t{r} * Hkv + h;
        if (scores.info[r].sequence < 0) {
          EXPECT_EQ(count[pair], 0) << "padding row " << r;
          continue;
        }
        const int t = scores.info[r].position;
        BlockScores block_scores;
        if (t / 64 + 1 > numbers.topk_blocks) block_scores = BlockScoresReference(params, r, h);
        const Selection expected = SelectBlocks(numbers, t, block_scores);
        ASSERT_EQ(count[pair], static_cast<int32_t>(expected.blocks.size()))
            << "row " << r << ", head " << h << ", position " << t;
        const std::vector<int32_t> actual(&selected[pair * params.max_selected],
                                          &selected[pair * params.max_selected] + count[pair]);
        ++pairs_;
        if (near_ties == NearTies::kExcused && expected.rounding_margin < kNearTie) {
          // What must hold all the same: ascending, different, in range, with the forced blocks.
          ++near_ties_;
          EXPECT_TRUE(std::is_sorted(actual.begin(), actual.end()));
          EXPECT_EQ(std::adjacent_find(actual.begin(), actual.end()), actual.end());
          EXPECT_GE(actual.front(), 0);
          EXPECT_LE(actual.back(), t / 64);
          for (const int32_t n : expected.blocks) {
            if (n >= numbers.init_blocks && n < t / 64 - numbers.window_blocks) continue;
            EXPECT_TRUE(std::binary_search(actual.begin(), actual.end(), n)) << n;
          }
          continue;
        }
        ASSERT_EQ(actual, expected.blocks) << "row " << r << ", head " << h << ", position " << t
                                           << ", margin " << expected.rounding_margin;
      }
    }
  }

  void TearDown() override {
    // Random scores of a few hundred blocks come this near in one of some thousand selections.
    EXPECT_LE(near_ties_, 3 + pairs_ / 100) << "of " << pairs_ << " selections";
    KernelTest::TearDown();
  }

  /// Relative error of a score in f32: sums of G softmax weights, with the fast exp.
  static constexpr float kNearTie = 1e-5f;
  int pairs_ = 0;
  int near_ties_ = 0;
};

SelectionNumbers Small() { return {1, 3, 8, 16}; }

std::vector<int> ManyLengths(int topk) {
  const int limit = topk * 64;
  return {1,     31,        32,         63,         64,         65,   1000, limit - 1,
          limit, limit + 1, limit + 63, limit + 64, limit + 65, 4500, 9000};
}

TEST_F(SelectTest, AgreesWithTheReference) {
  for (const SelectionNumbers& numbers :
       {SelectionNumbers{}, Small(), SelectionNumbers{1, 16, 64, 64},
        SelectionNumbers{0, 1, 2, 128}, SelectionNumbers{2, 0, 3, 3},
        SelectionNumbers{1, 2, 4, 5}}) {
    for (const int kv_heads : {1, 2, 4}) {
      const auto world = MakeWorld(kv_heads, ManyLengths(numbers.topk_blocks));
      for (const int group : {1, 4, 8, 16, 32}) {
        Scores scores = MakeScores(*world, group);
        FillPartials(scores, kv_heads);
        Check(*world, scores, numbers, NearTies::kExcused);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(SelectTest, LongSequences) {
  const auto world = MakeWorld(1, {66000, 200000, 640 * 64 + 17});
  Scores scores = MakeScores(*world, 16);
  FillPartials(scores, 1);
  Check(*world, scores, SelectionNumbers{}, NearTies::kExcused);
}

TEST_F(SelectTest, TiesGoToTheSmallerBlock) {
  for (int round = 0; round < 8; ++round) {
    const SelectionNumbers numbers = round % 2 == 0 ? SelectionNumbers{} : Small();
    const auto world = MakeWorld(2, ManyLengths(numbers.topk_blocks));
    const int group = round % 4 < 2 ? 16 : 4;
    Scores scores = MakeScores(*world, group);
    // A window has one of three rows of logits, so that equal scores come from equal sums.
    std::vector<std::vector<float>> few = {random_.Normals(group), random_.Normals(group),
                                           random_.Normals(group)};
    for (size_t r = 0; r < scores.info.size(); ++r) {
      ForEachWindow(scores, 2, r, [&](int, int, float* logits) {
        const std::vector<float>& from = few[random_.Chance(0.1) ? 0 : random_.Between(1, 2)];
        std::copy(from.begin(), from.end(), logits);
      });
    }
    FillPartials(scores, 2);
    // Of the scores e too, with both zeros, which are equal, and -inf.
    const float values[] = {-1.0f, -0.0f, 0.0f, -kInfinity, 1.0f};
    const CacheView view = world->View();
    for (int s = 0; s < world->sequences(); ++s) {
      for (int record = 0; record < view.records; ++record) {
        for (int w = 0; w < VisibleWindows(world->tokens(s) - 1); ++w) {
          const float e = values[random_.Chance(0.03) ? 4 : random_.Below(4)];
          *IndexScore(view.IndexSlot(s, record, w), view.head_dim, w) = e;
        }
      }
    }
    Check(*world, scores, numbers, NearTies::kNotExcused);
    if (HasFailure()) return;
  }
}

TEST_F(SelectTest, EqualScoresEverywhere) {
  const auto world = MakeWorld(2, ManyLengths(64));
  Scores scores = MakeScores(*world, 16);
  for (size_t r = 0; r < scores.info.size(); ++r) {
    ForEachWindow(scores, 2, r, [&](int, int, float* logits) { std::fill_n(logits, 16, 0.25f); });
  }
  FillPartials(scores, 2);
  const CacheView view = world->View();
  for (int s = 0; s < world->sequences(); ++s) {
    for (int record = 0; record < view.records; ++record) {
      for (int w = 0; w < VisibleWindows(world->tokens(s) - 1); ++w) {
        *IndexScore(view.IndexSlot(s, record, w), view.head_dim, w) = -2.5f;
      }
    }
  }
  Check(*world, scores, SelectionNumbers{}, NearTies::kNotExcused);
  Check(*world, scores, Small(), NearTies::kNotExcused);
}

TEST_F(SelectTest, WhatIsNoNumberCountsAsTheWorst) {
  const float nan = std::nanf("");
  for (const double share : {0.05, 0.5, 1.0}) {
    const auto world = MakeWorld(2, ManyLengths(16));
    Scores scores = MakeScores(*world, 4);
    for (size_t r = 0; r < scores.info.size(); ++r) {
      ForEachWindow(scores, 2, r, [&](int, int w, float* logits) {
        if (random_.Chance(share)) logits[random_.Below(4)] = nan;
        // One head is never NaN as a whole: its maximum and sum are numbers.
        if (w == 0) std::fill_n(logits, 4, 0.0f);
      });
    }
    FillPartials(scores, 2);
    const CacheView view = world->View();
    for (int s = 0; s < world->sequences(); ++s) {
      for (int record = 0; record < view.records; ++record) {
        for (int w = 0; w < VisibleWindows(world->tokens(s) - 1); ++w) {
          if (!random_.Chance(share)) continue;
          *IndexScore(view.IndexSlot(s, record, w), view.head_dim, w) = nan;
        }
      }
    }
    Check(*world, scores, Small(), NearTies::kExcused);
    if (HasFailure()) return;
  }
}

TEST_F(SelectTest, CanBeCaptured) {
  const auto world = MakeWorld(2, ManyLengths(64));
  Scores scores = MakeScores(*world, 16);
  FillPartials(scores, 2);
  Check(*world, scores, SelectionNumbers{}, NearTies::kExcused, LaunchMode::kGraph);
}

TEST_F(SelectTest, ReplayedSelectionsChangeAtTheirRate) {
  // 200 blocks, 18 of them forced for position 199 * 64 + 9; 46 of a ring of 182.
  constexpr int kRecords = 4, kRing = 182;
  const SelectionNumbers numbers;
  const std::vector<StepRow> info = {{0, 199 * 64 + 9}, {-1, 0}, {1, 63 * 64}, {2, 199 * 64}};
  const int rows = static_cast<int>(info.size());
  std::vector<int32_t> rings;
  for (int i = 0; i < rows * kRecords; ++i) {
    for (const int32_t n : random_.Sample(kRing, kRing)) rings.push_back(n + 1);
  }
  DeviceArray<StepRow> device_info(info);
  DeviceArray<int32_t> device_rings(rings);
  std::vector<std::set<int32_t>> last(rows * 2);
  for (uint32_t step = 1000; step < 1100; step += 2) {
    DeviceArray<uint32_t> device_step(std::vector<uint32_t>{step});
    DeviceArray<int32_t> selected(Poison<int32_t>(rows * 2 * 70)), count(Poison<int32_t>(rows * 2));
    ReplayParams params;
    params.rows_info = device_info.data();
    params.rings = device_rings.data();
    params.step = device_step.data();
    params.selected = selected.data();
    params.count = count.data();
    params.numbers = numbers;
    params.change = 1.5f;
    params.ring_rows = rows;
    params.ring_blocks = kRing;
    params.records = kRecords;
    params.rows = rows;
    params.num_kv_heads = 2;
    params.layer = 1;
    params.max_selected = 70;
    Launch(LaunchReplay, params);
    const std::vector<int32_t> got = selected.Download(), got_count = count.Download();
    for (int pair = 0; pair < rows * 2; ++pair) {
      if (pair / 2 == 1 || pair / 2 == 2) {  // padding; no more blocks than topk
        EXPECT_EQ(got_count[pair], -1);
        ExpectPoison(got, pair * 70, pair * 70 + 70, "selection of a row that keeps its own");
        continue;
      }
      ASSERT_EQ(got_count[pair], 64);
      const std::set<int32_t> blocks(&got[pair * 70], &got[pair * 70] + 64);
      ASSERT_EQ(blocks.size(), 64u) << "a block came twice";
      EXPECT_EQ(*blocks.begin(), 0);
      for (int n = 183; n <= 199; ++n) EXPECT_EQ(blocks.count(n), 1u) << n;
      EXPECT_EQ(*blocks.rbegin(), 199);
      int stayed = 0;
      for (const int32_t n : blocks) stayed += last[pair].count(n);
      // 1.5 a step: one or two leave.
      if (step > 1000) {
        EXPECT_TRUE(stayed == 62 || stayed == 63) << stayed;
      }
      last[pair] = blocks;
    }
    if (HasFailure()) return;
  }
}

TEST_F(SelectTest, AllBlocks) {
  const auto world = MakeWorld(2, {1, 64, 65, 1000, 9000});
  const std::vector<StepRow> info = {{3, 999}, {-1, 7}, {0, 0}, {1, 63}, {2, 64}, {4, 8999}};
  for (const LaunchMode mode : {LaunchMode::kDirect, LaunchMode::kGraph}) {
    DeviceMirror mirror(*world);
    DeviceArray<StepRow> device_info(info);
    SelectParams params;
    params.rows = static_cast<int>(info.size());
    params.num_heads = 8;
    params.num_kv_heads = 2;
    params.max_windows = world->MaxWindows();
    params.max_blocks = 141;
    params.max_selected = 141;
    params.cache = mirror.View();
    std::vector<int32_t> selected = Poison<int32_t>(info.size() * 2 * params.max_selected);
    std::vector<int32_t> count = Poison<int32_t>(info.size() * 2);
    DeviceArray<int32_t> device_selected(selected), device_count(count);
    params.rows_info = device_info.data();
    params.selected = device_selected.data();
    params.count = device_count.data();
    Launch(LaunchSelectAll, params, mode);
    params.rows_info = info.data();
    params.selected = selected.data();
    params.count = count.data();
    SelectAllReference(params);
    EXPECT_EQ(device_count.Download(), count);
    const std::vector<int32_t> actual = device_selected.Download();
    for (size_t pair = 0; pair < count.size(); ++pair) {
      for (int i = 0; i < count[pair]; ++i) {
        ASSERT_EQ(actual[pair * params.max_selected + i], i) << "pair " << pair;
      }
    }
  }
}

}  // namespace
}  // namespace nosara::kernels
