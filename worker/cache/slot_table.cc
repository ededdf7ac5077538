#include "worker/cache/slot_table.h"

#include "base/check.h"

namespace nosara::worker {

SlotTable::SlotTable(int slots, int max_blocks)
    : slot_of_(max_blocks, kNoSlot), last_used_(max_blocks, 0), block_of_(slots, -1) {
  CHECK(slots >= 1 && max_blocks >= 1);
}

SlotId SlotTable::Acquire(int block, uint64_t stamp) {
  CHECK(slot_of_[block] == kNoSlot);
  SlotId chosen = kNoSlot;
  // Linear in the slots: tens to a few hundred per table, and only on a miss.
  for (SlotId slot = 0; slot < slots(); ++slot) {
    const int holder = block_of_[slot];
    if (holder < 0) {
      chosen = slot;
      break;
    }
    if (last_used_[holder] >= stamp) continue;
    if (chosen == kNoSlot || last_used_[holder] < last_used_[block_of_[chosen]] ||
        (last_used_[holder] == last_used_[block_of_[chosen]] && holder < block_of_[chosen])) {
      chosen = slot;
    }
  }
  if (chosen == kNoSlot) return kNoSlot;
  if (block_of_[chosen] >= 0) {
    slot_of_[block_of_[chosen]] = kNoSlot;
  } else {
    ++occupied_;
  }
  block_of_[chosen] = block;
  slot_of_[block] = chosen;
  return chosen;
}

void SlotTable::Drop(int block) {
  const SlotId slot = slot_of_[block];
  if (slot == kNoSlot) return;
  slot_of_[block] = kNoSlot;
  block_of_[slot] = -1;
  --occupied_;
}

void SlotTable::CheckIntegrity() const {
  int occupied = 0;
  for (SlotId slot = 0; slot < slots(); ++slot) {
    if (block_of_[slot] < 0) continue;
    ++occupied;
    CHECK(slot_of_[block_of_[slot]] == slot);
  }
  CHECK(occupied == occupied_);
  int mapped = 0;
  for (SlotId slot : slot_of_) mapped += slot != kNoSlot ? 1 : 0;
  CHECK(mapped == occupied);
}

}  // namespace nosara::worker
