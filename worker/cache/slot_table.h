// Which blocks of one (sequence, layer, KV head) lie in which slots of the worker's memory.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace nosara::worker {

/// A slot of one table; -1: none.
using SlotId = int32_t;
inline constexpr SlotId kNoSlot = -1;

/// Maps blocks to slots, O(1) both ways, and picks least recently used victims.
///
/// Owned by the engine thread. Invariants: (1) slot_of(block_of(s)) == s for every occupied slot;
/// (2) a block has at most one slot; (3) stamps never decrease.
class SlotTable final {
 public:
  /// `slots` >= 1; blocks are numbered 0 .. max_blocks-1.
  SlotTable(int slots, int max_blocks);

  int slots() const { return static_cast<int>(block_of_.size()); }
  int occupied() const { return occupied_; }

  /// The block's slot, or kNoSlot.
  SlotId slot_of(int block) const { return slot_of_[block]; }
  int block_of(SlotId slot) const { return block_of_[slot]; }

  /// The last step that selected the block; 0: never.
  uint64_t last_used(int block) const { return last_used_[block]; }
  /// Notes that step `stamp` selected the block, resident or not.
  void Touch(int block, uint64_t stamp) { last_used_[block] = stamp; }

  /// Gives `block` a slot: a free one, or that of the block used longest ago among those last used
  /// before step `stamp` (smaller block first among equals). kNoSlot when all slots hold blocks of
  /// this step. Precondition: the block has no slot.
  SlotId Acquire(int block, uint64_t stamp);

  /// Takes the block's slot away, if it has one.
  void Drop(int block);

  /// Aborts when an invariant is broken.
  void CheckIntegrity() const;

 private:
  std::vector<SlotId> slot_of_;      // [max_blocks]
  std::vector<uint64_t> last_used_;  // [max_blocks]
  std::vector<int32_t> block_of_;    // [slots]; -1: free
  int occupied_ = 0;
};

}  // namespace nosara::worker
