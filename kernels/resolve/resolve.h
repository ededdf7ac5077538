// Which selected blocks are resident, which slots the others get, and what must be loaded.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/cache_view.h"

namespace nosara::kernels {

/// A record to bring into a slot.
struct Load {
  int32_t sequence = 0;
  int32_t record = 0;
  int32_t block = 0;
  int32_t slot = 0;  // local slot
};

/// For each (row, KV head) of `layer`: the selected blocks, resident ones first (in their order),
/// then the missing ones, as slot numbers (frame * R + record) with their block. A missing block
/// takes the slot of the least recently selected block that is stored and was not selected in this
/// step (free slots first; smaller block first among equals), and is noted in `loads`, whose order
/// is free. All selected blocks get the stamp of the step.
///
/// Preconditions: one row a sequence; the sequence has at least (selected blocks) + (blocks not
/// stored) slots. A block that finds no slot is counted in `failures` and left out.
/// Cost: O(selected) lookups; a scan of the sequence's slots for each missing block.
struct ResolveParams {
  const StepRow* rows_info = nullptr;
  const int32_t* selected = nullptr;  // [rows, Hkv, max_selected]
  const int32_t* count = nullptr;     // [rows, Hkv]
  CacheView cache;
  const uint32_t* step = nullptr;  // device: the stamp, greater than all before; 1 or more
  int32_t* slots = nullptr;        // [rows, Hkv, max_selected]: slot numbers
  int32_t* blocks = nullptr;       // [rows, Hkv, max_selected]: their blocks
  int2* ranges = nullptr;          // [rows, Hkv]: (resident, resident + loaded)
  Load* loads = nullptr;           // [rows * Hkv * max_selected]
  int32_t* num_loads = nullptr;    // added to; the caller clears it before each layer
  /// Null: all missing blocks are noted in `loads`. Otherwise only those that are kStoredElsewhere,
  /// and sources [rows, Hkv, max_selected] gets for each missing entry its index there, -1 for one
  /// that the device can read from its page.
  int32_t* sources = nullptr;
  int32_t* failures = nullptr;  // added to
  int2* totals = nullptr;       // [rows]: (selected, loaded) of all heads added; may be null
  int rows = 0;
  int num_kv_heads = 0;
  int layer = 0;
  int max_selected = 0;
  int max_blocks = 0;  // LaunchResolveChunks: blocks of the longest row
};

/// Capturable.
cudaError_t LaunchResolve(const ResolveParams& params, cudaStream_t stream);

/// Tells the host what to bring: copies the loads to host memory and rings its bell, in this order.
/// All but num_loads and loads in mapped host memory.
struct PublishLoadsParams {
  const Load* loads = nullptr;
  const int32_t* num_loads = nullptr;
  Load* host_loads = nullptr;
  uint32_t* bell = nullptr;  // gets the number of loads + 1; the host has set it to 0
};
/// Capturable.
cudaError_t LaunchPublishLoads(const PublishLoadsParams& params, cudaStream_t stream);

/// For chunks: the rows of a sequence come together, and what any of them selected is loaded, where
/// it is not resident, as in LaunchResolve. `slots`, `blocks` and `ranges` are not used; `totals`
/// is that of the sequence's first row. What the last row selected gets the stamp of the step, the
/// others that of the step before, which must be greater than all earlier ones too.
cudaError_t LaunchResolveChunks(const ResolveParams& params, cudaStream_t stream);

/// Gives each row that begins a block (t % 64 == 0) a slot for it in every record, as a missing
/// block gets one in LaunchResolve, without a load, unless it has one. Rows of one sequence may
/// come together, at consecutive positions (a chunk that spans several blocks); then there must be
/// as many free slots.
struct OpenBlocksParams {
  const StepRow* rows_info = nullptr;
  CacheView cache;
  const uint32_t* step = nullptr;
  int32_t* failures = nullptr;
  int rows = 0;
};
cudaError_t LaunchOpenBlocks(const OpenBlocksParams& params, cudaStream_t stream);

}  // namespace nosara::kernels
