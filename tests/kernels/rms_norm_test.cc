#include "kernels/rms_norm/rms_norm_reference.h"

#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using RmsNormTest = KernelTest;

enum class Addend { kNone, kGiven };
enum class Source { kSame, kGiven };

void CheckShape(Random& random, int rows, int width, Addend with_addend, Source with_source,
                LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message() << "rows " << rows << ", width " << width << ", addend "
                                    << (with_addend == Addend::kGiven) << ", source "
                                    << (with_source == Source::kGiven));
  const int step_rows = rows + 3;
  std::vector<float> hidden = random.Normals(size_t(step_rows) * width, 3);
  // A row of zeros: rsqrt(eps), no division by zero. And one far from 1.
  std::fill(hidden.begin(), hidden.begin() + width, 0.0f);
  for (int i = 0; i < width; ++i) hidden[width + i] *= 1e4f;
  const std::vector<float> addend = random.Normals(hidden.size(), 3);
  const std::vector<float> weight = random.Normals(width);
  const std::vector<int32_t> source = random.Sample(rows, step_rows);
  std::vector<__nv_bfloat16> out = Poison<__nv_bfloat16>(size_t(rows) * width);

  DeviceArray<float> device_hidden(hidden), device_addend(addend), device_weight(weight);
  DeviceArray<int32_t> device_source(source);
  DeviceArray<__nv_bfloat16> device_out(out);
  RmsNormParams params;
  params.hidden = device_hidden.data();
  params.addend = with_addend == Addend::kGiven ? device_addend.data() : nullptr;
  params.weight = device_weight.data();
  params.out = device_out.data();
  params.source = with_source == Source::kGiven ? device_source.data() : nullptr;
  params.rows = rows;
  params.width = width;
  params.eps = 1e-5f;
  Launch(LaunchRmsNorm, params, mode);

  params.hidden = hidden.data();
  if (params.addend != nullptr) params.addend = addend.data();
  params.weight = weight.data();
  params.out = out.data();
  if (params.source != nullptr) params.source = source.data();
  RmsNormReference(params);

  // One f32 addition has one result; rows that are not taken stay.
  ExpectSameBytes(device_hidden.Download(), hidden, "hidden");
  const std::vector<__nv_bfloat16> actual = device_out.Download();
  Comparison comparison("out");
  for (size_t i = 0; i < actual.size(); ++i) {
    const double expected = ToFloat(out[i]);
    comparison.Near(ToFloat(actual[i]), expected, kBf16Step * std::abs(expected) + 1e-30, i);
  }
}

TEST_F(RmsNormTest, AgreesWithTheReference) {
  for (const int rows : {1, 2, 7, 64, 70}) {
    for (const int width : {4, 64, 132, 1000, 4096, 5120}) {
      for (const Addend addend : {Addend::kNone, Addend::kGiven}) {
        for (const Source source : {Source::kSame, Source::kGiven}) {
          CheckShape(random_, rows, width, addend, source);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(RmsNormTest, CanBeCaptured) {
  CheckShape(random_, 64, 4096, Addend::kGiven, Source::kSame, LaunchMode::kGraph);
}

TEST_F(RmsNormTest, RefusesOtherSizes) {
  DeviceArray<float> floats(std::vector<float>(64));
  DeviceArray<__nv_bfloat16> out(std::vector<__nv_bfloat16>(64));
  RmsNormParams params;
  params.hidden = floats.data();
  params.weight = floats.data();
  params.out = out.data();
  params.rows = 0;
  params.width = 4;
  EXPECT_EQ(LaunchRmsNorm(params, nullptr), cudaErrorInvalidValue);
  params.rows = 1;
  params.width = 6;
  EXPECT_EQ(LaunchRmsNorm(params, nullptr), cudaErrorInvalidValue);
  params.width = 0;
  EXPECT_EQ(LaunchRmsNorm(params, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nosara::kernels
