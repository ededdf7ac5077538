// Device memory and mapped host memory of a test, and launches that are checked.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/kernels/random.h"

namespace nosara::kernels {

/// After a failed CUDA call nothing that follows means anything: the program ends, and says in
/// which test.
inline void CheckCuda(cudaError_t error, const char* file, int line, const char* call) {
  if (error == cudaSuccess) return;
  const ::testing::TestInfo* test = ::testing::UnitTest::GetInstance()->current_test_info();
  std::fprintf(stderr, "%s:%d: %s: %s (%s), in test %s.%s with --gtest_random_seed=%u\n", file,
               line, call, cudaGetErrorName(error), cudaGetErrorString(error),
               test != nullptr ? test->test_suite_name() : "?",
               test != nullptr ? test->name() : "?", TestSeed());
  std::fflush(stderr);
  std::abort();
}
#define CHECK_CUDA(call) ::nosara::kernels::CheckCuda((call), __FILE__, __LINE__, #call)

/// `count` values whose bytes are all 0xff: NaN as a float, -1 as an integer.
template <typename T>
std::vector<T> Poison(size_t count) {
  std::vector<T> values(count);
  if (count > 0) std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
  return values;
}

template <typename T>
bool IsPoison(const T& value) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) {
    if (bytes[i] != 0xff) return false;
  }
  return true;
}

/// An array in device memory between two guards, which Download checks.
template <typename T>
class DeviceArray final {
 public:
  explicit DeviceArray(const std::vector<T>& values) : count_(values.size()) {
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes() + 2 * kGuardBytes));
    CHECK_CUDA(cudaMemset(memory_, kGuard, bytes() + 2 * kGuardBytes));
    Upload(values);
  }
  ~DeviceArray() { cudaFree(memory_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return reinterpret_cast<T*>(memory_ + kGuardBytes); }

  void Upload(const std::vector<T>& values) {
    ASSERT_EQ(values.size(), count_);
    if (count_ == 0) return;
    CHECK_CUDA(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice));
    // Its last bytes may still be on their way, and the tests' streams do not wait for them.
    CHECK_CUDA(cudaStreamSynchronize(nullptr));
  }
  std::vector<T> Download() const {
    std::vector<T> values(count_);
    if (count_ > 0) CHECK_CUDA(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    std::vector<unsigned char> guards(2 * kGuardBytes);
    CHECK_CUDA(cudaMemcpy(guards.data(), memory_, kGuardBytes, cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemcpy(guards.data() + kGuardBytes, memory_ + kGuardBytes + bytes(), kGuardBytes,
                          cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < guards.size(); ++i) {
      if (guards[i] == kGuard) continue;
      const long long offset = i < kGuardBytes ? static_cast<long long>(i) - kGuardBytes
                                               : static_cast<long long>(bytes() + i - kGuardBytes);
      ADD_FAILURE() << "a kernel wrote outside of an array of " << bytes() << " bytes, at byte "
                    << offset;
      break;
    }
    return values;
  }

 private:
  static constexpr int kGuard = 0x5a;
  static constexpr size_t kGuardBytes = 1024;

  size_t bytes() const { return count_ * sizeof(T); }

  const size_t count_;
  std::byte* memory_ = nullptr;
};

/// Host memory that the device reads and writes.
class MappedMemory final {
 public:
  explicit MappedMemory(size_t bytes) : bytes_(bytes) {
    CHECK_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&host_), bytes + 1,
                             cudaHostAllocMapped | cudaHostAllocPortable));
    CHECK_CUDA(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_), host_, 0));
  }
  ~MappedMemory() { cudaFreeHost(host_); }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  size_t bytes() const { return bytes_; }
  std::byte* host() const { return host_; }
  std::byte* device() const { return device_; }

 private:
  const size_t bytes_;
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
};

enum class LaunchMode {
  kDirect,
  kGraph,  // captured into a graph that then runs once
};

/// A captured launch that can run again and again.
class CapturedLaunch final {
 public:
  template <typename Params>
  CapturedLaunch(cudaError_t (*launch)(const Params&, cudaStream_t), const Params& params) {
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    const cudaError_t error = launch(params, stream_);
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error) << " during a capture";
    CHECK_CUDA(cudaStreamEndCapture(stream_, &graph_));
    CHECK_CUDA(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  ~CapturedLaunch() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  CapturedLaunch(const CapturedLaunch&) = delete;
  CapturedLaunch& operator=(const CapturedLaunch&) = delete;

  /// Runs it and waits for it.
  void Replay() const {
    CHECK_CUDA(cudaGraphLaunch(executable_, stream_));
    CHECK_CUDA(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

/// Launches a kernel and waits for it. A refused launch is a failure of the test.
template <typename Params>
void Launch(cudaError_t (*launch)(const Params&, cudaStream_t), const Params& params,
            LaunchMode mode = LaunchMode::kDirect) {
  if (mode == LaunchMode::kGraph) return CapturedLaunch(launch, params).Replay();
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const cudaError_t error = launch(params, stream);
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
  CHECK_CUDA(cudaStreamSynchronize(stream));
  CHECK_CUDA(cudaStreamDestroy(stream));
}

}  // namespace nosara::kernels
