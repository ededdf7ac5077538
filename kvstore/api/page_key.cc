#include "kvstore/api/page_key.h"

#include <openssl/evp.h>

#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nosara::kvstore {
namespace {

PageKey Truncate(const unsigned char (&digest)[EVP_MAX_MD_SIZE]) {
  PageKey key;
  std::memcpy(key.bytes.data(), digest, key.bytes.size());
  return key;
}

PageKey Sha256(absl::string_view bytes) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  CHECK(EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr) == 1);
  return Truncate(digest);
}

void AppendSized(std::string& out, absl::string_view part) {
  const uint64_t size = part.size();
  out.append(reinterpret_cast<const char*>(&size), sizeof(size));
  out.append(part.data(), part.size());
}

}  // namespace

std::string PageKey::ToBytes() const {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

absl::StatusOr<PageKey> PageKey::FromBytes(absl::string_view bytes) {
  PageKey key;
  if (bytes.size() != key.bytes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("page key of ", bytes.size(), " bytes: must have 16"));
  }
  std::memcpy(key.bytes.data(), bytes.data(), bytes.size());
  return key;
}

std::string PageKey::ToHex() const { return absl::BytesToHexString(ToBytes()); }

PageKey NamespaceKey(absl::string_view model_fingerprint, uint64_t layout_fingerprint,
                     absl::string_view rope_settings, absl::string_view tenant_salt) {
  // Every part carries its length, so that no two different lists of parts give the same bytes.
  std::string bytes;
  AppendSized(bytes, "nosara.page.v1");
  AppendSized(bytes, model_fingerprint);
  AppendSized(bytes, absl::StrCat(layout_fingerprint));
  AppendSized(bytes, rope_settings);
  AppendSized(bytes, tenant_salt);
  return Sha256(bytes);
}

PageKey ChildKey(const PageKey& parent, absl::Span<const int32_t> tokens) {
  CHECK(tokens.size() == kBlockTokens);
  unsigned char bytes[sizeof(PageKey) + kBlockTokens * sizeof(int32_t)];
  std::memcpy(bytes, parent.bytes.data(), sizeof(PageKey));
  std::memcpy(bytes + sizeof(PageKey), tokens.data(), kBlockTokens * sizeof(int32_t));
  return Sha256(absl::string_view(reinterpret_cast<const char*>(bytes), sizeof(bytes)));
}

std::vector<PageKey> ChainKeys(const PageKey& namespace_key, absl::Span<const int32_t> tokens) {
  std::vector<PageKey> keys;
  keys.reserve(tokens.size() / kBlockTokens);
  PageKey parent = namespace_key;
  for (size_t begin = 0; begin + kBlockTokens <= tokens.size(); begin += kBlockTokens) {
    parent = ChildKey(parent, tokens.subspan(begin, kBlockTokens));
    keys.push_back(parent);
  }
  return keys;
}

}  // namespace nosara::kvstore
