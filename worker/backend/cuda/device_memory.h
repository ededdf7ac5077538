// Owned device and pinned host memory, and CUDA errors as Status.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace nosara::worker {

/// OK, or what went wrong while doing `what`: RESOURCE_EXHAUSTED for memory, else INTERNAL. After
/// an error of a kernel the device context is lost: the process must end.
inline absl::Status CudaStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message =
      absl::StrCat(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  return absl::InternalError(message);
}

/// Copies host memory to the device; every stream sees it when this returns. cudaMemcpy alone may
/// return while its last bytes, staged through pinned memory, are still on their way, and the
/// streams here do not wait for the default stream.
inline absl::Status CopyToDevice(void* to, const void* from, size_t bytes, absl::string_view what) {
  const absl::Status status = CudaStatus(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), what);
  if (!status.ok()) return status;
  return CudaStatus(cudaStreamSynchronize(nullptr), what);
}

/// An array in device memory. Movable; not thread-safe.
template <typename T>
class DeviceArray final {
 public:
  DeviceArray() = default;
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  /// Of `size` elements, all bytes zero. RESOURCE_EXHAUSTED says how much of `what` was asked for.
  static absl::StatusOr<DeviceArray> Create(size_t size, absl::string_view what) {
    DeviceArray array;
    const size_t bytes = std::max<size_t>(size, 1) * sizeof(T);
    const std::string message = absl::StrCat("device memory for ", what, ", ", bytes, " bytes");
    absl::Status status = CudaStatus(cudaMalloc(&array.data_, bytes), message);
    if (status.ok()) status = CudaStatus(cudaMemset(array.data_, 0, bytes), message);
    // The streams that use it do not wait for the default stream.
    if (status.ok()) status = CudaStatus(cudaStreamSynchronize(nullptr), message);
    if (!status.ok()) return status;
    array.size_ = size;
    return array;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

/// An array in page-locked host memory that the device can reach at the same address.
template <typename T>
class PinnedArray final {
 public:
  PinnedArray() = default;
  ~PinnedArray() { cudaFreeHost(data_); }
  PinnedArray(PinnedArray&& other) noexcept { *this = std::move(other); }
  PinnedArray& operator=(PinnedArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  /// Of `size` elements, all bytes zero.
  static absl::StatusOr<PinnedArray> Create(size_t size, absl::string_view what) {
    PinnedArray array;
    const size_t bytes = std::max<size_t>(size, 1) * sizeof(T);
    const absl::Status status =
        CudaStatus(cudaHostAlloc(&array.data_, bytes, cudaHostAllocMapped),
                   absl::StrCat("pinned memory for ", what, ", ", bytes, " bytes"));
    if (!status.ok()) return status;
    std::memset(static_cast<void*>(array.data_), 0, bytes);
    array.size_ = size;
    return array;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }
  absl::Span<T> span() const { return absl::MakeSpan(data_, size_); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace nosara::worker
