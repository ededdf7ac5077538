#include "worker/backend/cpu/sequence_cache.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/backend/selection.h"
#include "worker/model/bf16.h"

namespace nosara::worker {
namespace {

using kvstore::kBlockTokens;
using kvstore::kWindowsPerBlock;

int BlocksFor(int64_t tokens) {
  return static_cast<int>((tokens + kBlockTokens - 1) / kBlockTokens);
}

}  // namespace

AlignedBytes::AlignedBytes(size_t bytes) : size_(bytes) {
  const size_t rounded = (bytes + 127) / 128 * 128;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(128, std::max<size_t>(rounded, 128))));
  CHECK(data_ != nullptr);
}

SequenceCache::SequenceCache(const kvstore::PageLayout& layout, DType dtype, int64_t max_tokens,
                             int slots, int max_pages)
    : layout_(layout),
      dtype_(dtype),
      max_tokens_(max_tokens),
      slots_(slots),
      max_pages_(max_pages),
      windows_(layout.num_records()),
      slot_memory_(static_cast<size_t>(layout.num_records()) * slots * layout.record_bytes()) {
  CHECK(max_pages >= 2);
  const int max_blocks = std::max(1, BlocksFor(max_tokens));
  const int64_t max_windows = VisibleWindows(max_tokens - 1);
  tables_.reserve(layout.num_records());
  for (WindowIndex& windows : windows_) {
    windows.keys.reserve(max_windows * layout.head_dim());
    windows.scores.reserve(max_windows);
    tables_.emplace_back(slots, max_blocks);
  }
}

size_t SequenceCache::BytesNeeded(const kvstore::PageLayout& layout, int64_t max_tokens, int slots,
                                  int max_pages) {
  const size_t records = layout.num_records();
  const size_t window_bytes = (layout.head_dim() + 1) * sizeof(float);
  return records * slots * layout.record_bytes() +
         records * VisibleWindows(max_tokens - 1) * window_bytes +
         static_cast<size_t>(max_pages) * layout.page_bytes();
}

int64_t SequenceCache::Headroom() const {
  const int64_t in_open_page = blocks_.size() * int64_t{kBlockTokens} - tokens_;
  const int64_t in_new_pages = int64_t{max_pages_ - pages_held_} * kBlockTokens;
  return std::min(max_tokens_ - tokens_, in_open_page + in_new_pages);
}

absl::Status SequenceCache::PrepareAppend(int64_t count, PagePool& pool) {
  CHECK(count <= Headroom());
  const int needed = BlocksFor(tokens_ + count);
  while (static_cast<int>(blocks_.size()) < needed) {
    PageBuffer page = pool.Allocate();
    if (page == nullptr) {
      return absl::InternalError(
          absl::StrCat("page pool of ", pool.max_pages(), " pages is empty"));
    }
    blocks_.push_back({std::move(page), std::nullopt, {}});
    ++pages_held_;
  }
  tokens_ += count;
  return absl::OkStatus();
}

std::vector<FinishedBlock> SequenceCache::TakeFinished() {
  std::vector<FinishedBlock> finished;
  for (; (unreported_from_ + 1) * kBlockTokens <= tokens_; ++unreported_from_) {
    finished.push_back({static_cast<int>(unreported_from_), blocks_[unreported_from_].page});
  }
  return finished;
}

void SequenceCache::BindPages(absl::Span<const BoundPage> pages) {
  CHECK(tokens_ == 0 && blocks_.empty());
  const int dim = layout_.head_dim();
  for (const BoundPage& page : pages) {
    const int n = static_cast<int>(blocks_.size());
    Block block;
    block.ref = page.ref;
    for (int record = 0; record < layout_.num_records(); ++record) {
      block.record_checksums.push_back(kvstore::RecordChecksum(layout_, page.prefix, record));
    }
    for (int layer = 0; layer < layout_.layers(); ++layer) {
      for (int head = 0; head < layout_.kv_heads(); ++head) {
        WindowIndex& windows = windows_[layout_.record_index(layer, head)];
        const std::byte* keys = page.prefix.data() + layout_.kc_offset(layer, head);
        const std::byte* scores = page.prefix.data() + layout_.e_offset(layer, head);
        // Block 0 has no window that starts before it.
        for (int i = n == 0 ? 1 : 0; i < kWindowsPerBlock; ++i) {
          const size_t old_size = windows.keys.size();
          windows.keys.resize(old_size + dim);
          float* to = windows.keys.data() + old_size;
          const std::byte* from = keys + i * layout_.row_bytes();
          if (dtype_ == DType::kBf16) {
            ToFloat(absl::MakeConstSpan(reinterpret_cast<const Bf16*>(from), dim),
                    absl::MakeSpan(to, dim));
          } else {
            std::memcpy(to, from, layout_.row_bytes());
          }
          float score;
          std::memcpy(&score, scores + i * sizeof(float), sizeof(score));
          windows.scores.push_back(score);
        }
      }
    }
    blocks_.push_back(std::move(block));
  }
  tokens_ = int64_t{kBlockTokens} * num_blocks();
  unreported_from_ = num_blocks();
}

void SequenceCache::CommitBlock(int block, const kvstore::PageRef& ref,
                                absl::Span<const uint64_t> checksums) {
  Block& entry = blocks_[block];
  CHECK(entry.page != nullptr && static_cast<int>(checksums.size()) == layout_.num_records());
  // What has been selected more recently than the least recently used resident keeps a copy here.
  for (int record = 0; record < layout_.num_records(); ++record) {
    SlotTable& table = tables_[record];
    const SlotId slot = table.Acquire(block, table.last_used(block));
    if (slot == kNoSlot) continue;
    std::memcpy(slot_data(record, slot), entry.page->data() + layout_.record_offset(record),
                layout_.record_bytes());
  }
  entry.page = nullptr;
  --pages_held_;
  entry.ref = ref;
  entry.record_checksums.assign(checksums.begin(), checksums.end());
}

const std::byte* SequenceCache::Resident(int record, int block) const {
  const Block& entry = blocks_[block];
  if (entry.page != nullptr) return entry.page->data() + layout_.record_offset(record);
  const SlotId slot = tables_[record].slot_of(block);
  return slot == kNoSlot ? nullptr : slot_data(record, slot);
}

std::byte* SequenceCache::Writable(int record, int block) {
  CHECK(blocks_[block].page != nullptr);
  return blocks_[block].page->data() + layout_.record_offset(record);
}

std::byte* SequenceCache::slot_data(int record, SlotId slot) const {
  return slot_memory_.data() +
         (static_cast<size_t>(record) * slots_ + slot) * layout_.record_bytes();
}

void SequenceCache::CheckIntegrity() const {
  CHECK(num_blocks() == BlocksFor(tokens_));
  int held = 0;
  for (const Block& block : blocks_) {
    CHECK((block.page != nullptr) != block.ref.has_value());
    held += block.page != nullptr ? 1 : 0;
  }
  CHECK(held == pages_held_ && held <= max_pages_);
  CHECK(tokens_ % kBlockTokens == 0 || blocks_.back().page != nullptr);
  for (const SlotTable& table : tables_) {
    table.CheckIntegrity();
    for (SlotId slot = 0; slot < table.slots(); ++slot) {
      const int block = table.block_of(slot);
      if (block >= 0) CHECK(block < num_blocks() && blocks_[block].ref.has_value());
    }
  }
  for (const WindowIndex& windows : windows_) {
    CHECK(static_cast<int64_t>(windows.scores.size()) == VisibleWindows(tokens_ - 1));
    CHECK(windows.keys.size() == windows.scores.size() * layout_.head_dim());
  }
}

}  // namespace nosara::worker
