#include "kvstore/api/layout.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

PageLayout Layout(int layers, int kv_heads, int head_dim, int element_bytes) {
  return *PageLayout::Create(layers, kv_heads, head_dim, element_bytes);
}

// L 32, Hkv 2, D 128, bf16: the 8B shape.
TEST(PageLayoutTest, OffsetsOfThe8BShape) {
  const PageLayout layout = Layout(32, 2, 128, 2);
  EXPECT_EQ(layout.num_records(), 64);
  EXPECT_EQ(layout.row_bytes(), 256u);
  EXPECT_EQ(layout.checksums_offset(), 64u);
  // 64 header bytes and 64 checksums of 8 bytes are 576, padded to a multiple of 128.
  EXPECT_EQ(layout.index_offset(), 640u);
  // Per record 4 keys of 256 bytes and 4 floats.
  EXPECT_EQ(layout.index_entry_bytes(), 1040u);
  EXPECT_EQ(layout.index_bytes(), 65u * 1024);
  EXPECT_EQ(layout.prefix_bytes(), 640u + 66560);
  // K and V of 64 rows each, 64 biases.
  EXPECT_EQ(layout.k_offset(), 0u);
  EXPECT_EQ(layout.v_offset(), 16384u);
  EXPECT_EQ(layout.c_offset(), 32768u);
  EXPECT_EQ(layout.record_bytes(), 33024u);
  EXPECT_EQ(layout.record_offset(0), 67200u);
  EXPECT_EQ(layout.record_offset(63), 67200u + 63 * 33024);
  // A little more than 2 MiB: index, biases and header come on top of K and V.
  EXPECT_EQ(layout.page_bytes(), 2180736u);
  EXPECT_EQ(layout.record_index(3, 1), 7);
  EXPECT_EQ(layout.kc_offset(3, 1), 640u + 7 * 1040);
  EXPECT_EQ(layout.e_offset(3, 1), 640u + 7 * 1040 + 1024);
}

TEST(PageLayoutTest, EverythingIsAlignedAndDisjoint) {
  for (const int layers : {1, 3, 5, 32}) {
    for (const int heads : {1, 2, 8}) {
      for (const int dim : {16, 48, 128}) {
        for (const int bytes : {2, 4}) {
          const PageLayout layout = Layout(layers, heads, dim, bytes);
          EXPECT_EQ(layout.index_offset() % kPageAlignment, 0u);
          EXPECT_EQ(layout.record_bytes() % kPageAlignment, 0u);
          EXPECT_EQ(layout.page_bytes() % kPageAlignment, 0u);
          EXPECT_GE(layout.index_offset(),
                    layout.checksums_offset() + layout.num_records() * sizeof(uint64_t));
          EXPECT_GE(layout.record_offset(0), layout.index_offset() + layout.index_bytes());
          EXPECT_EQ(layout.record_offset(0) % kPageAlignment, 0u);
          EXPECT_GE(layout.record_bytes(), layout.c_offset() + 64 * sizeof(float));
          EXPECT_EQ(layout.page_bytes(),
                    layout.record_offset(layout.num_records() - 1) + layout.record_bytes());
        }
      }
    }
  }
}

TEST(PageLayoutTest, FingerprintsTellLayoutsApart) {
  const uint64_t base = Layout(4, 2, 128, 2).fingerprint();
  EXPECT_EQ(Layout(4, 2, 128, 2).fingerprint(), base);
  EXPECT_NE(Layout(2, 4, 128, 2).fingerprint(), base);
  EXPECT_NE(Layout(4, 2, 64, 4).fingerprint(), base);
  EXPECT_NE(Layout(4, 2, 128, 4).fingerprint(), base);
}

TEST(PageLayoutTest, RefusesNonsense) {
  const auto refused = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(PageLayout::Create(0, 2, 128, 2), StatusIs(refused, "layers = 0"));
  EXPECT_THAT(PageLayout::Create(4, 0, 128, 2), StatusIs(refused, "kv_heads = 0"));
  EXPECT_THAT(PageLayout::Create(4, 2, 100, 2), StatusIs(refused, "head_dim = 100"));
  EXPECT_THAT(PageLayout::Create(4, 2, 128, 3), StatusIs(refused, "element_bytes = 3"));
}

class SealedPageTest : public ::testing::Test {
 protected:
  SealedPageTest() : layout_(Layout(3, 2, 32, 2)), page_(layout_.page_bytes()) {
    std::mt19937 random(1);
    for (std::byte& byte : page_) byte = static_cast<std::byte>(random());
    SealPage(layout_, key_, kGeneration, 64, absl::MakeSpan(page_));
  }
  absl::Status Verify(const PageKey& key, uint64_t generation) const {
    return VerifyPrefix(layout_, key, generation,
                        absl::MakeConstSpan(page_).first(layout_.prefix_bytes()));
  }

  static constexpr uint64_t kGeneration = (uint64_t{5} << 32) + 1;
  const PageKey key_ = NamespaceKey("a", 1, "b", "c");
  const PageLayout layout_;
  std::vector<std::byte> page_;
};

TEST_F(SealedPageTest, VerifiesAndKnowsItsRecords) {
  EXPECT_OK(Verify(key_, kGeneration));
  for (int record = 0; record < layout_.num_records(); ++record) {
    const auto bytes =
        absl::MakeConstSpan(page_).subspan(layout_.record_offset(record), layout_.record_bytes());
    EXPECT_EQ(PageChecksum(key_, kGeneration, static_cast<uint32_t>(record), bytes),
              RecordChecksum(layout_, page_, record));
  }
}

TEST_F(SealedPageTest, AnotherKeyOrGenerationIsAborted) {
  EXPECT_THAT(Verify(NamespaceKey("x", 1, "b", "c"), kGeneration),
              StatusIs(absl::StatusCode::kAborted, "slot now holds"));
  EXPECT_THAT(Verify(key_, kGeneration + 1),
              StatusIs(absl::StatusCode::kAborted, "slot now holds"));
}

TEST_F(SealedPageTest, EveryDamagedBitOfThePrefixIsFound) {
  // The padding between the checksums and the index part carries nothing and is not covered.
  const size_t checksums_end = layout_.checksums_offset() + layout_.num_records() * 8;
  for (size_t i = 0; i < layout_.prefix_bytes(); ++i) {
    if (i >= checksums_end && i < layout_.index_offset()) continue;
    page_[i] ^= std::byte{0x10};
    EXPECT_FALSE(Verify(key_, kGeneration).ok()) << "byte " << i;
    page_[i] ^= std::byte{0x10};
  }
  EXPECT_OK(Verify(key_, kGeneration));
}

TEST_F(SealedPageTest, ChecksumsDependOnKeyGenerationAndPart) {
  const auto bytes = absl::MakeConstSpan(page_).first(1024);
  const uint64_t checksum = PageChecksum(key_, 1, 2, bytes);
  EXPECT_EQ(PageChecksum(key_, 1, 2, bytes), checksum);
  EXPECT_NE(PageChecksum(key_, 2, 2, bytes), checksum);
  EXPECT_NE(PageChecksum(key_, 1, 3, bytes), checksum);
  EXPECT_NE(PageChecksum(NamespaceKey("x", 1, "b", "c"), 1, 2, bytes), checksum);
}

TEST_F(SealedPageTest, AStoreVerifiesWholePagesKnowingOnlySizes) {
  const SealedSizes sizes = {layout_.fingerprint(), layout_.prefix_bytes()};
  ASSERT_OK(VerifyPage(sizes, key_, kGeneration, page_));
  for (int record = 0; record < layout_.num_records(); ++record) {
    for (const size_t at : {size_t{0}, layout_.record_bytes() - 1}) {
      page_[layout_.record_offset(record) + at] ^= std::byte{4};
      EXPECT_OK(VerifySealed(sizes, key_, kGeneration, page_));
      EXPECT_THAT(VerifyPage(sizes, key_, kGeneration, page_),
                  StatusIs(absl::StatusCode::kDataLoss, absl::StrCat("record ", record, ": ")));
      page_[layout_.record_offset(record) + at] ^= std::byte{4};
    }
  }
  EXPECT_THAT(VerifyPage(sizes, key_, kGeneration + 1, page_),
              StatusIs(absl::StatusCode::kAborted, ""));
  page_[layout_.index_offset()] ^= std::byte{1};
  EXPECT_THAT(VerifyPage(sizes, key_, kGeneration, page_),
              StatusIs(absl::StatusCode::kDataLoss, "index checksum"));
}

TEST_F(SealedPageTest, AStoreVerifiesKnowingOnlySizes) {
  const SealedSizes sizes = {layout_.fingerprint(), layout_.prefix_bytes()};
  EXPECT_OK(VerifySealed(sizes, key_, kGeneration, page_));
  EXPECT_THAT(VerifySealed({1, layout_.prefix_bytes()}, key_, kGeneration, page_),
              StatusIs(absl::StatusCode::kDataLoss, "another layout"));
  // A number of records that would lead out of the page.
  const uint32_t absurd = 0xffffffff;
  std::memcpy(page_.data() + offsetof(PageHeader, num_records), &absurd, sizeof(absurd));
  EXPECT_THAT(VerifySealed(sizes, key_, kGeneration, page_),
              StatusIs(absl::StatusCode::kDataLoss, "another layout"));
}

}  // namespace
}  // namespace nosara::kvstore
