// What the benchmarks of the kernels share: the shape, memory, timing and the report.
//
// nosara-bench-kernels (bench_main.cc) calls one function for each operation. It makes inputs,
// checks the result of the first launch against the reference on a part of it, and times launches
// over inputs that are together larger than the cache between the SMs and the memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/common/cache_view.h"

namespace nosara::kernels::bench {

/// The 8B model, one layer of it.
inline constexpr int kNumHeads = 32;   // Hq
inline constexpr int kNumKvHeads = 2;  // Hkv
inline constexpr int kGroup = kNumHeads / kNumKvHeads;
inline constexpr int kHeadDim = 128;  // D
inline constexpr int kHidden = 4096;
inline constexpr int kFeedForward = 16384;
inline constexpr int kVocabulary = 73448;
inline constexpr int kTopK = 64;
inline constexpr int kSlots = 129;  // of a sequence, per record
inline constexpr double kHitRate = 0.989;

struct Options {
  int batch = 64;
  int context = 16384;    // tokens of each sequence, a multiple of 64
  int memory_mib = 2048;  // of the copies that measure the limits, and of the pages to gather from
  std::string kernel;     // only this one; empty: all
  std::string json;
  std::string commit;
};

/// What a kernel's rate is compared with.
enum class Limit { kNone, kDeviceCopy, kHostToDevice };

struct Figure {
  std::string kernel;
  std::string shape;
  double us = 0;
  double bytes = 0;  // by the formula of the kernel's header; 0: none
  double flops = 0;
  Limit limit = Limit::kDeviceCopy;
};

/// A launch with all its parameters.
using Launch = std::function<cudaError_t(cudaStream_t)>;

/// Ends the program when a CUDA call failed: nothing measured afterwards would mean anything.
inline void CheckCuda(cudaError_t error, const char* file, int line, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, cudaGetErrorString(error));
  std::exit(1);
}
#define BENCH_CUDA(call) ::nosara::kernels::bench::CheckCuda((call), __FILE__, __LINE__, #call)

/// SplitMix64. Every run has the same inputs: a benchmark is there to be repeated.
class Random final {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int Below(int end) { return static_cast<int>(Next() % static_cast<uint64_t>(end)); }
  bool Chance(double probability) {
    return static_cast<double>(Next() >> 11) * 0x1p-53 < probability;
  }
  /// Mean 0, variance 1.
  float Normal() {
    const uint64_t bits = Next();
    const float sum = static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                         ((bits >> 32) & 0xffff) + (bits >> 48));
    return (sum * (1.0f / 65536) - 2) * 1.7320508f;
  }
  std::vector<float> Normals(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = Normal();
    return values;
  }
  std::vector<__nv_bfloat16> NormalsBf16(size_t count) {
    std::vector<__nv_bfloat16> values(count);
    for (__nv_bfloat16& value : values) value = __float2bfloat16_rn(Normal());
    return values;
  }
  template <typename T>
  void Shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[Next() % i]);
  }

 private:
  uint64_t state_;
};

/// Memory, clock and results of a run. Used by one thread.
class Bench final {
 public:
  explicit Bench(const Options& options) : options(options) {}
  ~Bench() { Release(); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  const Options options;
  Random random{20260722};

  /// Device memory; freed by Release.
  template <typename T>
  T* Allocate(size_t count) {
    void* memory = nullptr;
    BENCH_CUDA(cudaMalloc(&memory, count * sizeof(T)));
    device_memory_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <typename T>
  T* Upload(const std::vector<T>& values) {
    T* memory = Allocate<T>(values.size());
    BENCH_CUDA(
        cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    // Its last bytes may still be on their way, and the benchmarks' stream does not wait for them.
    BENCH_CUDA(cudaStreamSynchronize(nullptr));
    return memory;
  }
  template <typename T>
  static std::vector<T> Download(const T* device, size_t count) {
    std::vector<T> values(count);
    BENCH_CUDA(cudaMemcpy(values.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  /// Pinned host memory that the device reads at the same address; freed by Release.
  std::byte* AllocatePinned(size_t bytes);
  void Release();

  /// Runs the launch once and waits.
  void Run(const Launch& launch);
  /// Microseconds of one launch: the median of replays of a graph of all launches, one after the
  /// other, over their number. Replays that are not timed come first, until the clocks are up.
  /// `reset`, where there is one, runs before each replay, untimed; without it the launches come
  /// several times in the graph when they are few.
  double MedianUs(const std::vector<Launch>& launches, const Launch& reset = nullptr);

  /// Copies of inputs of `bytes` each that together outgrow the L2 cache.
  static int Rotations(double bytes);

  void Report(const Figure& figure) { figures.push_back(figure); }

  std::vector<Figure> figures;

 private:
  std::vector<void*> device_memory_;
  std::vector<void*> pinned_memory_;
};

/// A cache of `options.batch` sequences (or `sequences`) with random contents, frames in random
/// order, on the device and, where `host_slots`, on the host.
struct BenchCache {
  CacheView host;
  CacheView device;
  std::vector<std::byte> slots;
  std::vector<int32_t> frames, num_frames, index_frames, slot_of, block_of;
  std::vector<uint32_t> stamp;
  std::vector<uint64_t> pages;
};
struct BenchCacheOptions {
  int sequences = 0;
  int layers = 1;
  int slots = 1;         // of a sequence, per record
  int index_frames = 0;  // of a sequence
  int max_blocks = 0;
  /// Blocks with a slot, in the order of the slots, for each record; at most `slots`.
  std::function<std::vector<int32_t>(int sequence, int record)> resident;
  bool host_slots = true;    // whether slots exist on the host, with random contents
  bool device_slots = true;  // whether they exist on the device
};
std::unique_ptr<BenchCache> MakeCache(Bench& bench, const BenchCacheOptions& options);
/// Of `options.batch` sequences: two layers, slots for the selected blocks and the last one's
/// neighbours; and the selection itself, [sequence, record]: forced blocks and random ones.
struct DecodeCache {
  std::unique_ptr<BenchCache> cache;
  std::vector<std::vector<int32_t>> selected;  // [sequences * records], ascending, 64 each
};
DecodeCache MakeDecodeCache(Bench& bench);

/// A selection at block `own`: the first block, the last 17, and random others, 64 in all.
std::vector<int32_t> RandomSelection(Random& random, int own);

/// "" where all values agree; otherwise which one does not.
template <typename T, typename U>
std::string Compare(const char* what, const std::vector<T>& actual, const std::vector<U>& expected,
                    double relative, double absolute) {
  if (actual.size() != expected.size()) return std::string(what) + ": sizes differ";
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = static_cast<double>(static_cast<float>(actual[i]));
    const double e = static_cast<double>(static_cast<float>(expected[i]));
    if (std::abs(a - e) <= relative * std::abs(e) + absolute) continue;
    char text[200];
    std::snprintf(text, sizeof(text), "%s[%zu] is %.9g, should be %.9g", what, i, a, e);
    return text;
  }
  return "";
}
/// A step of bf16: what sums in another order may make.
inline constexpr double kBf16Step = 1.0 / 128;

// One function an operation: reports its figures, or returns what is wrong with its results.
std::string BenchAppend(Bench& bench);
std::string BenchAttend(Bench& bench);
std::string BenchEmbed(Bench& bench);
std::string BenchGather(Bench& bench);
std::string BenchPrefill(Bench& bench);
std::string BenchResolve(Bench& bench);
std::string BenchRmsNorm(Bench& bench);
std::string BenchSample(Bench& bench);
std::string BenchScore(Bench& bench);
std::string BenchScoreSelect(Bench& bench);
std::string BenchSelect(Bench& bench);
std::string BenchSwiGlu(Bench& bench);
std::string BenchWindows(Bench& bench);

}  // namespace nosara::kernels::bench
