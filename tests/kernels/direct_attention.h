// Attention as its formula says, in f64: what the kernels are measured against.
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/attend/attend.h"
#include "kernels/common/record_reference.h"
#include "tests/kernels/kernel_test.h"

namespace nosara::kernels {

struct DirectAttention {
  std::vector<double> output;  // sum p v, [D]
  std::vector<double> size;    // sum p |v|, [D]: what rounded probabilities err in proportion to
};

/// nosa.md section 5 for one query head at position t, over the tokens j <= t of `blocks`, each a
/// (record on the host, block number).
inline DirectAttention AttendDirectly(const __nv_bfloat16* q, int head_dim, int t, AttendBias bias,
                                      const std::vector<std::pair<std::byte*, int>>& blocks) {
  std::vector<double> logits;
  std::vector<const __nv_bfloat16*> values;
  double max = -std::numeric_limits<double>::infinity();
  for (const auto& [record, block] : blocks) {
    for (int j = 0; j < kBlockTokens && block * kBlockTokens + j <= t; ++j) {
      const __nv_bfloat16* key = RecordKey(record, head_dim, j);
      double dot = 0;
      for (int d = 0; d < head_dim; ++d) dot += double{ToFloat(q[d])} * ToFloat(key[d]);
      dot /= std::sqrt(double(head_dim));
      if (bias == AttendBias::kCache) dot += RecordBias(record, head_dim)[j];
      logits.push_back(dot);
      values.push_back(RecordValue(record, head_dim, j));
      max = std::max(max, dot);
    }
  }
  DirectAttention result{std::vector<double>(head_dim), std::vector<double>(head_dim)};
  double z = 0;
  for (const double logit : logits) z += std::exp(logit - max);
  for (size_t j = 0; j < logits.size(); ++j) {
    const double p = std::exp(logits[j] - max) / z;
    for (int d = 0; d < head_dim; ++d) {
      const double v = ToFloat(values[j][d]);
      result.output[d] += p * v;
      result.size[d] += p * std::abs(v);
    }
  }
  return result;
}

/// Probabilities rounded to bf16 (each off by 2^-8 of itself at most), f32 sums and fast exp.
inline double AttentionTolerance(double size) { return (1.05 * kBf16Step / 2 + 2e-5) * size; }
/// And the output rounded to bf16.
inline double RoundedAttentionTolerance(double output, double size) {
  return AttentionTolerance(size) + 1.01 * kBf16Step / 2 * std::abs(output) + 1e-30;
}

}  // namespace nosara::kernels
