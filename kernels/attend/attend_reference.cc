#include "kernels/attend/attend_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Token {
  float logit;
  const __nv_bfloat16* value;
};

/// The visible tokens of entries first .. end - 1 of a list, with their logits for `q`.
std::vector<Token> Tokens(const AttendParams& params, int row, int64_t pair, const __nv_bfloat16* q,
                          int first, int end) {
  const int D = params.cache.head_dim;
  std::vector<Token> tokens;
  for (int i = first; i < end; ++i) {
    std::byte* slot = params.cache.Slot(params.slots[pair * params.max_selected + i]);
    const int start = params.blocks[pair * params.max_selected + i] * kBlockTokens;
    for (int j = 0; j < kBlockTokens && start + j <= params.rows_info[row].position; ++j) {
      const __nv_bfloat16* key = RecordKey(slot, D, j);
      double dot = 0;
      for (int d = 0; d < D; ++d) dot += double{__bfloat162float(q[d])} * __bfloat162float(key[d]);
      double logit = dot / std::sqrt(double(D));
      if (params.bias == AttendBias::kCache) logit += RecordBias(slot, D)[j];
      tokens.push_back({static_cast<float>(logit), RecordValue(slot, D, j)});
    }
  }
  return tokens;
}

}  // namespace

void AttendReference(const AttendParams& params) {
  const int D = params.cache.head_dim;
  const int Hkv = params.num_kv_heads;
  const int G = params.num_heads / Hkv;
  for (int r = 0; r < params.rows; ++r) {
    if (params.rows_info[r].sequence < 0) continue;
    for (int h = 0; h < Hkv; ++h) {
      const int64_t pair = int64_t{r} * Hkv + h;
      const int2 range = params.ranges[pair];
      const int begin = params.part == AttendPart::kResident ? 0 : range.x;
      const int end = params.part == AttendPart::kResident ? range.x : range.y;
      const int share = (end - begin + params.num_splits - 1) / params.num_splits;
      for (int s = 0; s < params.num_splits; ++s) {
        const int first = std::min(end, begin + s * share);
        const int last = std::min(end, first + share);
        for (int g = 0; g < G; ++g) {
          const __nv_bfloat16* q = params.q + (int64_t{r} * params.num_heads + h * G + g) * D;
          const std::vector<Token> tokens = Tokens(params, r, pair, q, first, last);
          const int64_t partial = (pair * params.total_splits + params.first_split + s) * G + g;
          float m = -kInfinity;
          for (const Token& token : tokens) m = std::max(m, token.logit);
          double z = 0;
          std::vector<double> o(D, 0.0);
          for (const Token& token : tokens) {
            const float p = std::exp(token.logit - m);
            const float rounded = __bfloat162float(__float2bfloat16_rn(p));
            z += p;
            for (int d = 0; d < D; ++d) o[d] += double{rounded} * __bfloat162float(token.value[d]);
          }
          params.partial_mz[partial] = make_float2(m, static_cast<float>(z));
          for (int d = 0; d < D; ++d) params.partial_o[partial * D + d] = static_cast<float>(o[d]);
        }
      }
    }
  }
}

void MergeReference(const MergeParams& params) {
  const int D = params.head_dim;
  const int G = params.num_heads / params.num_kv_heads;
  for (int r = 0; r < params.rows; ++r) {
    for (int head = 0; head < params.num_heads; ++head) {
      __nv_bfloat16* out = params.out + (int64_t{r} * params.num_heads + head) * D;
      const int64_t pair = int64_t{r} * params.num_kv_heads + head / G;
      const auto partial = [&](int s) { return (pair * params.total_splits + s) * G + head % G; };
      double z = 0;
      std::vector<double> o(D, 0.0);
      if (params.rows_info[r].sequence >= 0) {
        float max = -kInfinity;
        for (int s = 0; s < params.total_splits; ++s) {
          max = std::max(max, params.partial_mz[partial(s)].x);
        }
        for (int s = 0; s < params.total_splits; ++s) {
          const float2 mz = params.partial_mz[partial(s)];
          if (mz.x == -kInfinity) continue;  // an empty share; exp(-inf - -inf) would be NaN
          const double weight = std::exp(double{mz.x} - max);
          z += weight * mz.y;
          for (int d = 0; d < D; ++d) o[d] += weight * params.partial_o[partial(s) * D + d];
        }
      }
      for (int d = 0; d < D; ++d) {
        out[d] = __float2bfloat16_rn(z > 0 ? static_cast<float>(o[d] / z) : 0.0f);
      }
    }
  }
}

}  // namespace nosara::kernels
