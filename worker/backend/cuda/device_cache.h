// The frames of device memory that hold the KV cache, and who owns which.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/common/cache_view.h"
#include "worker/backend/cuda/device_memory.h"

namespace nosara::worker {

struct DeviceCacheOptions {
  int layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  /// Frames in all; each holds one block of all layers and heads, or 2,048 tokens' index.
  int frames = 0;
  /// Sequences at a time.
  int max_sequences = 0;
  /// Blocks of the longest sequence.
  int max_blocks = 0;
};

/// Memory and tables of kernels::CacheView. Host side: which frames are free, and the frames of
/// each sequence; the tables of blocks belong to the kernels. Owned by the engine thread;
/// everything is ordered by the one stream that it was made with.
///
/// Invariant: every frame is free or belongs to exactly one sequence.
class DeviceCache final {
 public:
  static absl::StatusOr<std::unique_ptr<DeviceCache>> Create(const DeviceCacheOptions& options,
                                                             cudaStream_t stream);

  const DeviceCacheOptions& options() const { return options_; }
  const kernels::CacheView& view() const { return view_; }
  int free_frames() const { return static_cast<int>(free_.size()); }
  /// Of one sequence, records and index.
  int frames_of(int sequence) const { return static_cast<int>(owned_[sequence].frames.size()); }
  int index_frames_of(int sequence) const {
    return static_cast<int>(owned_[sequence].index_frames.size());
  }
  /// Index frames that `tokens` tokens need.
  static int IndexFramesFor(int64_t tokens);
  /// Bytes of one frame.
  static int64_t FrameBytes(int layers, int kv_heads, int head_dim);

  /// A row of the tables, empty, with so many frames; RESOURCE_EXHAUSTED when there are not enough
  /// frames or rows.
  absl::StatusOr<int> AddSequence(int frames, int index_frames);
  void RemoveSequence(int sequence);

  /// More frames for a sequence; RESOURCE_EXHAUSTED when there are not enough, and nothing is
  /// taken.
  absl::Status Grow(int sequence, int frames);
  /// Fewer: see kernels::ShrinkParams for what stays. At least as many as blocks not stored.
  absl::Status Shrink(int sequence, int frames);

  /// Notes where the records of a stored block lie (kernels::CacheView::pages), for the kernels
  /// that come after in stream order.
  absl::Status SetPages(int sequence, int first_block, absl::Span<const uint64_t> addresses);

  /// Waits for the stream, then aborts when an invariant of the tables is broken.
  void CheckIntegrity() const;

 private:
  struct Owned {
    bool used = false;
    std::vector<int32_t> frames;
    std::vector<int32_t> index_frames;
  };

  DeviceCache(const DeviceCacheOptions& options, cudaStream_t stream)
      : options_(options), stream_(stream), owned_(options.max_sequences) {}
  absl::Status Take(int count, std::vector<int32_t>& to);
  absl::Status Publish(int sequence);

  // Constant after construction.
  const DeviceCacheOptions options_;
  const cudaStream_t stream_;
  kernels::CacheView view_;

  DeviceArray<std::byte> slots_;
  DeviceArray<int32_t> frames_, num_frames_, index_frames_, slot_of_, block_of_;
  DeviceArray<uint32_t> stamp_;
  DeviceArray<uint64_t> pages_;

  std::vector<int32_t> free_;  // frames
  std::vector<Owned> owned_;   // by sequence
};

}  // namespace nosara::worker
