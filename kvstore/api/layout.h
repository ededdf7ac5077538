// Where things lie inside a page: the one definition of the page layout.
//
//   offset 0                 PageHeader, then one uint64 checksum per record; padded
//   index_offset()           index part: for each (layer, KV head), in that order:
//                              compressed keys [4, D] of the windows that END in this block, in
//                              the model's dtype; then their pooled scores e [4], f32
//   record_offset(r)         record r = layer * Hkv + head:
//                              K [64, D], V [64, D] in the model's dtype; biases c [64], f32
//
// Window i of block n (i = 0..3) is the window w = 4n - 1 + i, covering tokens 16w .. 16w+31; for
// n = 0 window i = 0 does not exist and its bytes are zero. All numbers are little endian. The
// header, the index part and each record begin at a multiple of 128 bytes; each record's size is
// a multiple of 128 bytes. nosa.md sections 2 and 4 define c, kc and e.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kvstore/api/page_key.h"

namespace nosara::kvstore {

inline constexpr size_t kPageAlignment = 128;
/// Compressed windows that end in one block: P / kernel_stride.
inline constexpr int kWindowsPerBlock = 4;
inline constexpr uint32_t kPageMagic = 0x4152534e;  // "NSRA"
inline constexpr uint32_t kPageVersion = 1;

/// First bytes of every page. Plain bytes: copied and compared as they are.
struct PageHeader {
  uint32_t magic = kPageMagic;
  uint32_t version = kPageVersion;
  uint64_t layout_fingerprint = 0;
  PageKey key;
  /// Value of the slot's generation when the page was written; a slot's generation grows by one
  /// at each reservation, so a stale reference never matches.
  uint64_t generation = 0;
  /// Tokens in the page: 64, fewer only in a partial page.
  uint32_t tokens = kBlockTokens;
  uint32_t num_records = 0;
  /// PageChecksum() of the index part, seeded by (key, generation, kIndexChecksumSeed).
  uint64_t index_checksum = 0;
  /// PageChecksum() of this header (with this field zero) and of the record checksums behind it.
  uint64_t header_checksum = 0;
};
static_assert(sizeof(PageHeader) == 64);

/// Offsets and sizes of the pages of one model, computed from (L, Hkv, D, bytes per element).
/// Immutable value; cheap to copy.
class PageLayout final {
 public:
  /// `layers`, `kv_heads` >= 1; `head_dim` a multiple of 16; `element_bytes` 2 (bf16) or 4 (f32).
  /// INVALID_ARGUMENT names the value otherwise.
  static absl::StatusOr<PageLayout> Create(int layers, int kv_heads, int head_dim,
                                           int element_bytes);

  int layers() const { return layers_; }
  int kv_heads() const { return kv_heads_; }
  int head_dim() const { return head_dim_; }
  int element_bytes() const { return element_bytes_; }
  int num_records() const { return layers_ * kv_heads_; }

  /// Whole page, a multiple of 128 bytes.
  size_t page_bytes() const { return page_bytes_; }
  /// Header, record checksums and index part together: what a resuming worker pulls, as the
  /// leading bytes of the page.
  size_t prefix_bytes() const { return index_offset_ + index_bytes_; }
  size_t checksums_offset() const { return sizeof(PageHeader); }
  size_t index_offset() const { return index_offset_; }
  size_t index_bytes() const { return index_bytes_; }
  size_t record_bytes() const { return record_bytes_; }
  size_t record_offset(int record) const {
    return records_offset_ + static_cast<size_t>(record) * record_bytes_;
  }
  /// Record number of (layer, KV head).
  int record_index(int layer, int kv_head) const { return layer * kv_heads_ + kv_head; }

  // Inside a record (bytes from its start).
  size_t k_offset() const { return 0; }
  size_t v_offset() const { return row_bytes() * kBlockTokens; }
  size_t c_offset() const { return 2 * row_bytes() * kBlockTokens; }
  /// One token's K (or V) row of one head: D * element_bytes.
  size_t row_bytes() const { return static_cast<size_t>(head_dim_) * element_bytes_; }

  // Inside the index part (bytes from the start of the page).
  size_t kc_offset(int layer, int kv_head) const {
    return index_offset_ + static_cast<size_t>(record_index(layer, kv_head)) * index_entry_bytes();
  }
  size_t e_offset(int layer, int kv_head) const {
    return kc_offset(layer, kv_head) + row_bytes() * kWindowsPerBlock;
  }
  size_t index_entry_bytes() const {
    return row_bytes() * kWindowsPerBlock + sizeof(float) * kWindowsPerBlock;
  }

  /// Identifies this layout (version, L, Hkv, D, element size): equal iff the layouts are equal.
  uint64_t fingerprint() const { return fingerprint_; }

 private:
  PageLayout() = default;

  int layers_ = 0;
  int kv_heads_ = 0;
  int head_dim_ = 0;
  int element_bytes_ = 0;
  size_t index_offset_ = 0;
  size_t index_bytes_ = 0;
  size_t records_offset_ = 0;
  size_t record_bytes_ = 0;
  size_t page_bytes_ = 0;
  uint64_t fingerprint_ = 0;
};

/// `part` of a checksum seed for what is not a record.
inline constexpr uint32_t kIndexChecksumSeed = 0xffffffff;
inline constexpr uint32_t kHeaderChecksumSeed = 0xfffffffe;

/// XXH3-64 of `bytes`, seeded by (key, generation, part): bytes of another page, of an earlier use
/// of the slot or of another record do not match. `part`: record number, or one of the seeds above.
uint64_t PageChecksum(const PageKey& key, uint64_t generation, uint32_t part,
                      absl::Span<const std::byte> bytes);

/// Fills in header and checksums of the page at `page` (its index part and records are final).
/// Precondition: `page.size() == layout.page_bytes()`.
void SealPage(const PageLayout& layout, const PageKey& key, uint64_t generation, uint32_t tokens,
              absl::Span<std::byte> page);

/// All that a store knows of the layout of a page.
struct SealedSizes {
  uint64_t layout_fingerprint = 0;
  /// Header, record checksums and index part; at least sizeof(PageHeader).
  size_t prefix_bytes = 0;
};

/// Checks a sealed page as far as its sizes allow: magic, version, layout, header checksum, key,
/// generation, index checksum; never reads beyond `sizes.prefix_bytes`, whatever the page holds.
/// ABORTED for another key or generation, DATA_LOSS for damaged bytes.
absl::Status VerifySealed(const SealedSizes& sizes, const PageKey& key, uint64_t generation,
                          absl::Span<const std::byte> page);

/// VerifySealed(), and all records against their checksums: the whole page. `page` has the size of
/// a page of this layout. DATA_LOSS names the first record that differs.
absl::Status VerifyPage(const SealedSizes& sizes, const PageKey& key, uint64_t generation,
                        absl::Span<const std::byte> page);

/// Checks what a reader relies on before it uses a page prefix: magic, version, layout, key,
/// generation, header checksum and index checksum. `prefix.size() >= layout.prefix_bytes()`.
/// ABORTED when the slot was reused (another generation or key), DATA_LOSS when bytes are damaged.
absl::Status VerifyPrefix(const PageLayout& layout, const PageKey& key, uint64_t generation,
                          absl::Span<const std::byte> prefix);

/// The checksum of record `record` from a verified prefix.
uint64_t RecordChecksum(const PageLayout& layout, absl::Span<const std::byte> prefix, int record);

}  // namespace nosara::kvstore
