#include "kernels/append/append_reference.h"

#include <set>

#include "kernels/common/record_reference.h"
#include "kernels/windows/windows_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using AppendTest = KernelTest;

struct Shape {
  int head_dim, group, kv_heads, rows;
  bool bias = false;
  bool eviction_head = true;
  bool delta_bias = false;
  AppendWindows windows = AppendWindows::kLeave;
};

/// Rows at any place of few sequences, each place once.
std::vector<StepRow> AnyRows(const CacheWorld& world, int rows, Random& random) {
  std::vector<StepRow> info(rows);
  std::set<std::pair<int, int>> taken;
  for (StepRow& row : info) {
    if (random.Chance(0.15)) {
      row = {-1, random.Below(100)};
      continue;
    }
    do {
      row.sequence = random.Below(world.sequences());
      // The block's last and first rows often.
      const int blocks = world.blocks(row.sequence);
      const int edges[] = {0, 63, random.Below(64)};
      row.position = 64 * random.Below(blocks) + edges[random.Below(3)];
    } while (!taken.insert({row.sequence, row.position}).second);
  }
  return info;
}

/// A row of each sequence, in any order, with padding: most of them complete a window.
std::vector<StepRow> RowsOfDifferentSequences(const CacheWorld& world, Random& random) {
  std::vector<StepRow> info;
  for (const int32_t s : random.Sample(world.sequences(), world.sequences())) {
    if (random.Chance(0.15)) info.push_back({-1, 31});
    const int last = world.tokens(s) - 1;
    int t = random.Chance(0.6) ? last : random.Below(last + 1);
    if (random.Chance(0.3)) t = std::min(last, t / 16 * 16 + 15);
    info.push_back({s, t});
  }
  return info;
}

/// Sequences whose last tokens complete no window (positions 14, 15, 30, 32, 64), the first one
/// (31), one of one block (63, 95) or of two (79, 143), the last of an index slot (2063) and the
/// first of the next one, of one block (2079).
std::vector<SequenceSpec> WindowSequences(int count, Random& random) {
  const int tokens[] = {32, 80, 15, 64, 16, 31, 33, 96, 65, 144, 600, 2080, 2064};
  std::vector<SequenceSpec> specs;
  for (int i = 0; i < count; ++i) specs.push_back({tokens[i % std::size(tokens)]});
  random.Shuffle(specs);
  return specs;
}

/// Compares the windows that the rows complete with what they should be of the rows in `expected`,
/// and copies them there.
void CheckWindows(const std::vector<StepRow>& info, int kv_heads, CacheWorld& world,
                  CacheWorld& expected) {
  const CacheView view = world.View();
  const int D = view.head_dim;
  const WindowsParams params{info.data(), expected.View(), static_cast<int>(info.size()), kv_heads,
                             /*layer=*/1};
  WindowsReference(params);
  Comparison keys("kc, at position"), scores("e, at position");
  keys.Near(0, 0, 0, 0);  // no row may complete a window
  scores.Near(0, 0, 0, 0);
  for (const StepRow& row : info) {
    if (row.sequence < 0 || row.position < 31 || row.position % 16 != 15) continue;
    const int window = (row.position - 31) / 16;
    for (int h = 0; h < kv_heads; ++h) {
      std::byte* actual = view.IndexSlot(row.sequence, kv_heads + h, window);
      std::byte* wanted = params.cache.IndexSlot(row.sequence, kv_heads + h, window);
      double size = 1;  // of the scores: c grows with the width of v
      for (int t = row.position - 31; t <= row.position; ++t) {
        std::byte* record =
            params.cache.Slot(params.cache.SlotOf(row.sequence, kv_heads + h, t / kBlockTokens));
        size = std::max<double>(size, std::abs(RecordBias(record, D)[t % kBlockTokens]));
      }
      for (int i = 0; i < D; ++i) {
        // A sum of 32 numbers of size 1 in another order, then a step of bf16.
        const double mean = ToFloat(IndexKey(wanted, D, window)[i]);
        keys.Near(ToFloat(IndexKey(actual, D, window)[i]), mean, kBf16Step * std::abs(mean) + 1e-6,
                  row.position);
      }
      scores.Near(*IndexScore(actual, D, window), *IndexScore(wanted, D, window), 1e-6 * size,
                  row.position);
      std::copy_n(IndexKey(actual, D, window), D, IndexKey(wanted, D, window));
      *IndexScore(wanted, D, window) = *IndexScore(actual, D, window);
    }
  }
}

void CheckShape(Random& random, const Shape& shape, LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
               << ", rows " << shape.rows << ", bias " << shape.bias << ", eviction head "
               << shape.eviction_head << ", its bias " << shape.delta_bias << ", windows "
               << (shape.windows == AppendWindows::kUpdate));
  const int D = shape.head_dim;
  const int Hkv = shape.kv_heads;
  const int Hq = shape.group * Hkv;
  const int width = (Hq + 2 * Hkv) * D;
  WorldOptions options;
  options.head_dim = D;
  options.layers = 2;
  options.kv_heads = Hkv;
  const bool windows = shape.windows == AppendWindows::kUpdate;
  options.with_pages = false;
  options.sequences = {{1}, {64}, {65}, {130}, {300}};
  if (windows) options.sequences = WindowSequences(shape.rows, random);
  CacheWorld world(options, random);
  const std::vector<StepRow> info =
      windows ? RowsOfDifferentSequences(world, random) : AnyRows(world, shape.rows, random);
  const int rows = static_cast<int>(info.size());
  std::vector<float> qkv = random.Normals(size_t(rows) * width);
  std::vector<float> cosine(rows * D / 2), sine(cosine.size());
  for (size_t i = 0; i < cosine.size(); ++i) {
    const double angle = 100 * random.Uniform();
    cosine[i] = static_cast<float>(std::cos(angle));
    sine[i] = static_cast<float>(std::sin(angle));
  }
  for (int r = 0; r < rows; ++r) {
    if (info[r].sequence >= 0) continue;
    std::fill_n(qkv.begin() + int64_t{r} * width, width, std::nanf(""));
  }
  const std::vector<float> bias = random.Normals(width);
  std::vector<float> A = random.Normals(Hkv);
  const std::vector<float> delta = random.Normals(size_t(Hkv) * Hkv * D);
  const std::vector<float> delta_bias = random.Normals(Hkv);
  std::vector<__nv_bfloat16> q = Poison<__nv_bfloat16>(size_t(rows) * Hq * D);

  DeviceMirror mirror(world);
  DeviceArray<float> device_qkv(qkv), device_bias(bias), device_A(A), device_delta(delta),
      device_delta_bias(delta_bias), device_cosine(cosine), device_sine(sine);
  DeviceArray<StepRow> device_info(info);
  DeviceArray<__nv_bfloat16> device_q(q);
  AppendParams params;
  params.qkv = device_qkv.data();
  params.bias = shape.bias ? device_bias.data() : nullptr;
  params.A = shape.eviction_head ? device_A.data() : nullptr;
  params.delta = shape.eviction_head ? device_delta.data() : nullptr;
  params.delta_bias = shape.delta_bias ? device_delta_bias.data() : nullptr;
  params.cosine = device_cosine.data();
  params.sine = device_sine.data();
  params.rows_info = device_info.data();
  params.q = device_q.data();
  params.cache = mirror.View();
  params.rows = rows;
  params.num_heads = Hq;
  params.num_kv_heads = Hkv;
  params.layer = 1;
  params.windows = shape.windows;
  Launch(LaunchAppend, params, mode);

  CacheWorld expected_world(world);
  params.qkv = qkv.data();
  if (shape.bias) params.bias = bias.data();
  if (shape.eviction_head) params.A = A.data();
  if (shape.eviction_head) params.delta = delta.data();
  if (shape.delta_bias) params.delta_bias = delta_bias.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  params.rows_info = info.data();
  params.q = q.data();
  params.cache = expected_world.View();
  AppendReference(params);
  mirror.Download();

  // RoPE in f32: each product rounds, and with a fused multiply-add only one of them; then a step
  // of bf16. `size` bounds the products.
  const auto tolerance = [&](double expected, double size) {
    return kBf16Step * std::abs(expected) + 0x1p-22 * size + 1e-30;
  };
  const auto input = [&](int r, int64_t i) {
    return std::abs(qkv[int64_t{r} * width + i]) + (shape.bias ? std::abs(bias[i]) : 0.0f);
  };
  const std::vector<__nv_bfloat16> actual_q = device_q.Download();
  {
    Comparison comparison("q");
    comparison.Near(0, 0, 0, 0);  // all rows may be padding
    for (int r = 0; r < rows; ++r) {
      const int64_t row = int64_t{r} * Hq * D;
      if (info[r].sequence < 0) {
        ExpectPoison(actual_q, row, row + Hq * D, "q of a padding row");
        continue;
      }
      for (int i = 0; i < Hq * D; ++i) {
        const int partner = i % D < D / 2 ? i + D / 2 : i - D / 2;
        const double expected = ToFloat(q[row + i]);
        comparison.Near(ToFloat(actual_q[row + i]), expected,
                        tolerance(expected, input(r, i) + input(r, partner)), row + i);
      }
    }
  }
  Comparison keys("k"), values("v"), biases("c");
  for (Comparison* comparison : {&keys, &values, &biases}) comparison->Near(0, 0, 0, 0);
  const CacheView actual_view = world.View();
  for (int r = 0; r < rows; ++r) {
    if (info[r].sequence < 0) continue;
    const int token = info[r].position % 64;
    for (int h = 0; h < Hkv; ++h) {
      const int64_t number =
          actual_view.SlotOf(info[r].sequence, Hkv + h, info[r].position / kBlockTokens);
      std::byte* actual = actual_view.Slot(number);
      std::byte* expected = params.cache.Slot(number);
      for (int i = 0; i < D; ++i) {
        const int64_t from = (Hq + h) * D;
        const int partner = i < D / 2 ? i + D / 2 : i - D / 2;
        const double k = ToFloat(RecordKey(expected, D, token)[i]);
        keys.Near(ToFloat(RecordKey(actual, D, token)[i]), k,
                  tolerance(k, input(r, from + i) + input(r, from + partner)), r);
        // One addition and one rounding have one result.
        values.Near(ToFloat(RecordValue(actual, D, token)[i]),
                    ToFloat(RecordValue(expected, D, token)[i]), 0, r);
      }
      double size = 1;
      for (int j = 0; j < Hkv * D; ++j) {
        size += std::abs(delta[h * Hkv * D + j]) * input(r, (Hq + Hkv) * D + j);
      }
      // A sum of Hkv * D products in another order; softplus has slope 1 at most.
      biases.Near(RecordBias(actual, D)[token], RecordBias(expected, D)[token],
                  shape.eviction_head ? 1e-6 * size * std::abs(A[h]) + 1e-7 : 0, r);
      // What was compared counts as the same: all other bytes must be.
      std::copy_n(RecordKey(actual, D, token), D, RecordKey(expected, D, token));
      std::copy_n(RecordValue(actual, D, token), D, RecordValue(expected, D, token));
      RecordBias(expected, D)[token] = RecordBias(actual, D)[token];
    }
  }
  if (windows) CheckWindows(info, Hkv, world, expected_world);
  ExpectSameBytes(world.slots, expected_world.slots, "bytes of slots that no row writes");
}

TEST_F(AppendTest, AgreesWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 4, 8, 16, 32}) {
      for (const int kv_heads : {1, 2, 3, 4}) {
        for (const int rows : {1, 9, 70}) {
          Shape shape{head_dim, group, kv_heads, rows};
          shape.bias = random_.Chance(0.5);
          shape.eviction_head = random_.Chance(0.8);
          shape.delta_bias = shape.eviction_head && random_.Chance(0.5);
          CheckShape(random_, shape);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(AppendTest, ChunksOfManyRows) {
  CheckShape(random_, {128, 16, 2, 300});
  CheckShape(random_, {64, 4, 1, 256, /*bias=*/true});
}

TEST_F(AppendTest, UpdatesTheWindowsThatItsRowsComplete) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 16}) {
      for (const int kv_heads : {1, 2, 3, 4}) {
        for (const int rows : {1, 13, 40}) {
          Shape shape{head_dim, group, kv_heads, rows};
          shape.windows = AppendWindows::kUpdate;
          shape.bias = random_.Chance(0.5);
          shape.eviction_head = random_.Chance(0.8);
          CheckShape(random_, shape);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(AppendTest, CanBeCaptured) {
  Shape shape{128, 16, 2, 64};
  CheckShape(random_, shape, LaunchMode::kGraph);
  shape.windows = AppendWindows::kUpdate;
  CheckShape(random_, shape, LaunchMode::kGraph);
}

TEST_F(AppendTest, TheScoreIsFiniteForLargeInputs) {
  // softplus(x) is x for large x and 0 for very negative x: no exp may overflow.
  for (const float scale : {500.0f, -500.0f}) {
    WorldOptions options;
    options.head_dim = 64;
    options.layers = 1;
    options.kv_heads = 1;
    options.sequences = {{1}};
    CacheWorld world(options, random_);
    DeviceMirror mirror(world);
    DeviceArray<float> qkv(std::vector<float>(3 * 64, scale)), delta(std::vector<float>(64, 1.0f)),
        A(std::vector<float>{2.0f}), cosine(std::vector<float>(32, 1.0f)),
        sine(std::vector<float>(32, 0.0f));
    DeviceArray<StepRow> info(std::vector<StepRow>{{0, 0}});
    DeviceArray<__nv_bfloat16> q{std::vector<__nv_bfloat16>(64)};
    AppendParams params;
    params.qkv = qkv.data();
    params.A = A.data();
    params.delta = delta.data();
    params.cosine = cosine.data();
    params.sine = sine.data();
    params.rows_info = info.data();
    params.q = q.data();
    params.cache = mirror.View();
    params.rows = params.num_heads = params.num_kv_heads = 1;
    Launch(LaunchAppend, params);
    mirror.Download();
    const CacheView view = world.View();
    EXPECT_EQ(RecordBias(view.Slot(view.SlotOf(0, 0, 0)), 64)[0], scale > 0 ? 2 * 64 * scale : 0);
  }
}

}  // namespace
}  // namespace nosara::kernels
