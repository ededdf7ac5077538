#include "kernels/embed/embed_reference.h"

#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {
namespace {

using EmbedTest = KernelTest;

void CheckShape(Random& random, int rows, int width, int half,
                LaunchMode mode = LaunchMode::kDirect) {
  SCOPED_TRACE(::testing::Message() << "rows " << rows << ", width " << width << ", half " << half);
  const int vocab = 200;
  const std::vector<__nv_bfloat16> table = random.NormalsBf16(size_t(vocab) * width);
  std::vector<int32_t> tokens(rows);
  std::vector<StepRow> info(rows);
  std::vector<double> frequencies(half);
  for (int i = 0; i < half; ++i) frequencies[i] = std::pow(10000.0, -double(i) / half);
  for (int r = 0; r < rows; ++r) {
    tokens[r] = random.Below(vocab);
    info[r] = {random.Below(4) - 1, random.Below(200000)};
  }
  info[0] = {0, 0};
  tokens[0] = vocab - 1;
  std::vector<float> hidden = Poison<float>(size_t(rows) * width);
  std::vector<float> cosine = Poison<float>(size_t(rows) * half);
  std::vector<float> sine = cosine;

  DeviceArray<__nv_bfloat16> device_table(table);
  DeviceArray<int32_t> device_tokens(tokens);
  DeviceArray<StepRow> device_info(info);
  DeviceArray<double> device_frequencies(frequencies);
  DeviceArray<float> device_hidden(hidden), device_cosine(cosine), device_sine(sine);
  EmbedParams params;
  params.table = device_table.data();
  params.tokens = device_tokens.data();
  params.rows_info = device_info.data();
  params.inverse_frequencies = device_frequencies.data();
  params.hidden = device_hidden.data();
  params.cosine = device_cosine.data();
  params.sine = device_sine.data();
  params.rows = rows;
  params.width = width;
  params.half = half;
  Launch(LaunchEmbed, params, mode);

  params.table = table.data();
  params.tokens = tokens.data();
  params.rows_info = info.data();
  params.inverse_frequencies = frequencies.data();
  params.hidden = hidden.data();
  params.cosine = cosine.data();
  params.sine = sine.data();
  EmbedReference(params);
  ExpectSameBytes(device_hidden.Download(), hidden, "hidden");
  const auto compare = [&](const std::vector<float>& actual, const std::vector<float>& expected,
                           const char* what) {
    Comparison comparison(what);
    // f64 results that differ in their last bits round to neighbouring floats at most.
    for (size_t i = 0; i < actual.size(); ++i) {
      comparison.Near(actual[i], expected[i], 0x1p-23 * std::abs(expected[i]) + 1e-14, i);
    }
  };
  compare(device_cosine.Download(), cosine, "cosine");
  compare(device_sine.Download(), sine, "sine");
}

TEST_F(EmbedTest, AgreesWithTheReference) {
  for (const int rows : {1, 2, 33, 70}) {
    for (const int width : {4, 128, 1000, 4096}) {
      for (const int half : {32, 64}) {
        CheckShape(random_, rows, width, half);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(EmbedTest, CanBeCaptured) { CheckShape(random_, 64, 4096, 64, LaunchMode::kGraph); }

}  // namespace
}  // namespace nosara::kernels
