// The entry functions of the fuzzers. Each takes any bytes and must neither crash nor break the
// contract of what it calls (checked with CHECK). They run in two ways: as libFuzzer targets
// (NOSARA_FUZZ=ON, clang), and over mutations of a small corpus in fuzz_test, with any compiler.
#pragma once

#include <cstdint>

#include "absl/types/span.h"

namespace nosara::fuzz {

/// The bytes are a whole safetensors file.
void SafetensorsHeaderTarget(absl::Span<const uint8_t> input);

/// The bytes are a config.json.
void ConfigTarget(absl::Span<const uint8_t> input);

/// The bytes are cut into stop strings, a text and the places where the stream is cut; UTF-8
/// assembly and stop matching must not depend on the cuts.
void TextTarget(absl::Span<const uint8_t> input);

/// The bytes choose calls to the control plane of a small store, spell out some of the messages and
/// the fields of others. Whatever comes, the store answers with a documented code, and its index
/// stays intact.
void KvStoreControlTarget(absl::Span<const uint8_t> input);

}  // namespace nosara::fuzz
