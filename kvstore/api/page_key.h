// Content addresses of KV pages: a chain of hashes over the tokens of a sequence.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace nosara::kvstore {

/// Tokens of one full page; the block size P of the NOSA attention.
inline constexpr int kBlockTokens = 64;

/// 128 bits of SHA-256. Equal keys mean: same namespace, same tokens from position 0 up to and
/// including this block.
struct PageKey {
  std::array<uint8_t, 16> bytes{};

  friend bool operator==(const PageKey& a, const PageKey& b) { return a.bytes == b.bytes; }
  friend bool operator!=(const PageKey& a, const PageKey& b) { return !(a == b); }
  template <typename H>
  friend H AbslHashValue(H h, const PageKey& key) {
    return H::combine(std::move(h), key.bytes);
  }

  /// The 16 raw bytes, as carried in the protos.
  std::string ToBytes() const;
  /// INVALID_ARGUMENT unless `bytes` has 16 bytes.
  static absl::StatusOr<PageKey> FromBytes(absl::string_view bytes);
  /// 32 hexadecimal digits, for logs.
  std::string ToHex() const;
};

/// The root of every chain of one (model, page layout, RoPE settings, tenant): pages of different
/// namespaces never have equal keys, so no tenant can probe another's cache.
///
/// `model_fingerprint`: worker::Checkpoint::fingerprint(). `layout_fingerprint`:
/// PageLayout::fingerprint(). `tenant_salt`: secret of the tenant; empty = shared by all who use
/// the empty salt.
PageKey NamespaceKey(absl::string_view model_fingerprint, uint64_t layout_fingerprint,
                     absl::string_view rope_settings, absl::string_view tenant_salt);

/// SHA-256(parent || 64 token ids as little-endian int32), truncated to 128 bits; the first
/// block's parent is the namespace key. Precondition: `tokens.size() == kBlockTokens`.
PageKey ChildKey(const PageKey& parent, absl::Span<const int32_t> tokens);

/// The keys of all full blocks of `tokens`, in order: `tokens.size() / 64` keys.
std::vector<PageKey> ChainKeys(const PageKey& namespace_key, absl::Span<const int32_t> tokens);

}  // namespace nosara::kvstore
