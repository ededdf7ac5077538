#include "kernels/score/score_reference.h"

#include "kernels/common/record_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using ScoreTest = KernelTest;

struct Shape {
  int head_dim, group, kv_heads;
  bool tiles = false;
  int dense_blocks = 4;
  int extra_windows = 0;  // room beyond what is needed, a multiple of 128
};

void CheckShape(Random& random, const Shape& shape, LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
               << ", tiles " << shape.tiles << ", dense_blocks " << shape.dense_blocks
               << ", extra windows " << shape.extra_windows);
  const int D = shape.head_dim;
  const int Hkv = shape.kv_heads;
  const int G = shape.group;
  const int Gp = PaddedGroup(G);
  WorldOptions options;
  options.head_dim = D;
  options.layers = 2;
  options.kv_heads = Hkv;
  options.with_pages = false;
  const int limit = shape.dense_blocks * 64;
  // 2079 tokens have exactly 128 windows, 2095 one more.
  options.sequences = {{1, 1}, {31, 1}, {33, 1}, {64, 1}, {65, 2}, {1000, 3}};
  for (const int tokens : {limit, limit + 1, limit + 64, 2078, 2079, 2095, 4500}) {
    options.sequences.push_back({std::max(1, tokens), 3});
  }
  CacheWorld world(options, random);

  // Decoding: the last position of each sequence, in random order, among padding. Chunks: several
  // consecutive positions of each, in tiles of up to 8 rows.
  std::vector<StepRow> info;
  std::vector<RowTile> tiles;
  for (const int32_t s : random.Sample(world.sequences(), world.sequences())) {
    if (random.Chance(0.3)) {
      tiles.push_back({static_cast<int32_t>(info.size()), 1});
      info.push_back({-1, 5000});
    }
    int rows = shape.tiles ? std::min(world.tokens(s), random.Between(1, 20)) : 1;
    int t = world.tokens(s) - rows;
    while (rows > 0) {
      const int in_tile = shape.tiles ? std::min(rows, random.Between(1, 8)) : 1;
      tiles.push_back({static_cast<int32_t>(info.size()), in_tile});
      for (int i = 0; i < in_tile; ++i) info.push_back({s, t++});
      rows -= in_tile;
    }
  }
  const int rows = static_cast<int>(info.size());
  const int max_windows = world.MaxWindows() + shape.extra_windows;
  const std::vector<__nv_bfloat16> q = random.NormalsBf16(size_t(rows) * Hkv * G * D);
  std::vector<float> logits = Poison<float>(size_t(rows) * Hkv * max_windows * Gp);
  std::vector<float2> partials = Poison<float2>(size_t(rows) * Hkv * ScoreTiles(max_windows) * Gp);

  DeviceMirror mirror(world);
  DeviceArray<__nv_bfloat16> device_q(q);
  DeviceArray<StepRow> device_info(info);
  DeviceArray<RowTile> device_tiles(tiles);
  DeviceArray<float> device_logits(logits);
  DeviceArray<float2> device_partials(partials);
  ScoreParams params;
  params.q = device_q.data();
  params.rows_info = device_info.data();
  params.tiles = shape.tiles ? device_tiles.data() : nullptr;
  params.cache = mirror.View();
  params.logits = device_logits.data();
  params.partials = device_partials.data();
  params.num_tiles = static_cast<int>(tiles.size());
  params.num_heads = Hkv * G;
  params.num_kv_heads = Hkv;
  params.layer = 1;
  params.max_windows = max_windows;
  params.dense_blocks = shape.dense_blocks;
  Launch(LaunchScore, params, mode);

  params.q = q.data();
  params.rows_info = info.data();
  if (shape.tiles) params.tiles = tiles.data();
  params.cache = world.View();
  params.logits = logits.data();
  params.partials = partials.data();
  ScoreReference(params);
  const std::vector<float> actual = device_logits.Download();
  const std::vector<float2> actual_partials = device_partials.Download();

  Comparison logit_comparison("logits, at row"), max_comparison("maxima, at row"),
      sum_comparison("log of sums, at row"), padding_comparison("padding heads, at row");
  padding_comparison.Near(0, 0, 0, 0);  // there may be none
  for (int r = 0; r < rows; ++r) {
    const bool scored = info[r].sequence >= 0 && info[r].position / 64 + 1 > shape.dense_blocks;
    const int windows = scored ? VisibleWindows(info[r].position) : 0;
    for (int h = 0; h < Hkv; ++h) {
      const int64_t pair = int64_t{r} * Hkv + h;
      const int64_t first = pair * max_windows * Gp;
      double worst = 0;  // the largest tolerance of a logit of this pair
      for (int w = 0; w < windows; ++w) {
        std::byte* slot = params.cache.IndexSlot(info[r].sequence, Hkv + h, w);
        for (int g = 0; g < Gp; ++g) {
          const int64_t at = first + int64_t{w} * Gp + g;
          if (g >= G) {
            padding_comparison.Near(actual[at], 0, 0, r);
            continue;
          }
          double size = 0;
          for (int i = 0; i < D; ++i) {
            size += std::abs(ToFloat(q[(int64_t{r} * Hkv * G + h * G + g) * D + i]) *
                             ToFloat(IndexKey(slot, D, w)[i]));
          }
          // Products of bf16 are exact in f32; their sum may be cut off at each addition.
          const double tolerance = 0x1p-18 * size / std::sqrt(double(D)) + 1e-7;
          worst = std::max(worst, tolerance);
          logit_comparison.Near(actual[at], logits[at], tolerance, r);
        }
      }
      ExpectPoison(actual, first + int64_t{windows} * Gp, first + int64_t{max_windows} * Gp,
                   "logits of windows that are not visible");
      const int64_t first_partial = pair * ScoreTiles(max_windows) * Gp;
      for (int i = 0; i < ScoreTiles(windows) * Gp; ++i) {
        const float2 got = actual_partials[first_partial + i];
        const float2 expected = partials[first_partial + i];
        if (i % Gp >= G) {  // padding heads score 0 in all visible windows
          padding_comparison.Near(got.x, 0, 0, r);
          padding_comparison.Near(got.y, expected.y, 1e-4 * expected.y, r);
          continue;
        }
        max_comparison.Near(got.x, expected.x, worst, r);
        // exp by the fast instruction: relative 2^-20 or so for arguments up to 10.
        sum_comparison.Near(got.x + std::log(got.y), expected.x + std::log(expected.y),
                            worst + 2e-5, r);
      }
      ExpectPoison(actual_partials, first_partial + ScoreTiles(windows) * Gp,
                   first_partial + ScoreTiles(max_windows) * Gp,
                   "partials of tiles that are not visible");
      if (::testing::Test::HasFailure()) {
        ADD_FAILURE() << "the row " << r << ": sequence " << info[r].sequence << ", position "
                      << info[r].position << ", KV head " << h;
        return;
      }
    }
  }
}

TEST_F(ScoreTest, AgreesWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 4, 8, 16, 32}) {
      for (const int kv_heads : {1, 2, 3}) {
        Shape shape{head_dim, group, kv_heads};
        shape.extra_windows = 128 * random_.Below(3);
        CheckShape(random_, shape);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(ScoreTest, RowsOfATileAgreeWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 4, 8, 16, 32}) {
      Shape shape{head_dim, group, random_.Between(1, 2), /*tiles=*/true};
      CheckShape(random_, shape);
      if (HasFailure()) return;
    }
  }
}

TEST_F(ScoreTest, DenseRowsAreLeftAsTheyAre) {
  CheckShape(random_, {128, 16, 2, false, /*dense_blocks=*/64});
  CheckShape(random_, {128, 16, 2, true, /*dense_blocks=*/64});
  CheckShape(random_, {64, 5, 2, false, /*dense_blocks=*/1});
}

TEST_F(ScoreTest, LargestGroup) {
  CheckShape(random_, {128, kMaxGroup, 1});
  CheckShape(random_, {64, kMaxGroup, 1, /*tiles=*/true});
  CheckShape(random_, {64, 7, 4});
}

TEST_F(ScoreTest, CanBeCaptured) { CheckShape(random_, {128, 16, 2}, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
