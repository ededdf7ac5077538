#include "worker/backend/cuda/device_cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/pages/pages.h"

namespace nosara::worker {

int DeviceCache::IndexFramesFor(int64_t tokens) {
  const int windows = tokens > 0 ? kernels::VisibleWindows(static_cast<int>(tokens) - 1) : 0;
  return (windows + kernels::kIndexWindows - 1) / kernels::kIndexWindows;
}

int64_t DeviceCache::FrameBytes(int layers, int kv_heads, int head_dim) {
  return int64_t{layers} * kv_heads * kernels::SlotBytes(head_dim);
}

absl::StatusOr<std::unique_ptr<DeviceCache>> DeviceCache::Create(const DeviceCacheOptions& options,
                                                                 cudaStream_t stream) {
  CHECK(options.layers > 0 && options.kv_heads > 0 && options.frames > 0);
  CHECK(options.max_sequences > 0 && options.max_blocks > 0);
  std::unique_ptr<DeviceCache> cache(new DeviceCache(options, stream));
  const size_t records = static_cast<size_t>(options.layers) * options.kv_heads;
  const size_t sequences = options.max_sequences;
  const size_t blocks = options.max_blocks;
  const size_t index_frames =
      std::max(1, IndexFramesFor(int64_t{options.max_blocks} * kernels::kBlockTokens));
  const int64_t frame_bytes = FrameBytes(options.layers, options.kv_heads, options.head_dim);
  ASSIGN_OR_RETURN(cache->slots_,
                   DeviceArray<std::byte>::Create(frame_bytes * options.frames, "the KV cache"));
  ASSIGN_OR_RETURN(cache->frames_, DeviceArray<int32_t>::Create(sequences * blocks, "tables"));
  ASSIGN_OR_RETURN(cache->num_frames_, DeviceArray<int32_t>::Create(sequences, "tables"));
  ASSIGN_OR_RETURN(cache->index_frames_,
                   DeviceArray<int32_t>::Create(sequences * index_frames, "tables"));
  ASSIGN_OR_RETURN(cache->slot_of_,
                   DeviceArray<int32_t>::Create(sequences * records * blocks, "tables"));
  ASSIGN_OR_RETURN(cache->block_of_,
                   DeviceArray<int32_t>::Create(sequences * records * blocks, "tables"));
  ASSIGN_OR_RETURN(cache->stamp_,
                   DeviceArray<uint32_t>::Create(sequences * records * blocks, "tables"));
  ASSIGN_OR_RETURN(cache->pages_, DeviceArray<uint64_t>::Create(sequences * blocks, "tables"));
  cache->view_.slots = cache->slots_.data();
  cache->view_.records = static_cast<int>(records);
  cache->view_.head_dim = options.head_dim;
  cache->view_.max_frames = options.max_blocks;
  cache->view_.max_index_frames = static_cast<int>(index_frames);
  cache->view_.max_blocks = options.max_blocks;
  cache->view_.frames = cache->frames_.data();
  cache->view_.num_frames = cache->num_frames_.data();
  cache->view_.index_frames = cache->index_frames_.data();
  cache->view_.slot_of = cache->slot_of_.data();
  cache->view_.block_of = cache->block_of_.data();
  cache->view_.stamp = cache->stamp_.data();
  cache->view_.pages = cache->pages_.data();
  for (int frame = options.frames - 1; frame >= 0; --frame) cache->free_.push_back(frame);
  return cache;
}

absl::Status DeviceCache::Take(int count, std::vector<int32_t>& to) {
  if (count > free_frames()) {
    return absl::ResourceExhaustedError(absl::StrCat("KV cache on the device: ", count,
                                                     " frames needed, ", free_frames(), " of ",
                                                     options_.frames, " free"));
  }
  to.insert(to.end(), free_.end() - count, free_.end());
  free_.resize(free_.size() - count);
  return absl::OkStatus();
}

absl::Status DeviceCache::Publish(int sequence) {
  // Small copies from pageable memory: the driver has taken the bytes when the call returns.
  const Owned& owned = owned_[sequence];
  const int32_t count = static_cast<int32_t>(owned.frames.size());
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(view_.frames + int64_t{sequence} * view_.max_frames, owned.frames.data(),
                      owned.frames.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream_),
      "frame table"));
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(view_.index_frames + int64_t{sequence} * view_.max_index_frames,
                      owned.index_frames.data(), owned.index_frames.size() * sizeof(int32_t),
                      cudaMemcpyHostToDevice, stream_),
      "frame table"));
  return CudaStatus(cudaMemcpyAsync(view_.num_frames + sequence, &count, sizeof(count),
                                    cudaMemcpyHostToDevice, stream_),
                    "frame table");
}

absl::StatusOr<int> DeviceCache::AddSequence(int frames, int index_frames) {
  const auto free_row =
      std::find_if(owned_.begin(), owned_.end(), [](const Owned& owned) { return !owned.used; });
  if (free_row == owned_.end()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", owned_.size(), " sequences are in use"));
  }
  CHECK(frames <= view_.max_frames && index_frames <= view_.max_index_frames);
  const int sequence = static_cast<int>(free_row - owned_.begin());
  if (frames + index_frames > free_frames()) {
    std::vector<int32_t> none;
    return Take(frames + index_frames, none);
  }
  RETURN_IF_ERROR(Take(frames, free_row->frames));
  RETURN_IF_ERROR(Take(index_frames, free_row->index_frames));
  free_row->used = true;
  const size_t records = view_.records;
  const size_t blocks = view_.max_blocks;
  const auto fill = [&](auto* table, size_t row, int value) {
    return CudaStatus(cudaMemsetAsync(table + sequence * row, value, row * sizeof(*table), stream_),
                      "clearing tables");
  };
  RETURN_IF_ERROR(fill(view_.slot_of, records * blocks, 0xff));
  RETURN_IF_ERROR(fill(view_.block_of, records * blocks, 0xff));
  RETURN_IF_ERROR(fill(view_.stamp, records * blocks, 0));
  RETURN_IF_ERROR(fill(view_.pages, blocks, 0));
  RETURN_IF_ERROR(Publish(sequence));
  return sequence;
}

void DeviceCache::RemoveSequence(int sequence) {
  Owned& owned = owned_[sequence];
  CHECK(owned.used);
  free_.insert(free_.end(), owned.frames.begin(), owned.frames.end());
  free_.insert(free_.end(), owned.index_frames.begin(), owned.index_frames.end());
  owned = Owned();
}

absl::Status DeviceCache::Grow(int sequence, int frames) {
  Owned& owned = owned_[sequence];
  const int more = frames - static_cast<int>(owned.frames.size());
  CHECK(owned.used && more >= 0 && frames <= view_.max_frames);
  RETURN_IF_ERROR(Take(more, owned.frames));
  return Publish(sequence);
}

absl::Status DeviceCache::Shrink(int sequence, int frames) {
  Owned& owned = owned_[sequence];
  CHECK(owned.used && frames >= 1);
  if (frames >= static_cast<int>(owned.frames.size())) return absl::OkStatus();
  RETURN_IF_ERROR(
      CudaStatus(kernels::LaunchShrink({sequence, frames, view_}, stream_), "shrinking a cache"));
  free_.insert(free_.end(), owned.frames.begin() + frames, owned.frames.end());
  owned.frames.resize(frames);
  return Publish(sequence);
}

absl::Status DeviceCache::SetPages(int sequence, int first_block,
                                   absl::Span<const uint64_t> addresses) {
  return CudaStatus(
      cudaMemcpyAsync(view_.pages + int64_t{sequence} * view_.max_blocks + first_block,
                      addresses.data(), addresses.size() * sizeof(uint64_t), cudaMemcpyHostToDevice,
                      stream_),
      "page table");
}

void DeviceCache::CheckIntegrity() const {
  std::vector<uint8_t> seen(options_.frames);
  for (int32_t frame : free_) CHECK(seen[frame]++ == 0);
  CHECK(cudaStreamSynchronize(stream_) == cudaSuccess);
  const size_t blocks = view_.max_blocks;
  std::vector<int32_t> slot_of(view_.records * blocks), block_of(view_.records * blocks);
  std::vector<uint64_t> pages(blocks);
  for (size_t s = 0; s < owned_.size(); ++s) {
    const Owned& owned = owned_[s];
    for (int32_t frame : owned.frames) CHECK(seen[frame]++ == 0);
    for (int32_t frame : owned.index_frames) CHECK(seen[frame]++ == 0);
    if (!owned.used) continue;
    const auto read = [&](auto& to, const auto* table) {
      CHECK(cudaMemcpy(to.data(), table + s * to.size(), to.size() * sizeof(to[0]),
                       cudaMemcpyDeviceToHost) == cudaSuccess);
    };
    read(slot_of, view_.slot_of);
    read(block_of, view_.block_of);
    read(pages, view_.pages);
    const int slots = static_cast<int>(owned.frames.size());
    for (int r = 0; r < view_.records; ++r) {
      int held = 0;
      for (int i = 0; i < static_cast<int>(blocks); ++i) {
        const int block = block_of[r * blocks + i];
        if (block < 0) continue;
        CHECK(i < slots);
        CHECK(slot_of[r * blocks + block] == i);
        ++held;
      }
      for (size_t b = 0; b < blocks; ++b) {
        const int slot = slot_of[r * blocks + b];
        CHECK(slot < slots);
        if (slot >= 0) --held;
      }
      CHECK(held == 0);
    }
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](uint8_t count) { return count == 1; }));
}

}  // namespace nosara::worker
