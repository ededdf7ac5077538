#include "kernels/pages/pages_reference.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

enum class Direction { kToPage, kFromPage };

void CopyIndexPart(const ExportParams& params, const PageOfBlock& block, int record,
                   Direction direction) {
  const CacheView& cache = params.cache;
  const int64_t key_bytes = int64_t{2} * cache.head_dim;
  std::byte* entry = block.page + params.offsets.index + record * (4 * key_bytes + 16);
  const auto copy = [&](void* cached, void* paged, int64_t bytes) {
    if (direction == Direction::kToPage) {
      std::memcpy(paged, cached, bytes);
    } else {
      std::memcpy(cached, paged, bytes);
    }
  };
  for (int i = 0; i < 4; ++i) {
    const int window = 4 * block.block - 1 + i;
    if (window < 0) continue;
    std::byte* slot = cache.IndexSlot(block.sequence, record, window);
    copy(IndexKey(slot, cache.head_dim, window), entry + i * key_bytes, key_bytes);
    copy(IndexScore(slot, cache.head_dim, window), entry + 4 * key_bytes + i * 4, 4);
  }
}

}  // namespace

void ExportReference(const ExportParams& params) {
  const CacheView& cache = params.cache;
  const int64_t bytes = RecordBytes(cache.head_dim);
  for (int i = 0; i < params.num_blocks; ++i) {
    const PageOfBlock& block = params.blocks[i];
    for (int record = 0; record < cache.records; ++record) {
      std::memcpy(block.page + params.offsets.records + record * bytes,
                  cache.Slot(cache.SlotOf(block.sequence, record, block.block)), bytes);
      CopyIndexPart(params, block, record, Direction::kToPage);
    }
  }
}

void ImportIndexReference(const ExportParams& params) {
  for (int i = 0; i < params.num_blocks; ++i) {
    for (int record = 0; record < params.cache.records; ++record) {
      CopyIndexPart(params, params.blocks[i], record, Direction::kFromPage);
    }
  }
}

void ShrinkReference(const ShrinkParams& params) {
  const CacheView& cache = params.cache;
  const int sequence = params.sequence;
  const int frames = cache.num_frames[sequence];
  for (int record = 0; record < cache.records; ++record) {
    const int64_t row = cache.TableRow(sequence, record);
    int32_t* slot_of = cache.slot_of + row * cache.max_blocks;
    int32_t* block_of = cache.block_of + row * cache.max_frames;
    uint32_t* stamp = cache.stamp + row * cache.max_frames;
    const auto stored = [&](int i) {
      return cache.pages[int64_t{sequence} * cache.max_blocks + block_of[i]] != 0;
    };

    // Those that must move, the most deserving first, and the places for them, the best first.
    std::vector<int> above, places;
    for (int i = params.keep; i < frames; ++i) {
      if (block_of[i] >= 0) above.push_back(i);
    }
    std::sort(above.begin(), above.end(), [&](int a, int b) {
      return std::make_tuple(stored(a), ~stamp[a], -block_of[a]) <
             std::make_tuple(stored(b), ~stamp[b], -block_of[b]);
    });
    for (int i = 0; i < std::min(params.keep, frames); ++i) {
      if (block_of[i] < 0 || stored(i)) places.push_back(i);
    }
    const auto place_rank = [&](int i) {
      const bool taken = block_of[i] >= 0;
      return std::make_tuple(taken, taken ? stamp[i] : 0, block_of[i]);
    };
    std::sort(places.begin(), places.end(),
              [&](int a, int b) { return place_rank(a) < place_rank(b); });

    size_t next = 0;
    for (const int from : above) {
      const int32_t block = block_of[from];
      const bool moves = next < places.size() && (block_of[places[next]] < 0 || !stored(from) ||
                                                  stamp[from] > stamp[places[next]]);
      block_of[from] = -1;
      slot_of[block] = -1;
      if (!moves) continue;
      const int to = places[next++];
      if (block_of[to] >= 0) slot_of[block_of[to]] = -1;
      block_of[to] = block;
      slot_of[block] = to;
      stamp[to] = stamp[from];
      std::memcpy(cache.Slot(cache.SlotNumber(sequence, record, to)),
                  cache.Slot(cache.SlotNumber(sequence, record, from)),
                  RecordBytes(cache.head_dim));
    }
  }
}

}  // namespace nosara::kernels
