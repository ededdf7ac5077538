#include "worker/cache/slot_simulation.h"

#include "base/check.h"

namespace nosara::worker {

SlotSimulation::SlotSimulation(int slots, int max_blocks) : table_(slots, max_blocks) {}

void SlotSimulation::Open(int block) {
  open_ = block;
  if (!Resident(block)) CHECK(table_.Acquire(block, steps_ + 1) != kNoSlot);
}

int SlotSimulation::Select(absl::Span<const int32_t> blocks) {
  ++steps_;
  // All that the step needs is marked before anything gives way.
  if (open_ >= 0) table_.Touch(open_, steps_);
  for (const int32_t block : blocks) table_.Touch(block, steps_);
  int loaded = 0;
  for (const int32_t block : blocks) {
    if (Resident(block)) continue;
    CHECK(table_.Acquire(block, steps_) != kNoSlot);
    ++loaded;
  }
  return loaded;
}

}  // namespace nosara::worker
