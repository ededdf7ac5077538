// Between the cache in device memory and pages of the store's layout in mapped host memory.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// Offsets of kvstore/api/layout.h, in bytes from the start of a page.
struct PageOffsets {
  int64_t records = 0;  // of record 0; record r at + r * RecordBytes(D)
  int64_t index = 0;    // of index entry 0; entry r at + r * (4 * 2D + 16): 4 keys, then 4 scores
};

/// Block `block` of a sequence and its page, in memory that the device can reach.
struct PageOfBlock {
  int32_t sequence = 0;
  int32_t block = 0;
  std::byte* page = nullptr;
};

/// Writes the records and the index part of finished blocks to their pages: for each record r, its
/// slot, and the keys and scores of the windows 4n-1 .. 4n+2 that end in block n (for n = 0 the
/// first place stays as it is: zero). Precondition: the blocks have slots in all records.
struct ExportParams {
  const PageOfBlock* blocks = nullptr;  // device-readable, [num_blocks]
  CacheView cache;
  PageOffsets offsets;
  int num_blocks = 0;
};
cudaError_t LaunchExport(const ExportParams& params, cudaStream_t stream);

/// The other way, index parts only: keys and scores of the windows that end in the blocks.
/// Preconditions: the index frames exist; consecutive blocks may come in one launch.
cudaError_t LaunchImportIndex(const ExportParams& params, cudaStream_t stream);

/// Shrinks each record's slots of one sequence to the first `keep` frames: of the blocks in slots
/// >= keep, the most recently selected take the places of the least recently selected stored ones
/// below (free places first); the others are forgotten. Blocks that are not stored always stay.
/// Precondition: at most `keep` blocks are not stored. Then the caller may take the frames away.
struct ShrinkParams {
  int sequence = 0;
  int keep = 0;
  CacheView cache;
};
cudaError_t LaunchShrink(const ShrinkParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
