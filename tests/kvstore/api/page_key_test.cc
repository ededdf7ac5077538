#include "kvstore/api/page_key.h"

#include <gtest/gtest.h>

#include <numeric>

#include "absl/container/flat_hash_set.h"
#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

std::vector<int32_t> Tokens(int count) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

// Computed by `python3 -c "import hashlib, struct; print(hashlib.sha256(bytes(range(16)) +
// struct.pack('<64i', *range(64))).hexdigest()[:32])"`.
TEST(ChildKeyTest, IsTruncatedSha256OfParentAndTokens) {
  PageKey parent;
  for (size_t i = 0; i < parent.bytes.size(); ++i) parent.bytes[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(ChildKey(parent, Tokens(64)).ToHex(), "efbbd9bf5b70c024259292f41b198897");
}

// sha256 of the five parts, each behind its length as a little-endian uint64.
TEST(NamespaceKeyTest, IsTruncatedSha256OfSizedParts) {
  EXPECT_EQ(NamespaceKey("model", 7, "rope", "salt").ToHex(), "d67ca166bc7bcd83564baf24e72d03d6");
}

TEST(NamespaceKeyTest, EveryPartCountsAndPartsDoNotRunTogether) {
  const absl::flat_hash_set<PageKey> keys = {
      NamespaceKey("model", 7, "rope", "salt"),  NamespaceKey("model2", 7, "rope", "salt"),
      NamespaceKey("model", 8, "rope", "salt"),  NamespaceKey("model", 7, "rope2", "salt"),
      NamespaceKey("model", 7, "rope", "salt2"), NamespaceKey("model", 7, "ropes", "alt"),
      NamespaceKey("model7", 7, "rope", "salt")};
  EXPECT_EQ(keys.size(), 7u);
}

TEST(ChainKeysTest, EqualPrefixesShareKeysAndDifferentOnesShareNone) {
  const PageKey root = NamespaceKey("model", 7, "rope", "");
  std::vector<int32_t> a = Tokens(64 * 4);
  std::vector<int32_t> b = a;
  b[64 * 2 + 3] = 9999;
  const std::vector<PageKey> keys_a = ChainKeys(root, a);
  const std::vector<PageKey> keys_b = ChainKeys(root, b);
  ASSERT_EQ(keys_a.size(), 4u);
  EXPECT_EQ(keys_a[0], keys_b[0]);
  EXPECT_EQ(keys_a[1], keys_b[1]);
  EXPECT_NE(keys_a[2], keys_b[2]);
  EXPECT_NE(keys_a[3], keys_b[3]) << "a block's key covers all tokens before it";
  EXPECT_NE(ChainKeys(NamespaceKey("model", 7, "rope", "tenant"), a)[0], keys_a[0]);
}

TEST(ChainKeysTest, CountsFullBlocksOnly) {
  const PageKey root = NamespaceKey("model", 7, "rope", "");
  EXPECT_EQ(ChainKeys(root, Tokens(0)).size(), 0u);
  EXPECT_EQ(ChainKeys(root, Tokens(63)).size(), 0u);
  EXPECT_EQ(ChainKeys(root, Tokens(64)).size(), 1u);
  EXPECT_EQ(ChainKeys(root, Tokens(127)).size(), 1u);
  EXPECT_EQ(ChainKeys(root, Tokens(128)).size(), 2u);
}

TEST(PageKeyTest, GoesThroughBytes) {
  const PageKey key = NamespaceKey("model", 7, "rope", "salt");
  ASSERT_OK_AND_ASSIGN(const PageKey back, PageKey::FromBytes(key.ToBytes()));
  EXPECT_EQ(back, key);
  EXPECT_THAT(PageKey::FromBytes("short"),
              StatusIs(absl::StatusCode::kInvalidArgument, "5 bytes: must have 16"));
}

}  // namespace
}  // namespace nosara::kvstore
