#include "kernels/swiglu/swiglu_reference.h"

#include <limits>

#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using SwiGluTest = KernelTest;

void CheckShape(Random& random, int rows, int width, LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message() << "rows " << rows << ", width " << width);
  std::vector<float> gate_up = random.Normals(size_t(rows) * 2 * width, 4);
  // Where exp overflows or vanishes, and what is no number. The gates come first in a row.
  const float infinity = std::numeric_limits<float>::infinity();
  const float edges[] = {0.0f,  -0.0f,  30.0f,   -30.0f, 88.0f,    -88.0f,
                         1e10f, 1e-20f, -1e-20f, 100.0f, infinity, std::nanf("")};
  for (int i = 0; i < std::min<int>(width, std::size(edges)); ++i) gate_up[i] = edges[i];
  std::vector<__nv_bfloat16> out = Poison<__nv_bfloat16>(size_t(rows) * width);

  DeviceArray<float> device_gate_up(gate_up);
  DeviceArray<__nv_bfloat16> device_out(out);
  SwiGluParams params{device_gate_up.data(), device_out.data(), rows, width};
  Launch(LaunchSwiGlu, params, mode);
  params = {gate_up.data(), out.data(), rows, width};
  SwiGluReference(params);

  const std::vector<__nv_bfloat16> actual = device_out.Download();
  Comparison comparison("out");
  for (size_t i = 0; i < actual.size(); ++i) {
    const double expected = ToFloat(out[i]);
    // A step of bf16 for exp and the division; results below 1e-30 may vanish.
    comparison.Near(ToFloat(actual[i]), expected, kBf16Step * std::abs(expected) + 1e-30, i);
  }
}

TEST_F(SwiGluTest, AgreesWithTheReference) {
  for (const int rows : {1, 2, 17, 70}) {
    for (const int width : {4, 60, 128, 1000, 4096, 16384}) {
      CheckShape(random_, rows, width);
      if (HasFailure()) return;
    }
  }
}

TEST_F(SwiGluTest, VeryNegativeGatesGiveNothing) {
  std::vector<float> gate_up = {-1e4f, -1e30f, -200.0f, -104.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  DeviceArray<float> device_gate_up(gate_up);
  DeviceArray<__nv_bfloat16> device_out(Poison<__nv_bfloat16>(4));
  Launch(LaunchSwiGlu, SwiGluParams{device_gate_up.data(), device_out.data(), 1, 4});
  for (const __nv_bfloat16 value : device_out.Download()) EXPECT_NEAR(ToFloat(value), 0, 1e-30);
}

TEST_F(SwiGluTest, CanBeCaptured) { CheckShape(random_, 64, 16384, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
