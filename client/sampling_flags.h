// The flags of `nosara generate` and `nosara chat` that say how to sample.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/flags.h"
#include "nosara/inference/v1/inference.pb.h"

namespace nosara::client {

/// Values of the flags. Ranges are checked by the router, which names them in its errors.
struct SamplingFlags {
  std::string model;
  std::optional<uint32_t> max_tokens;
  std::optional<float> temperature;
  std::optional<uint32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> presence_penalty;
  std::optional<float> frequency_penalty;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;

  /// This object must outlive `flags`.
  void AddTo(FlagSet* flags);
  /// Sets what was given.
  void Fill(inference::v1::GenerateRequest* request) const;
};

}  // namespace nosara::client
