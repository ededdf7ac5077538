#include "worker/model/bf16.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "worker/model/dtype.h"

namespace nosara::worker {
namespace {

TEST(DTypeTest, SizesAndNames) {
  EXPECT_EQ(DTypeBytes(DType::kF32), 4u);
  EXPECT_EQ(DTypeBytes(DType::kBf16), 2u);
  EXPECT_EQ(DTypeName(DType::kF32), "f32");
  EXPECT_EQ(DTypeName(DType::kBf16), "bf16");
}

TEST(Bf16Test, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Bf16 value{static_cast<uint16_t>(bits)};
    const float wide = ToFloat(value);
    const Bf16 back = FromFloat(wide);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(ToFloat(back)));
      EXPECT_EQ(std::signbit(ToFloat(back)), std::signbit(wide));
    } else {
      ASSERT_EQ(back.bits, bits);
    }
  }
}

TEST(Bf16Test, RoundsToNearestTiesToEven) {
  // 1 + 2^-7 is the next bf16 after 1.
  EXPECT_EQ(RoundToBf16(1.0f + 0x1p-9f), 1.0f);
  EXPECT_EQ(RoundToBf16(1.0f + 0x1p-8f), 1.0f);                       // tie, 1 is even
  EXPECT_EQ(RoundToBf16(1.0f + 0x1p-8f + 0x1p-23f), 1.0f + 0x1p-7f);  // just above it
  EXPECT_EQ(RoundToBf16(1.0f + 0x1p-7f + 0x1p-8f), 1.0f + 0x1p-6f);   // tie, away from the odd
  EXPECT_EQ(RoundToBf16(-1.0f - 0x1p-8f), -1.0f);
  EXPECT_EQ(RoundToBf16(-0.0f), 0.0f);
  EXPECT_TRUE(std::signbit(RoundToBf16(-0.0f)));
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(RoundToBf16(std::numeric_limits<float>::max()), inf);
  EXPECT_EQ(RoundToBf16(-inf), -inf);
  // A NaN whose payload rounding would carry away.
  EXPECT_TRUE(std::isnan(RoundToBf16(std::bit_cast<float>(0x7f800001u))));
  EXPECT_TRUE(std::isnan(RoundToBf16(std::bit_cast<float>(0x7fffffffu))));
  EXPECT_TRUE(std::isnan(RoundToBf16(std::bit_cast<float>(0xffffffffu))));
}

TEST(Bf16Test, RandomValuesRoundToANearestNeighbour) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = random();
    const float value = std::bit_cast<float>(bits);
    const double rounded = RoundToBf16(value);
    if (!std::isfinite(value) || !std::isfinite(rounded)) continue;
    const double below = std::bit_cast<float>(bits & 0xffff0000u);
    const double above = std::bit_cast<float>((bits & 0xffff0000u) + 0x10000u);
    const double error = std::abs(rounded - value);
    ASSERT_LE(error, std::abs(below - value)) << bits;
    if (std::isfinite(above)) {
      ASSERT_LE(error, std::abs(above - value)) << bits;
    }
  }
}

TEST(Bf16Test, SpansConvertElementByElement) {
  std::vector<float> in(37);
  for (size_t i = 0; i < in.size(); ++i) in[i] = 0.1f * static_cast<float>(i) - 1.7f;
  std::vector<Bf16> narrow(in.size());
  std::vector<float> wide(in.size());
  FromFloat(in, absl::MakeSpan(narrow));
  ToFloat(narrow, absl::MakeSpan(wide));
  std::vector<float> in_place = in;
  RoundToBf16(absl::MakeSpan(in_place));
  for (size_t i = 0; i < in.size(); ++i) {
    EXPECT_EQ(narrow[i], FromFloat(in[i]));
    EXPECT_EQ(wide[i], RoundToBf16(in[i]));
    EXPECT_EQ(in_place[i], RoundToBf16(in[i]));
  }
}

}  // namespace
}  // namespace nosara::worker
