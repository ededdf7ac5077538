#include "kernels/gather/gather_reference.h"

#include <algorithm>

#include "tests/kernels/cache_fixture.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using GatherTest = KernelTest;

struct Shape {
  int head_dim, kv_heads, loads, thread_blocks;
  bool landing = false;
};

void CheckShape(Random& random, const Shape& shape, LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message()
               << "D " << shape.head_dim << ", Hkv " << shape.kv_heads << ", loads " << shape.loads
               << ", thread blocks " << shape.thread_blocks << ", landing " << shape.landing);
  WorldOptions options;
  options.head_dim = shape.head_dim;
  options.layers = 2;
  options.kv_heads = shape.kv_heads;
  options.sequences = {{3000, 24}, {1, 0}, {1500, 20}};
  CacheWorld world(options, random);

  // Any stored block into any slot: gather trusts its list. No slot twice.
  const CacheView view = world.View();
  std::vector<Load> loads;
  for (int s = 0; s < world.sequences(); ++s) {
    for (int record = 0; record < view.records; ++record) {
      for (int slot = 0; slot < view.num_frames[s]; ++slot) {
        const int block = random.Below(world.blocks(s));
        if (view.pages[int64_t{s} * view.max_blocks + block] == 0) continue;
        loads.push_back({s, record, block, slot});
      }
    }
  }
  random.Shuffle(loads);
  ASSERT_GE(static_cast<int>(loads.size()), shape.loads) << "too small a world";
  const std::vector<int32_t> num_loads = {shape.loads};
  MappedMemory landing(shape.loads * RecordBytes(shape.head_dim));
  for (size_t i = 0; i < landing.bytes(); ++i) {
    landing.host()[i] = static_cast<std::byte>(random.Next());
  }

  DeviceMirror mirror(world);
  DeviceArray<Load> device_loads(loads);  // more than num_loads: the others must not be read
  DeviceArray<int32_t> device_num_loads(num_loads);
  GatherParams params{device_loads.data(), device_num_loads.data(), mirror.View(),
                      shape.landing ? landing.device() : nullptr, shape.thread_blocks};
  Launch(LaunchGather, params, mode);

  CacheWorld expected(world);
  params = {loads.data(), num_loads.data(), expected.View(),
            shape.landing ? landing.host() : nullptr, shape.thread_blocks};
  GatherReference(params);
  mirror.Download();
  ExpectSameBytes(world.slots, expected.slots, "slots");
}

TEST_F(GatherTest, CopiesTheBytesOfEachLoad) {
  for (const int head_dim : {64, 128}) {
    for (const int loads : {0, 1, 2, 15, 45, 130}) {
      for (const int thread_blocks : {1, 16, 24, 200}) {
        for (const bool landing : {false, true}) {
          CheckShape(random_, {head_dim, 2, loads, thread_blocks, landing});
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(GatherTest, CanBeCaptured) { CheckShape(random_, {128, 2, 45, 16}, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
