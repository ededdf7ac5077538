#include <limits>

#include "kernels/attend/attend_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/direct_attention.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
using AttendTest = KernelTest;

struct Shape {
  int head_dim, group, kv_heads;
  int resident_splits = 1;
  int loaded_splits = 0;  // 0: everything is resident
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

Batch MakeBatch(CacheWorld& world, int group, bool with_loaded, float query_scale, Random& random) {
  const int Hkv = world.options().kv_heads;
  Batch batch;
  for (const int32_t s : random.Sample(world.sequences(), world.sequences())) {
    if (random.Chance(0.3)) batch.info.push_back({-1, 77});
    batch.info.push_back({s, world.tokens(s) - 1});
  }
  // And one that does not see the end of its last block.
  batch.info.push_back({world.sequences() - 1, world.tokens(world.sequences() - 1) - 3});
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
      // Of the resident blocks up to the row's own, some, and always the own one; any order.
      const int own = row.position / 64;
      std::vector<int32_t> candidates;
      for (const int32_t b : world.Resident(row.sequence, Hkv + h)) {
        if (b < own) candidates.push_back(b);
      }
      random.Shuffle(candidates);
      const int others = std::min<int>(candidates.size(), batch.max_selected - 1);
      candidates.resize(random.Chance(0.5) ? others : random.Below(others + 1));
      candidates.push_back(own);
      random.Shuffle(candidates);
      const int all = static_cast<int>(candidates.size());
      const int edges[] = {0, all, random.Below(all + 1)};
      batch.ranges[r * Hkv + h] = make_int2(with_loaded ? edges[random.Below(3)] : all, all);
      for (int i = 0; i < all; ++i) {
        const int at = (r * Hkv + h) * batch.max_selected + i;
        batch.blocks[at] = candidates[i];
        batch.slots[at] = static_cast<int32_t>(view.SlotOf(row.sequence, Hkv + h, candidates[i]));
      }
    }
  }
  return batch;
}

void CheckShape(Random& random, CacheWorld& world, const Shape& shape,
                LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", G " << shape.group << ", Hkv " << shape.kv_heads
               << ", splits " << shape.resident_splits << " + " << shape.loaded_splits
               << ", with bias " << (shape.bias == AttendBias::kCache) << ", query scale "
               << shape.query_scale);
  const int D = shape.head_dim;
  const int Hkv = shape.kv_heads;
  const int G = shape.group;
  Batch batch = MakeBatch(world, G, shape.loaded_splits > 0, shape.query_scale, random);
  const int rows = static_cast<int>(batch.info.size());
  const int total_splits = shape.resident_splits + shape.loaded_splits;
  std::vector<float> partial_o = Poison<float>(size_t(rows) * Hkv * total_splits * G * D);
  std::vector<float2> partial_mz = Poison<float2>(size_t(rows) * Hkv * total_splits * G);

  DeviceMirror mirror(world);
  DeviceArray<__nv_bfloat16> device_q(batch.q);
  DeviceArray<StepRow> device_info(batch.info);
  DeviceArray<int32_t> device_slots(batch.slots), device_blocks(batch.blocks);
  DeviceArray<int2> device_ranges(batch.ranges);
  DeviceArray<float> device_o(partial_o);
  DeviceArray<float2> device_mz(partial_mz);
  AttendParams params;
  params.q = device_q.data();
  params.rows_info = device_info.data();
  params.slots = device_slots.data();
  params.blocks = device_blocks.data();
  params.ranges = device_ranges.data();
  params.cache = mirror.View();
  params.partial_o = device_o.data();
  params.partial_mz = device_mz.data();
  params.rows = rows;
  params.num_heads = Hkv * G;
  params.num_kv_heads = Hkv;
  params.max_selected = batch.max_selected;
  params.num_splits = shape.resident_splits;
  params.total_splits = total_splits;
  params.part = AttendPart::kResident;
  params.bias = shape.bias;
  Launch(LaunchAttend, params, mode);
  if (shape.loaded_splits > 0) {
    ExpectPoison(device_mz.Download(), shape.resident_splits * G, total_splits * G,
                 "partials of splits that a launch does not write");
    params.first_split = shape.resident_splits;
    params.num_splits = shape.loaded_splits;
    params.part = AttendPart::kLoaded;
    Launch(LaunchAttend, params, mode);
  }
  DeviceArray<__nv_bfloat16> device_out(Poison<__nv_bfloat16>(batch.q.size()));
  MergeParams merge{device_o.data(),
                    device_mz.data(),
                    device_info.data(),
                    device_out.data(),
                    rows,
                    Hkv * G,
                    Hkv,
                    D,
                    total_splits};
  Launch(LaunchMerge, merge, mode);

  partial_o = device_o.Download();
  partial_mz = device_mz.Download();
  const std::vector<__nv_bfloat16> out = device_out.Download();
  if (::testing::Test::HasFailure()) return;
  const CacheView view = world.View();
  Comparison partials("partials of the kernel, merged in f64; at row"),
      merged("output of both kernels, at row");
  for (int r = 0; r < rows; ++r) {
    for (int head = 0; head < Hkv * G; ++head) {
      const int64_t pair = int64_t{r} * Hkv + head / G;
      const int64_t first = pair * total_splits * G + head % G;
      const __nv_bfloat16* output = &out[(int64_t{r} * Hkv * G + head) * D];
      if (batch.info[r].sequence < 0) {
        for (int s = 0; s < total_splits; ++s) {
          ExpectPoison(partial_mz, first + s * G, first + s * G + 1, "m, z of a padding row");
        }
        for (int d = 0; d < D; ++d) merged.Near(ToFloat(output[d]), 0, 0, r);
        continue;
      }
      const int2 range = batch.ranges[pair];
      std::vector<std::pair<std::byte*, int>> list;
      for (int i = 0; i < range.y; ++i) {
        const int64_t at = pair * batch.max_selected + i;
        list.push_back({view.Slot(batch.slots[at]), batch.blocks[at]});
      }
      const DirectAttention expected = AttendDirectly(&batch.q[(int64_t{r} * Hkv * G + head) * D],
                                                      D, batch.info[r].position, shape.bias, list);
      double m = -kInfinity, z = 0;
      for (int s = 0; s < total_splits; ++s) {
        m = std::max<double>(m, partial_mz[first + s * G].x);
        // A part without blocks: every one of its shares is empty.
        const bool resident = s < shape.resident_splits;
        if ((resident ? range.x : range.y - range.x) == 0) {
          const float2 mz = partial_mz[first + s * G];
          EXPECT_TRUE(mz.x == -kInfinity && mz.y == 0)
              << "row " << r << ", head " << head << ", split " << s << " is empty, not (" << mz.x
              << ", " << mz.y << ")";
          for (int d = 0; d < D; ++d) {
            ASSERT_EQ(partial_o[(first + s * G) * D + d], 0) << "row " << r << ", split " << s;
          }
        }
      }
      std::vector<double> o(D, 0.0);
      for (int s = 0; s < total_splits; ++s) {
        const float2 mz = partial_mz[first + s * G];
        const double weight = std::exp(mz.x - m);
        z += weight * mz.y;
        for (int d = 0; d < D; ++d) o[d] += weight * partial_o[(first + s * G) * D + d];
      }
      for (int d = 0; d < D; ++d) {
        // Large queries: the logit's own f32 error counts, relative in p.
        const double logit_error = 2e-6 * shape.query_scale * expected.size[d];
        partials.Near(o[d] / z, expected.output[d],
                      AttentionTolerance(expected.size[d]) + logit_error, r);
        merged.Near(ToFloat(output[d]), expected.output[d],
                    RoundedAttentionTolerance(expected.output[d], expected.size[d]) + logit_error,
                    r);
      }
    }
  }
}

std::unique_ptr<CacheWorld> MakeWorld(int head_dim, int kv_heads, Random& random) {
  WorldOptions options;
  options.head_dim = head_dim;
  options.layers = 2;
  options.kv_heads = kv_heads;
  options.sequences = {{1}, {2}, {63}, {64}, {65}, {1000, 9}, {5000, 40}};
  return std::make_unique<CacheWorld>(options, random);
}

TEST_F(AttendTest, AgreesWithAttentionInDoublePrecision) {
  for (const int head_dim : {64, 128}) {
    for (const int kv_heads : {1, 2, 3}) {
      const auto world = MakeWorld(head_dim, kv_heads, random_);
      for (const int group : {1, 4, 8, 16, 32}) {
        Shape shape{head_dim, group, kv_heads};
        shape.resident_splits = random_.Between(1, 6);
        shape.loaded_splits = random_.Below(3);
        if (random_.Chance(0.2)) shape.bias = AttendBias::kNone;
        CheckShape(random_, *world, shape);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(AttendTest, AnyNumberOfSplitsGivesTheSame) {
  const auto world = MakeWorld(128, 2, random_);
  for (const int resident : {1, 2, 3, 4, 7, 8, 16, 64}) {
    for (const int loaded : {0, 1, 2, 5}) {
      CheckShape(random_, *world, {128, 16, 2, resident, loaded});
      if (HasFailure()) return;
    }
  }
}

TEST_F(AttendTest, PeakedAndFlatDistributions) {
  const auto world = MakeWorld(128, 2, random_);
  for (const float scale : {0.0f, 0.01f, 20.0f}) {
    for (const AttendBias bias : {AttendBias::kNone, AttendBias::kCache}) {
      CheckShape(random_, *world, {128, 16, 2, 4, 2, bias, scale});
      if (HasFailure()) return;
    }
  }
}

TEST_F(AttendTest, LargestGroup) {
  const auto wide = MakeWorld(128, 1, random_);
  CheckShape(random_, *wide, {128, kMaxGroup, 1, 4, 1});
  CheckShape(random_, *wide, {128, 5, 1, 4, 1});
  const auto narrow = MakeWorld(64, 1, random_);
  CheckShape(random_, *narrow, {64, kMaxGroup, 1, 4, 1});
}

TEST_F(AttendTest, CanBeCaptured) {
  const auto world = MakeWorld(128, 2, random_);
  CheckShape(random_, *world, {128, 16, 2, 4, 2}, LaunchMode::kGraph);
}

TEST_F(AttendTest, MergeAgreesWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 4, 16, 64}) {
      for (const int splits : {1, 2, 7, 64}) {
        const int rows = 9, Hkv = 2, Hq = Hkv * group;
        SCOPED_TRACE(::testing::Message()
                     << "D " << head_dim << ", G " << group << ", splits " << splits);
        const size_t count = size_t(rows) * Hq * splits;
        std::vector<float> o = random_.Normals(count * head_dim);
        std::vector<float2> mz(count);
        std::vector<StepRow> info(rows);
        for (size_t i = 0; i < count; ++i) {
          mz[i] = {20 * random_.Normal(), 1 + 60 * static_cast<float>(random_.Uniform())};
          // Split s of G heads of a pair; the first one is never empty.
          const bool first_split = i / group % splits == 0;
          if (first_split || random_.Chance(0.6)) continue;
          mz[i] = {-kInfinity, 0};
          std::fill_n(o.begin() + i * head_dim, head_dim, 0.0f);
        }
        for (int r = 0; r < rows; ++r) info[r] = {r % 4 == 1 ? -1 : r, 100};
        std::vector<__nv_bfloat16> out = Poison<__nv_bfloat16>(size_t(rows) * Hq * head_dim);
        DeviceArray<float> device_o(o);
        DeviceArray<float2> device_mz(mz);
        DeviceArray<StepRow> device_info(info);
        DeviceArray<__nv_bfloat16> device_out(out);
        Launch(LaunchMerge, MergeParams{device_o.data(), device_mz.data(), device_info.data(),
                                        device_out.data(), rows, Hq, Hkv, head_dim, splits});
        MergeReference(
            {o.data(), mz.data(), info.data(), out.data(), rows, Hq, Hkv, head_dim, splits});
        const std::vector<__nv_bfloat16> actual = device_out.Download();
        Comparison comparison("out");
        for (size_t i = 0; i < out.size(); ++i) {
          // Sums of `splits` numbers of size 1 at most, where one may cancel another.
          const double expected = ToFloat(out[i]);
          comparison.Near(ToFloat(actual[i]), expected, kBf16Step * std::abs(expected) + 2e-5, i);
        }
      }
    }
  }
}

}  // namespace
}  // namespace nosara::kernels
