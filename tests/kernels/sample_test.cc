#include <limits>

#include "kernels/sample/sample_reference.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class SampleTest : public KernelTest {
 protected:
  void Check(const std::vector<float>& logits, const std::vector<DrawParams>& draw, int vocab,
             LaunchMode mode = LaunchMode::kDirect) {
    const int rows = static_cast<int>(draw.size());
    ASSERT_EQ(logits.size(), size_t(rows) * vocab);
    SCOPED_TRACE(::testing::Message() << "rows " << rows << ", vocab " << vocab);
    std::vector<int32_t> token = Poison<int32_t>(rows);
    DeviceArray<float> device_logits(logits);
    DeviceArray<DrawParams> device_draw(draw);
    DeviceArray<int32_t> device_token(token);
    Launch(LaunchSample,
           SampleParams{device_logits.data(), device_draw.data(), device_token.data(), rows, vocab},
           mode);
    SampleReference({logits.data(), draw.data(), token.data(), rows, vocab});
    EXPECT_EQ(device_token.Download(), token);
  }

  /// Any mixture of parameters.
  DrawParams AnyDraw() {
    DrawParams draw;
    draw.seed = random_.Below(1 << 30) * uint64_t{0x123456789};
    draw.position = random_.Below(1 << 20);
    const float temperatures[] = {0, 1e-6f, 0.3f, 1, 1.7f, 100};
    draw.temperature = temperatures[random_.Below(6)];
    const int top_ks[] = {0, 1, 2, 40, 1000, 1 << 30};
    if (random_.Chance(0.5)) draw.top_k = top_ks[random_.Below(6)];
    const float top_ps[] = {1e-9f, 0.1f, 0.9f, 0.999f, 1};
    if (random_.Chance(0.5)) draw.top_p = top_ps[random_.Below(5)];
    const float min_ps[] = {0, 1e-6f, 0.05f, 0.7f, 1};
    if (random_.Chance(0.4)) draw.min_p = min_ps[random_.Below(5)];
    return draw;
  }
};

TEST_F(SampleTest, GreedyAgreesWithTheReference) {
  for (const int rows : {1, 3, 64, 70}) {
    const std::vector<DrawParams> greedy(rows);
    for (const int vocab : {1, 31, 32, 33, 1000, 1023, 4097, 73448}) {
      Check(random_.Normals(size_t(rows) * vocab, 5), greedy, vocab);
      // Few values: many ties, of both zeros too.
      std::vector<float> ties(size_t(rows) * vocab);
      const float few[] = {-1.0f, -0.0f, 0.0f, -kInfinity};
      for (float& value : ties) value = few[random_.Below(4)];
      Check(ties, greedy, vocab);
      if (HasFailure()) return;
    }
  }
}

TEST_F(SampleTest, DrawsWhatTheReferenceDraws) {
  for (const int vocab : {1, 2, 31, 32, 33, 1000, 1025, 8192, 73448}) {
    for (int round = 0; round < 3; ++round) {
      std::vector<DrawParams> draw(96);
      for (DrawParams& one : draw) one = AnyDraw();
      Check(random_.Normals(draw.size() * vocab, round == 0   ? 0.1f
                                                 : round == 1 ? 4
                                                              : 30),
            draw, vocab);
      std::vector<float> ties(draw.size() * vocab);
      const float few[] = {-1.0f, 0.0f, 3.0f, 3.5f, -kInfinity};
      for (float& value : ties) value = few[random_.Below(5)];
      Check(ties, draw, vocab);
      if (HasFailure()) return;
    }
  }
}

TEST_F(SampleTest, WhatIsNoNumberIsNeverChosen) {
  for (const int vocab : {1, 40, 5000}) {
    for (const float temperature : {0.0f, 1.0f}) {
      std::vector<DrawParams> draw(2);
      for (DrawParams& one : draw) {
        one = AnyDraw();
        one.temperature = temperature;
      }
      const float nan = std::nanf("");
      Check(std::vector<float>(2 * vocab, nan), draw, vocab);
      Check(std::vector<float>(2 * vocab, -kInfinity), draw, vocab);
      Check(std::vector<float>(2 * vocab, 1.5f), draw, vocab);
      std::vector<float> one(2 * vocab, nan);
      one[vocab - 1] = -5;
      one[vocab] = -kInfinity;
      one[2 * vocab - 1] = kInfinity;
      Check(one, draw, vocab);
      std::vector<float> mixed = random_.Normals(2 * vocab);
      for (float& value : mixed) {
        if (random_.Chance(0.3)) value = nan;
      }
      Check(mixed, draw, vocab);
    }
  }
}

TEST_F(SampleTest, CanBeCaptured) {
  std::vector<DrawParams> draw(64);
  for (DrawParams& one : draw) one = AnyDraw();
  Check(random_.Normals(draw.size() * 73448, 3), draw, 73448, LaunchMode::kGraph);
}

}  // namespace
}  // namespace nosara::kernels
