#include <limits>

#include "kernels/sample/sample_reference.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
using ArgMaxTest = KernelTest;

void Check(const std::vector<float>& logits, int rows, int vocab,
           LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message() << "rows " << rows << ", vocab " << vocab);
  std::vector<int32_t> token = Poison<int32_t>(rows);
  DeviceArray<float> device_logits(logits);
  DeviceArray<int32_t> device_token(token);
  Launch(LaunchArgMax, ArgMaxParams{device_logits.data(), device_token.data(), rows, vocab}, mode);
  ArgMaxReference({logits.data(), token.data(), rows, vocab});
  EXPECT_EQ(device_token.Download(), token);
}

TEST_F(ArgMaxTest, AgreesWithTheReference) {
  for (const int rows : {1, 3, 64, 70}) {
    for (const int vocab : {1, 31, 32, 33, 1000, 1023, 4097, 73448}) {
      Check(random_.Normals(size_t(rows) * vocab, 5), rows, vocab);
      // Few values: many ties, of both zeros too.
      std::vector<float> ties(size_t(rows) * vocab);
      const float few[] = {-1.0f, -0.0f, 0.0f, -kInfinity};
      for (float& value : ties) value = few[random_.Below(4)];
      Check(ties, rows, vocab);
      if (HasFailure()) return;
    }
  }
}

TEST_F(ArgMaxTest, WhatIsNoNumberIsNeverChosen) {
  for (const int vocab : {1, 40, 5000}) {
    const float nan = std::nanf("");
    Check(std::vector<float>(2 * vocab, nan), 2, vocab);
    Check(std::vector<float>(2 * vocab, -kInfinity), 2, vocab);
    Check(std::vector<float>(2 * vocab, 1.5f), 2, vocab);
    std::vector<float> one(2 * vocab, nan);
    one[vocab - 1] = -5;
    one[vocab] = -kInfinity;
    one[2 * vocab - 1] = kInfinity;
    Check(one, 2, vocab);
    std::vector<float> mixed = random_.Normals(2 * vocab);
    for (float& value : mixed) {
      if (random_.Chance(0.3)) value = nan;
    }
    Check(mixed, 2, vocab);
  }
}

TEST_F(ArgMaxTest, CanBeCaptured) {
  Check(random_.Normals(64 * 73448), 64, 73448, LaunchMode::kGraph);
}

}  // namespace
}  // namespace nosara::kernels
