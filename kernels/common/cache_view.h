// The KV cache in device memory, as kernels see it.
//
// Device memory is cut into frames. A frame has one slot for each record (layer, KV head); a slot
// holds either the record of one block (K [64, D] and V [64, D] in bf16, then 64 f32 biases c: the
// record of kvstore/api/layout.h) or 128 compressed keys with their scores (an "index frame").
// Each sequence owns a list of frames; for each record, a table says which block lies in which of
// them. So every (sequence, record) has the same number of slots, a page of the store fills exactly
// one frame, and any frame serves any sequence: no fragmentation, whatever comes and goes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace nosara::kernels {

inline constexpr int kBlockTokens = 64;    // P: tokens of a block
inline constexpr int kWindowTokens = 32;   // keys averaged into one compressed key
inline constexpr int kWindowStride = 16;   // tokens from one window to the next
inline constexpr int kIndexWindows = 128;  // windows in one slot of an index frame
inline constexpr int kIndexBlocks = 32;    // blocks whose windows begin in one index frame
inline constexpr int kMaxGroup = 64;       // G, query heads of a KV head, at most
inline constexpr int kMaxSelected = 128;   // topk_blocks at most

/// A new token of a step: `sequence` is its row in the tables of CacheView, -1 for a row that pads
/// the batch (kernels leave its outputs as they are); `position` its place in the sequence.
struct StepRow {
  int32_t sequence = -1;
  int32_t position = 0;
};

/// Consecutive rows of one sequence at consecutive positions.
struct RowTile {
  int32_t first_row = 0;
  int32_t rows = 0;
};

/// Bytes of a record: K, V, c.
__host__ __device__ constexpr int64_t RecordBytes(int head_dim) {
  return int64_t{256} * head_dim + 256;
}
/// Bytes of a slot: the larger of a record and of 128 keys with their scores.
__host__ __device__ constexpr int64_t SlotBytes(int head_dim) {
  return int64_t{256} * head_dim + 512;
}

/// Windows visible at position t (nosa.md section 4): those with 16w + 31 <= t.
__host__ __device__ inline int VisibleWindows(int t) {
  return t < kWindowTokens - 1 ? 0 : (t - (kWindowTokens - 1)) / kWindowStride + 1;
}

/// CacheView::pages of a stored block that the device cannot read.
inline constexpr uint64_t kStoredElsewhere = 1;

/// Pointers to the frames and to the tables of all sequences. A plain value; copied into kernels.
///
/// Invariants, for a sequence s and record r: (1) slot_of[s,r,block_of[s,r,i]] == i where
/// block_of[s,r,i] >= 0; (2) a block that is not stored yet (pages[s,b] == 0) has a slot; (3) 0 <=
/// slot_of < num_frames[s] or slot_of == -1.
struct CacheView {
  std::byte* slots = nullptr;  // [frames * records * SlotBytes(D)], 128-byte aligned
  int records = 0;             // R = L * Hkv; record = layer * Hkv + head
  int head_dim = 0;            // D
  int max_frames = 0;          // row lengths of the tables
  int max_index_frames = 0;
  int max_blocks = 0;
  int32_t* frames = nullptr;      // [sequences, max_frames]: frame of local slot i
  int32_t* num_frames = nullptr;  // [sequences]
  int32_t* index_frames =
      nullptr;                  // [sequences, max_index_frames]: of windows 128 i .. 128 i + 127
  int32_t* slot_of = nullptr;   // [sequences, R, max_blocks]: local slot of a block, or -1
  int32_t* block_of = nullptr;  // [sequences, R, max_frames]: block of a local slot, or -1
  uint32_t* stamp = nullptr;    // [sequences, R, max_frames]: step that last selected the block
  /// [sequences, max_blocks]: where the records of a stored block begin in memory that the device
  /// can read (record r at + r * RecordBytes(D)); 0: not stored; kStoredElsewhere.
  uint64_t* pages = nullptr;

  __host__ __device__ int64_t TableRow(int sequence, int record) const {
    return int64_t{sequence} * records + record;
  }
  /// Address of slot number `slot` = frame * R + record.
  __host__ __device__ std::byte* Slot(int64_t slot) const {
    return slots + slot * SlotBytes(head_dim);
  }
  /// Slot number of local slot `i`.
  __host__ __device__ int64_t SlotNumber(int sequence, int record, int i) const {
    return int64_t{frames[int64_t{sequence} * max_frames + i]} * records + record;
  }
  /// Slot number of a block, or -1.
  __host__ __device__ int64_t SlotOf(int sequence, int record, int block) const {
    const int i = slot_of[TableRow(sequence, record) * max_blocks + block];
    return i < 0 ? -1 : SlotNumber(sequence, record, i);
  }
  /// The slot that holds window w: its key lies at + (w % 128) * 2D, its score e as f32 at
  /// + 128 * 2D + (w % 128) * 4.
  __host__ __device__ std::byte* IndexSlot(int sequence, int record, int window) const {
    const int frame = index_frames[int64_t{sequence} * max_index_frames + window / kIndexWindows];
    return Slot(int64_t{frame} * records + record);
  }
};

}  // namespace nosara::kernels
