// What the tests of all kernels share: the device, the seed, and comparisons that say much.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/cache_view.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random.h"

namespace nosara::kernels {

/// Skips where there is no GPU; shows the seed of a test that failed.
class KernelTest : public ::testing::Test {
 protected:
  KernelTest() : random_(TestSeed()) {}

  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "needs a GPU: " << cudaGetErrorString(error);
    }
    RecordProperty("seed", std::to_string(TestSeed()));
  }
  void TearDown() override {
    if (HasFailure()) std::printf("seed: run again with --gtest_random_seed=%u\n", TestSeed());
  }

  Random random_;
};

inline float ToFloat(float value) { return value; }
inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

/// Compares many values, and reports them as one: how many are wrong, the first and the worst.
class Comparison final {
 public:
  explicit Comparison(std::string what) : what_(std::move(what)) {}
  ~Comparison() {
    if (wrong_ > 0) {
      ADD_FAILURE() << what_ << ": " << wrong_ << " of " << all_ << " values are wrong; first "
                    << first_ << "; largest error / tolerance " << worst_;
    } else if (all_ == 0) {
      ADD_FAILURE() << what_ << ": nothing was compared";
    }
  }
  Comparison(const Comparison&) = delete;
  Comparison& operator=(const Comparison&) = delete;

  /// `index` says where, for the report. Equal infinities and two NaN agree.
  void Near(double actual, double expected, double tolerance, int64_t index) {
    ++all_;
    const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
    const double error = std::abs(actual - expected);
    if (same || error <= tolerance) return;
    if (wrong_++ == 0) {
      char text[200];
      std::snprintf(text, sizeof(text), "at %lld: got %.9g, expected %.9g, tolerance %.3g",
                    static_cast<long long>(index), actual, expected, tolerance);
      first_ = text;
    }
    const double ratio = error / tolerance;
    if (!(ratio <= worst_)) worst_ = ratio;
  }

 private:
  const std::string what_;
  int64_t all_ = 0;
  int64_t wrong_ = 0;
  std::string first_;
  double worst_ = 0;
};

/// Expects equal bytes; names the first difference.
template <typename T>
void ExpectSameBytes(const std::vector<T>& actual, const std::vector<T>& expected,
                     const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
    ADD_FAILURE() << what << ": element " << i << " of " << actual.size() << " differs";
    return;
  }
}

/// Expects that elements begin .. end - 1 still hold poison.
template <typename T>
void ExpectPoison(const std::vector<T>& values, int64_t begin, int64_t end, const char* what) {
  for (int64_t i = begin; i < end; ++i) {
    if (IsPoison(values[i])) continue;
    ADD_FAILURE() << what << ": element " << i << " was written";
    return;
  }
}

/// How far apart neighbouring bf16 numbers are at most, relative to them: one step is what two ways
/// of computing the same number differ by when each rounds its own f32 sum. Rounding itself errs by
/// half a step.
inline constexpr double kBf16Step = 1.0 / 128;

}  // namespace nosara::kernels
