#include "kernels/resolve/resolve_reference.h"

#include <set>
#include <tuple>

namespace nosara::kernels {
namespace {

bool IsStored(const CacheView& cache, int sequence, int block) {
  return cache.pages[int64_t{sequence} * cache.max_blocks + block] != 0;
}

/// Gives `block`, which has none, a local slot: the first free one, else that of the stored block
/// that was selected longest ago, before step `step`. -1 when there is no such slot.
int Acquire(const CacheView& cache, int sequence, int record, int block, uint32_t step) {
  const int64_t row = cache.TableRow(sequence, record);
  int32_t* slot_of = cache.slot_of + row * cache.max_blocks;
  int32_t* block_of = cache.block_of + row * cache.max_frames;
  uint32_t* stamp = cache.stamp + row * cache.max_frames;
  int best = -1;
  // Free slots first, then by stamp, then by block.
  std::tuple<bool, uint32_t, int32_t> best_rank;
  for (int i = 0; i < cache.num_frames[sequence]; ++i) {
    const bool taken = block_of[i] >= 0;
    if (taken && (stamp[i] >= step || !IsStored(cache, sequence, block_of[i]))) continue;
    const std::tuple<bool, uint32_t, int32_t> rank(taken, taken ? stamp[i] : 0, block_of[i]);
    if (best < 0 || rank < best_rank) {
      best = i;
      best_rank = rank;
    }
  }
  if (best < 0) return -1;
  if (block_of[best] >= 0) slot_of[block_of[best]] = -1;
  slot_of[block] = best;
  block_of[best] = block;
  stamp[best] = step;
  return best;
}

void AddTotals(const ResolveParams& params, int r, int selected, int loaded) {
  if (params.totals == nullptr) return;
  params.totals[r].x += selected;
  params.totals[r].y += loaded;
}

void ResolveRow(const ResolveParams& params, int r, int head) {
  const CacheView& cache = params.cache;
  const int sequence = params.rows_info[r].sequence;
  const int record = params.layer * params.num_kv_heads + head;
  const int64_t pair = int64_t{r} * params.num_kv_heads + head;
  const int64_t row = cache.TableRow(sequence, record);
  const int32_t* selected = params.selected + pair * params.max_selected;
  int32_t* slots = params.slots + pair * params.max_selected;
  int32_t* blocks = params.blocks + pair * params.max_selected;

  int resident = 0;
  for (int i = 0; i < params.count[pair]; ++i) {
    const int local = cache.slot_of[row * cache.max_blocks + selected[i]];
    if (local < 0) continue;
    cache.stamp[row * cache.max_frames + local] = *params.step;
    slots[resident] = static_cast<int32_t>(cache.SlotNumber(sequence, record, local));
    blocks[resident++] = selected[i];
  }
  int all = resident;
  for (int i = 0; i < params.count[pair]; ++i) {
    if (cache.slot_of[row * cache.max_blocks + selected[i]] >= 0) continue;
    const int local = Acquire(cache, sequence, record, selected[i], *params.step);
    if (local < 0) {
      ++*params.failures;
      continue;
    }
    slots[all] = static_cast<int32_t>(cache.SlotNumber(sequence, record, local));
    blocks[all++] = selected[i];
    params.loads[(*params.num_loads)++] = Load{sequence, record, selected[i], local};
  }
  params.ranges[pair] = make_int2(resident, all);
  AddTotals(params, r, params.count[pair], all - resident);
}

/// The rows first .. end - 1 of one sequence.
void ResolveChunk(const ResolveParams& params, int first, int end, int head) {
  const CacheView& cache = params.cache;
  const int sequence = params.rows_info[first].sequence;
  const int record = params.layer * params.num_kv_heads + head;
  const int64_t row = cache.TableRow(sequence, record);
  const auto selection_of = [&](int r) {
    const int64_t pair = int64_t{r} * params.num_kv_heads + head;
    const int32_t* begin = params.selected + pair * params.max_selected;
    return std::set<int32_t>(begin, begin + params.count[pair]);
  };
  const auto mark = [&](const std::set<int32_t>& blocks, uint32_t step) {
    for (const int32_t block : blocks) {
      const int local = cache.slot_of[row * cache.max_blocks + block];
      if (local >= 0) cache.stamp[row * cache.max_frames + local] = step;
    }
  };

  std::set<int32_t> needed;
  for (int r = first; r < end; ++r) needed.merge(selection_of(r));
  // All that is here is marked before anything is given up.
  mark(needed, *params.step - 1);
  int loaded = 0;
  for (const int32_t block : needed) {
    if (cache.slot_of[row * cache.max_blocks + block] >= 0) continue;
    const int local = Acquire(cache, sequence, record, block, *params.step - 1);
    if (local < 0) {
      ++*params.failures;
      continue;
    }
    params.loads[(*params.num_loads)++] = Load{sequence, record, block, local};
    ++loaded;
  }
  mark(selection_of(end - 1), *params.step);
  AddTotals(params, first, static_cast<int>(needed.size()), loaded);
}

}  // namespace

void ResolveReference(const ResolveParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    if (params.rows_info[r].sequence < 0) continue;
    for (int h = 0; h < params.num_kv_heads; ++h) ResolveRow(params, r, h);
  }
}

void ResolveChunksReference(const ResolveParams& params) {
  for (int first = 0, end = 0; first < params.rows; first = end) {
    const int sequence = params.rows_info[first].sequence;
    end = first + 1;
    while (end < params.rows && params.rows_info[end].sequence == sequence) ++end;
    if (sequence < 0) continue;
    for (int h = 0; h < params.num_kv_heads; ++h) ResolveChunk(params, first, end, h);
  }
}

void OpenBlocksReference(const OpenBlocksParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    const StepRow info = params.rows_info[r];
    if (info.sequence < 0 || info.position % kBlockTokens != 0) continue;
    const int block = info.position / kBlockTokens;
    for (int record = 0; record < params.cache.records; ++record) {
      if (params.cache.SlotOf(info.sequence, record, block) >= 0) continue;
      if (Acquire(params.cache, info.sequence, record, block, *params.step) < 0) {
        ++*params.failures;
      }
    }
  }
}

}  // namespace nosara::kernels
