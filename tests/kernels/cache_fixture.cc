#include "tests/kernels/cache_fixture.h"

#include <algorithm>
#include <cstring>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

/// What pages[] holds for a stored block without a page.

/// Into the vector's own memory, so that views of the world stay valid.
template <typename T>
void CopyBack(const DeviceArray<T>& from, std::vector<T>& to) {
  const std::vector<T> values = from.Download();
  std::copy(values.begin(), values.end(), to.begin());
}

}  // namespace

CacheWorld::CacheWorld(const WorldOptions& options, Random& random) : options_(options) {
  int total_frames = 3;  // some that no sequence owns
  for (int s = 0; s < sequences(); ++s) {
    SequenceSpec& spec = options_.sequences[s];
    if (spec.slots == 0) spec.slots = blocks(s);
    const int index_frames = ScoreFrames(VisibleWindows(spec.tokens - 1));
    max_frames_ = std::max(max_frames_, spec.slots + options_.spare);
    max_index_frames_ = std::max(max_index_frames_, index_frames + 1);
    max_blocks_ = std::max(max_blocks_, blocks(s) + options_.spare);
    total_frames += spec.slots + index_frames;
  }
  const int records = options_.layers * options_.kv_heads;
  slots = Poison<std::byte>(total_frames * records * SlotBytes(options_.head_dim));
  frames.assign(sequences() * max_frames_, -1);
  index_frames.assign(sequences() * max_index_frames_, -1);
  slot_of.assign(int64_t{sequences()} * records * max_blocks_, -1);
  block_of.assign(int64_t{sequences()} * records * max_frames_, -1);
  stamp.assign(block_of.size(), 0);
  pages.assign(sequences() * max_blocks_, 0);

  std::vector<int32_t> deal = random.Sample(total_frames, total_frames);
  for (int s = 0; s < sequences(); ++s) {
    num_frames.push_back(options_.sequences[s].slots);
    for (int i = 0; i < num_frames[s]; ++i) {
      frames[s * max_frames_ + i] = deal.back();
      deal.pop_back();
    }
    for (int i = 0; i < ScoreFrames(VisibleWindows(tokens(s) - 1)); ++i) {
      index_frames[s * max_index_frames_ + i] = deal.back();
      deal.pop_back();
    }
  }

  // Which blocks are stored: the last, open one never is, nor perhaps the one before.
  std::vector<std::vector<bool>> stored(sequences());
  int num_stored = 0;
  for (int s = 0; s < sequences(); ++s) {
    stored[s].assign(blocks(s), false);
    const bool all_resident = num_frames[s] >= blocks(s);
    const int end = std::max(0, blocks(s) - 1 - random.Below(2));
    for (int b = 0; b < end; ++b) {
      stored[s][b] = !all_resident || random.Chance(0.5);
      num_stored += stored[s][b];
    }
  }
  const int64_t page_bytes = records * RecordBytes(options_.head_dim);
  if (options_.with_pages) page_memory.resize(num_stored * page_bytes);
  int64_t next_page = 0;
  for (int s = 0; s < sequences(); ++s) {
    for (int b = 0; b < blocks(s); ++b) {
      if (!stored[s][b]) continue;
      uint64_t& page = pages[s * max_blocks_ + b];
      page = kStoredElsewhere;
      if (!options_.with_pages) continue;
      std::byte* memory = page_memory.data() + next_page++ * page_bytes;
      page = reinterpret_cast<uint64_t>(memory);
      for (int r = 0; r < records; ++r) {
        FillRecord(memory + r * RecordBytes(options_.head_dim), kBlockTokens, random);
      }
    }
  }
  for (int s = 0; s < sequences(); ++s) {
    PlaceBlocks(s, random);
    FillWindows(s, random);
  }
}

CacheWorld::CacheWorld(const CacheWorld& other)
    : slots(other.slots),
      frames(other.frames),
      num_frames(other.num_frames),
      index_frames(other.index_frames),
      slot_of(other.slot_of),
      block_of(other.block_of),
      stamp(other.stamp),
      pages(other.pages),
      page_memory(other.page_memory),
      options_(other.options_),
      max_frames_(other.max_frames_),
      max_index_frames_(other.max_index_frames_),
      max_blocks_(other.max_blocks_) {
  // The copy reads its own pages.
  const uint64_t from = reinterpret_cast<uint64_t>(other.page_memory.data());
  for (uint64_t& page : pages) {
    if (page > kStoredElsewhere) {
      page = page - from + reinterpret_cast<uint64_t>(page_memory.data());
    }
  }
}

int CacheWorld::ScoreFrames(int windows) { return (windows + kIndexWindows - 1) / kIndexWindows; }

int CacheWorld::MaxWindows() const {
  int windows = 1;
  for (int s = 0; s < sequences(); ++s) windows = std::max(windows, VisibleWindows(tokens(s) - 1));
  return ScoreFrames(windows) * kIndexWindows;
}

std::vector<int32_t> CacheWorld::Resident(int sequence, int record) const {
  const int64_t row = int64_t{sequence} * options_.layers * options_.kv_heads + record;
  std::vector<int32_t> resident;
  for (int b = 0; b < max_blocks_; ++b) {
    if (slot_of[row * max_blocks_ + b] >= 0) resident.push_back(b);
  }
  return resident;
}

CacheView CacheWorld::View() {
  CacheView view;
  view.slots = slots.data();
  view.records = options_.layers * options_.kv_heads;
  view.head_dim = options_.head_dim;
  view.max_frames = max_frames_;
  view.max_index_frames = max_index_frames_;
  view.max_blocks = max_blocks_;
  view.frames = frames.data();
  view.num_frames = num_frames.data();
  view.index_frames = index_frames.data();
  view.slot_of = slot_of.data();
  view.block_of = block_of.data();
  view.stamp = stamp.data();
  view.pages = pages.data();
  return view;
}

void CacheWorld::FillRecord(std::byte* record, int tokens, Random& random) {
  const int D = options_.head_dim;
  for (int t = 0; t < tokens; ++t) {
    __nv_bfloat16* key = RecordKey(record, D, t);
    __nv_bfloat16* value = RecordValue(record, D, t);
    for (int i = 0; i < D; ++i) {
      key[i] = __float2bfloat16_rn(options_.key_scale * random.Normal());
      value[i] = __float2bfloat16_rn(random.Normal());
    }
    RecordBias(record, D)[t] = random.Normal();
  }
}

void CacheWorld::PlaceBlocks(int sequence, Random& random) {
  const CacheView view = View();
  const int D = options_.head_dim;
  for (int r = 0; r < view.records; ++r) {
    const int64_t row = view.TableRow(sequence, r);
    std::vector<int32_t> resident, rest;
    for (int b = 0; b < blocks(sequence); ++b) {
      (pages[int64_t{sequence} * max_blocks_ + b] == 0 ? resident : rest).push_back(b);
    }
    random.Shuffle(rest);
    while (!rest.empty() && static_cast<int>(resident.size()) < num_frames[sequence]) {
      resident.push_back(rest.back());
      rest.pop_back();
    }
    const std::vector<int32_t> places = random.Sample(num_frames[sequence], num_frames[sequence]);
    for (size_t i = 0; i < resident.size() && i < places.size(); ++i) {
      const int32_t block = resident[i];
      slot_of[row * max_blocks_ + block] = places[i];
      block_of[row * max_frames_ + places[i]] = block;
      stamp[row * max_frames_ + places[i]] = random.Between(1, 20);  // many equal ones
      std::byte* slot = view.Slot(view.SlotNumber(sequence, r, places[i]));
      const uint64_t page = pages[int64_t{sequence} * max_blocks_ + block];
      if (page > kStoredElsewhere) {
        std::memcpy(slot, reinterpret_cast<std::byte*>(page) + r * RecordBytes(D), RecordBytes(D));
      } else {
        FillRecord(slot, std::min(kBlockTokens, tokens(sequence) - block * kBlockTokens), random);
      }
    }
  }
}

void CacheWorld::FillWindows(int sequence, Random& random) {
  const CacheView view = View();
  for (int r = 0; r < view.records; ++r) {
    for (int w = 0; w < VisibleWindows(tokens(sequence) - 1); ++w) {
      std::byte* slot = view.IndexSlot(sequence, r, w);
      __nv_bfloat16* key = IndexKey(slot, view.head_dim, w);
      for (int i = 0; i < view.head_dim; ++i) {
        key[i] = __float2bfloat16_rn(options_.key_scale * random.Normal());
      }
      *IndexScore(slot, view.head_dim, w) = random.Normal();
    }
  }
}

std::string CacheWorld::BrokenInvariant() const {
  const int records = options_.layers * options_.kv_heads;
  for (int s = 0; s < sequences(); ++s) {
    for (int r = 0; r < records; ++r) {
      const int64_t row = int64_t{s} * records + r;
      const std::string where =
          " (sequence " + std::to_string(s) + ", record " + std::to_string(r) + ")";
      for (int i = 0; i < max_frames_; ++i) {
        const int32_t block = block_of[row * max_frames_ + i];
        if (block < 0) continue;
        if (block >= max_blocks_ || slot_of[row * max_blocks_ + block] != i) {
          return "invariant 1: slot " + std::to_string(i) + " says block " + std::to_string(block) +
                 ", which says otherwise" + where;
        }
      }
      for (int b = 0; b < max_blocks_; ++b) {
        const int32_t slot = slot_of[row * max_blocks_ + b];
        if (slot < -1 || slot >= num_frames[s]) {
          return "invariant 3: block " + std::to_string(b) + " in slot " + std::to_string(slot) +
                 " of " + std::to_string(num_frames[s]) + where;
        }
        if (slot >= 0 && block_of[row * max_frames_ + slot] != b) {
          return "block " + std::to_string(b) + " says slot " + std::to_string(slot) +
                 ", which holds block " + std::to_string(block_of[row * max_frames_ + slot]) +
                 where;
        }
        if (slot < 0 && b < blocks(s) && pages[int64_t{s} * max_blocks_ + b] == 0) {
          return "invariant 2: block " + std::to_string(b) + " is neither stored nor in a slot" +
                 where;
        }
      }
    }
  }
  return "";
}

DeviceMirror::DeviceMirror(CacheWorld& world)
    : world_(world),
      slots_(world.slots),
      frames_(world.frames),
      num_frames_(world.num_frames),
      index_frames_(world.index_frames),
      slot_of_(world.slot_of),
      block_of_(world.block_of),
      stamp_(world.stamp),
      pages_(world.pages),
      page_memory_(world.page_memory.size()) {
  if (!world.page_memory.empty()) {
    std::memcpy(page_memory_.host(), world.page_memory.data(), world.page_memory.size());
  }
  UploadPages();
}

CacheView DeviceMirror::View() const {
  CacheView view = world_.View();
  view.slots = slots_.data();
  view.frames = frames_.data();
  view.num_frames = num_frames_.data();
  view.index_frames = index_frames_.data();
  view.slot_of = slot_of_.data();
  view.block_of = block_of_.data();
  view.stamp = stamp_.data();
  view.pages = pages_.data();
  return view;
}

void DeviceMirror::UploadPages() {
  std::vector<uint64_t> device_pages = world_.pages;
  const uint64_t host = reinterpret_cast<uint64_t>(world_.page_memory.data());
  for (uint64_t& page : device_pages) {
    if (page > kStoredElsewhere) {
      page = page - host + reinterpret_cast<uint64_t>(page_memory_.device());
    }
  }
  pages_.Upload(device_pages);
}

void DeviceMirror::UploadSlots() { slots_.Upload(world_.slots); }

void DeviceMirror::Download() {
  CopyBack(slots_, world_.slots);
  DownloadTables();
}

void DeviceMirror::DownloadTables() {
  CopyBack(frames_, world_.frames);
  CopyBack(num_frames_, world_.num_frames);
  CopyBack(index_frames_, world_.index_frames);
  CopyBack(slot_of_, world_.slot_of);
  CopyBack(block_of_, world_.block_of);
  CopyBack(stamp_, world_.stamp);
}

}  // namespace nosara::kernels
