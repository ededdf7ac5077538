// What a slot cache of a given size would have to load for given selections.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "worker/cache/slot_table.h"

namespace nosara::worker {

/// The slots of one (sequence, layer, KV head) by the rule of kernels/resolve/resolve.h: a block
/// that a step selects and that has no slot is loaded into a free one or into that of the block
/// selected longest ago, never of one of the same step; the block that tokens are being written
/// to gets its slot without a load and keeps it.
///
/// One block is open at a time: a completed one counts as stored at once. (A real worker stores it
/// a few steps later; until then it is among the window blocks, which every step selects.)
///
/// Owned by one thread. Invariant: with the same calls, the blocks with a slot of a smaller
/// simulation have one in a larger one too, if each selection fits both; thus more slots never load
/// more.
class SlotSimulation final {
 public:
  /// `slots` >= the blocks of the largest selection, the open block counted, in it or not; blocks
  /// are numbered 0 .. max_blocks-1.
  SlotSimulation(int slots, int max_blocks);

  /// The coming step begins `block`: call before its Select.
  void Open(int block);

  /// One step, which selects `blocks`, all different. Returns how many of them it loads.
  int Select(absl::Span<const int32_t> blocks);

  bool Resident(int block) const { return table_.slot_of(block) != kNoSlot; }
  void CheckIntegrity() const { table_.CheckIntegrity(); }

 private:
  SlotTable table_;
  uint64_t steps_ = 0;  // done
  int open_ = -1;       // the open block
};

}  // namespace nosara::worker
