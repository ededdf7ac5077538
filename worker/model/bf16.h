// bfloat16: the upper half of an IEEE binary32.
//
// All loops are plain, without branches that depend on the data, so that the compiler vectorizes
// them. Thread-safe (pure functions).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "base/check.h"

namespace nosara::worker {

/// One bfloat16 as it lies in a file or a cache; arithmetic is done in float.
struct Bf16 {
  uint16_t bits = 0;

  friend bool operator==(Bf16 a, Bf16 b) { return a.bits == b.bits; }
};
static_assert(sizeof(Bf16) == 2);

/// Exact.
inline float ToFloat(Bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

/// Rounds to nearest, ties to even; what is beyond the largest finite bf16 becomes infinite; a NaN
/// stays a NaN of the same sign (quiet).
inline Bf16 FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // The rounding carry could turn a NaN into an infinity or a zero: it is replaced, not rounded.
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return Bf16{static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

/// `value` as it reads after being stored as bf16.
inline float RoundToBf16(float value) { return ToFloat(FromFloat(value)); }

/// Converts in[i] to out[i]. Precondition: equal sizes; the spans do not overlap.
inline void ToFloat(absl::Span<const Bf16> in, absl::Span<float> out) {
  CHECK(in.size() == out.size());
  const Bf16* from = in.data();
  float* to = out.data();
  for (size_t i = 0, n = in.size(); i < n; ++i) to[i] = ToFloat(from[i]);
}

/// Rounds in[i] to out[i]. Precondition: equal sizes; the spans do not overlap.
inline void FromFloat(absl::Span<const float> in, absl::Span<Bf16> out) {
  CHECK(in.size() == out.size());
  const float* from = in.data();
  Bf16* to = out.data();
  for (size_t i = 0, n = in.size(); i < n; ++i) to[i] = FromFloat(from[i]);
}

/// Rounds every value to bf16 in place, keeping float storage.
inline void RoundToBf16(absl::Span<float> values) {
  float* data = values.data();
  for (size_t i = 0, n = values.size(); i < n; ++i) data[i] = RoundToBf16(data[i]);
}

}  // namespace nosara::worker
