#include "kvstore/api/layout.h"

// The whole of xxHash in this file, compiled for our processors: packages build it for the oldest.
#define XXH_INLINE_ALL
// Compiled here, with this project's vector instructions: the library's own copy is for any x86-64
// and takes 1.7 times as long over a record.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nosara::kvstore {
namespace {

size_t Align(size_t bytes) {
  return (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
}

/// Precondition: the page's header and its `num_records` checksums lie within `page`.
uint64_t HeaderChecksum(uint32_t num_records, absl::Span<const std::byte> page) {
  PageHeader header;
  std::memcpy(&header, page.data(), sizeof(header));
  header.header_checksum = 0;
  const uint64_t of_checksums =
      PageChecksum(header.key, header.generation, kHeaderChecksumSeed,
                   page.subspan(sizeof(PageHeader), num_records * sizeof(uint64_t)));
  return XXH3_64bits_withSeed(&header, sizeof(header), of_checksums);
}

size_t IndexOffset(size_t num_records) {
  return Align(sizeof(PageHeader) + num_records * sizeof(uint64_t));
}

}  // namespace

absl::StatusOr<PageLayout> PageLayout::Create(int layers, int kv_heads, int head_dim,
                                              int element_bytes) {
  if (layers < 1 || layers > 4096) {
    return absl::InvalidArgumentError(
        absl::StrCat("page layout: layers = ", layers, ": must be 1 to 4096"));
  }
  if (kv_heads < 1 || kv_heads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("page layout: kv_heads = ", kv_heads, ": must be 1 to 1024"));
  }
  if (head_dim < 16 || head_dim % 16 != 0 || head_dim > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("page layout: head_dim = ", head_dim,
                                                   ": must be a multiple of 16 from 16 to 1024"));
  }
  if (element_bytes != 2 && element_bytes != 4) {
    return absl::InvalidArgumentError(absl::StrCat("page layout: element_bytes = ", element_bytes,
                                                   ": must be 2 (bf16) or 4 (f32)"));
  }
  PageLayout layout;
  layout.layers_ = layers;
  layout.kv_heads_ = kv_heads;
  layout.head_dim_ = head_dim;
  layout.element_bytes_ = element_bytes;
  const size_t records = layout.num_records();
  layout.index_offset_ = IndexOffset(records);
  layout.index_bytes_ = records * layout.index_entry_bytes();
  layout.records_offset_ = Align(layout.index_offset_ + layout.index_bytes_);
  layout.record_bytes_ =
      Align(2 * layout.row_bytes() * kBlockTokens + sizeof(float) * kBlockTokens);
  layout.page_bytes_ = layout.records_offset_ + records * layout.record_bytes_;
  const uint32_t identity[5] = {kPageVersion, static_cast<uint32_t>(layers),
                                static_cast<uint32_t>(kv_heads), static_cast<uint32_t>(head_dim),
                                static_cast<uint32_t>(element_bytes)};
  layout.fingerprint_ = XXH3_64bits(identity, sizeof(identity));
  return layout;
}

uint64_t PageChecksum(const PageKey& key, uint64_t generation, uint32_t part,
                      absl::Span<const std::byte> bytes) {
  struct {
    PageKey key;
    uint64_t generation;
    uint64_t part;
  } identity = {key, generation, part};
  static_assert(sizeof(identity) == 32);
  const uint64_t seed = XXH3_64bits(&identity, sizeof(identity));
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

void SealPage(const PageLayout& layout, const PageKey& key, uint64_t generation, uint32_t tokens,
              absl::Span<std::byte> page) {
  CHECK(page.size() == layout.page_bytes());
  PageHeader header;
  header.layout_fingerprint = layout.fingerprint();
  header.key = key;
  header.generation = generation;
  header.tokens = tokens;
  header.num_records = layout.num_records();
  header.index_checksum = PageChecksum(key, generation, kIndexChecksumSeed,
                                       page.subspan(layout.index_offset(), layout.index_bytes()));
  for (int record = 0; record < layout.num_records(); ++record) {
    const uint64_t checksum = PageChecksum(
        key, generation, record, page.subspan(layout.record_offset(record), layout.record_bytes()));
    std::memcpy(page.data() + layout.checksums_offset() + record * sizeof(checksum), &checksum,
                sizeof(checksum));
  }
  std::memcpy(page.data(), &header, sizeof(header));
  header.header_checksum = HeaderChecksum(header.num_records, page);
  std::memcpy(page.data(), &header, sizeof(header));
}

absl::Status VerifySealed(const SealedSizes& sizes, const PageKey& key, uint64_t generation,
                          absl::Span<const std::byte> page) {
  CHECK(sizes.prefix_bytes >= sizeof(PageHeader) && page.size() >= sizes.prefix_bytes);
  const absl::Span<const std::byte> prefix = page.first(sizes.prefix_bytes);
  PageHeader header;
  std::memcpy(&header, prefix.data(), sizeof(header));
  if (header.magic != kPageMagic || header.version != kPageVersion) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": no page header"));
  }
  if (header.layout_fingerprint != sizes.layout_fingerprint || header.num_records == 0 ||
      IndexOffset(header.num_records) >= prefix.size()) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": header of another layout"));
  }
  if (header.header_checksum != HeaderChecksum(header.num_records, prefix)) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": header checksum differs"));
  }
  if (header.key != key || header.generation != generation) {
    return absl::AbortedError(absl::StrCat("page ", key.ToHex(), " generation ", generation,
                                           ": slot now holds ", header.key.ToHex(), " generation ",
                                           header.generation));
  }
  if (header.tokens < 1 || header.tokens > static_cast<uint32_t>(kBlockTokens)) {
    return absl::DataLossError(
        absl::StrCat("page ", key.ToHex(), ": ", header.tokens, " tokens: must be 1 to 64"));
  }
  const uint64_t index_checksum = PageChecksum(key, generation, kIndexChecksumSeed,
                                               prefix.subspan(IndexOffset(header.num_records)));
  if (header.index_checksum != index_checksum) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": index checksum differs"));
  }
  return absl::OkStatus();
}

absl::Status VerifyPage(const SealedSizes& sizes, const PageKey& key, uint64_t generation,
                        absl::Span<const std::byte> page) {
  const absl::Status sealed = VerifySealed(sizes, key, generation, page);
  if (!sealed.ok()) return sealed;
  PageHeader header;
  std::memcpy(&header, page.data(), sizeof(header));
  const size_t records_offset = Align(sizes.prefix_bytes);
  // Looked at again: nothing keeps a stray writer from changing it since.
  if (header.num_records == 0 || IndexOffset(header.num_records) >= sizes.prefix_bytes ||
      records_offset >= page.size() || (page.size() - records_offset) % header.num_records != 0) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": header of another layout"));
  }
  const size_t record_bytes = (page.size() - records_offset) / header.num_records;
  for (uint32_t record = 0; record < header.num_records; ++record) {
    uint64_t checksum;
    std::memcpy(&checksum, page.data() + sizeof(header) + record * sizeof(checksum),
                sizeof(checksum));
    if (checksum !=
        PageChecksum(key, generation, record,
                     page.subspan(records_offset + record * record_bytes, record_bytes))) {
      return absl::DataLossError(
          absl::StrCat("page ", key.ToHex(), " record ", record, ": checksum differs"));
    }
  }
  return absl::OkStatus();
}

absl::Status VerifyPrefix(const PageLayout& layout, const PageKey& key, uint64_t generation,
                          absl::Span<const std::byte> prefix) {
  CHECK(prefix.size() >= layout.prefix_bytes());
  PageHeader header;
  std::memcpy(&header, prefix.data(), sizeof(header));
  if (header.magic == kPageMagic &&
      header.num_records != static_cast<uint32_t>(layout.num_records())) {
    return absl::DataLossError(absl::StrCat("page ", key.ToHex(), ": ", header.num_records,
                                            " records: must be ", layout.num_records()));
  }
  return VerifySealed({layout.fingerprint(), layout.prefix_bytes()}, key, generation, prefix);
}

uint64_t RecordChecksum(const PageLayout& layout, absl::Span<const std::byte> prefix, int record) {
  CHECK(record >= 0 && record < layout.num_records());
  uint64_t checksum;
  std::memcpy(&checksum, prefix.data() + layout.checksums_offset() + record * sizeof(checksum),
              sizeof(checksum));
  return checksum;
}

}  // namespace nosara::kvstore
