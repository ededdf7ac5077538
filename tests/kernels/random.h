// Random inputs from a seed that each run draws anew and that a failure shows.
#pragma once

#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace nosara::kernels {

/// The seed of this run: --gtest_random_seed where it is given, a new one otherwise.
inline uint32_t TestSeed() {
  static const uint32_t seed = GTEST_FLAG_GET(random_seed) != 0
                                   ? static_cast<uint32_t>(GTEST_FLAG_GET(random_seed))
                                   : 1 + std::random_device{}() % 99999;  // what the flag accepts
  return seed;
}

/// SplitMix64: as good as needed, and fast enough to fill caches of many megabytes.
class Random final {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u) {}

  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, end).
  int Below(int end) { return static_cast<int>(Next() % static_cast<uint64_t>(end)); }
  /// Uniform in [first, last].
  int Between(int first, int last) { return first + Below(last - first + 1); }
  bool Chance(double probability) { return Uniform() < probability; }
  /// Uniform in [0, 1).
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  /// Mean 0, variance 1, bell-shaped: the sum of four uniform numbers.
  float Normal() {
    const uint64_t bits = Next();
    const float sum = static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                         ((bits >> 32) & 0xffff) + (bits >> 48));
    return (sum * (1.0f / 65536) - 2) * 1.7320508f;
  }
  std::vector<float> Normals(size_t count, float scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * Normal();
    return values;
  }
  std::vector<__nv_bfloat16> NormalsBf16(size_t count, float scale = 1) {
    std::vector<__nv_bfloat16> values(count);
    for (__nv_bfloat16& value : values) value = __float2bfloat16_rn(scale * Normal());
    return values;
  }
  template <typename T>
  void Shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[Next() % i]);
  }
  /// `count` different numbers below `end`, in random order.
  std::vector<int32_t> Sample(int count, int end) {
    std::vector<int32_t> numbers(end);
    std::iota(numbers.begin(), numbers.end(), 0);
    Shuffle(numbers);
    numbers.resize(std::min(count, end));
    return numbers;
  }

 private:
  uint64_t state_;
};

}  // namespace nosara::kernels
