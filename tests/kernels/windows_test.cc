#include "kernels/windows/windows_reference.h"

#include "kernels/common/record_reference.h"
#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using WindowsTest = KernelTest;

void CheckRows(Random& random, int head_dim, int kv_heads, int rows,
               LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << head_dim << ", Hkv " << kv_heads << ", rows " << rows);
  WorldOptions options;
  options.head_dim = head_dim;
  options.layers = 2;
  options.kv_heads = kv_heads;
  // 2111 tokens have 130 windows: the last two lie in a second index frame.
  options.sequences = {{15}, {31}, {32}, {48}, {64}, {65}, {128}, {600}, {2111}};
  CacheWorld world(options, random);
  CacheWorld expected(world);

  // Single rows as in decoding (most of them complete a window), or chunks.
  std::vector<StepRow> info;
  while (static_cast<int>(info.size()) < rows) {
    const int sequence = random.Below(world.sequences() + 1) - 1;
    if (sequence < 0) {
      info.push_back({-1, 31});
      continue;
    }
    const int tokens = world.tokens(sequence);
    int t = random.Below(tokens);
    if (random.Chance(0.7)) t = std::min(tokens - 1, t / 16 * 16 + 15);
    if (random.Chance(0.2)) t = tokens - 1;
    const int length = random.Chance(0.3) ? random.Between(1, 40) : 1;
    for (int i = 0; i < length && t < tokens && static_cast<int>(info.size()) < rows; ++i) {
      info.push_back({sequence, t++});
    }
  }
  DeviceMirror mirror(world);
  DeviceArray<StepRow> device_info(info);
  WindowsParams params{device_info.data(), mirror.View(), rows, kv_heads, /*layer=*/1};
  Launch(LaunchWindows, params, mode);
  params.rows_info = info.data();
  params.cache = expected.View();
  WindowsReference(params);
  mirror.Download();

  Comparison keys("kc"), scores("e");
  keys.Near(0, 0, 0, 0);  // no row may complete a window
  scores.Near(0, 0, 0, 0);
  const CacheView view = world.View();
  for (const StepRow& row : info) {
    if (row.sequence < 0 || row.position < 31 || row.position % 16 != 15) continue;
    const int window = (row.position - 31) / 16;
    for (int h = 0; h < kv_heads; ++h) {
      std::byte* actual = view.IndexSlot(row.sequence, kv_heads + h, window);
      std::byte* wanted = params.cache.IndexSlot(row.sequence, kv_heads + h, window);
      for (int i = 0; i < head_dim; ++i) {
        // A sum of 32 numbers of size 1 in another order, then a step of bf16.
        const double mean = ToFloat(IndexKey(wanted, head_dim, window)[i]);
        keys.Near(ToFloat(IndexKey(actual, head_dim, window)[i]), mean,
                  kBf16Step * std::abs(mean) + 1e-6, row.position);
      }
      scores.Near(*IndexScore(actual, head_dim, window), *IndexScore(wanted, head_dim, window),
                  1e-6, row.position);
      std::copy_n(IndexKey(actual, head_dim, window), head_dim, IndexKey(wanted, head_dim, window));
      *IndexScore(wanted, head_dim, window) = *IndexScore(actual, head_dim, window);
    }
  }
  ExpectSameBytes(world.slots, expected.slots, "bytes of slots that no row writes");
}

TEST_F(WindowsTest, AgreesWithTheReference) {
  for (const int head_dim : {64, 128}) {
    for (const int kv_heads : {1, 2, 4}) {
      for (const int rows : {1, 2, 33, 70, 200}) {
        CheckRows(random_, head_dim, kv_heads, rows);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(WindowsTest, CanBeCaptured) { CheckRows(random_, 128, 2, 64, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
