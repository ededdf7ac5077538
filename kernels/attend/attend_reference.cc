#include "kernels/attend/attend_reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

/// Copies the missing records of a (row, KV head) to their slots.
void FetchMissing(const AttendParams& params, int row, int head) {
  const CacheView& cache = params.cache;
  const int64_t pair = int64_t{row} * params.num_kv_heads + head;
  const int64_t bytes = RecordBytes(cache.head_dim);
  for (int i = params.ranges[pair].x; i < params.ranges[pair].y; ++i) {
    const int64_t entry = pair * params.max_selected + i;
    const uint64_t page = cache.pages[int64_t{params.rows_info[row].sequence} * cache.max_blocks +
                                      params.blocks[entry]];
    const int record = params.layer * params.num_kv_heads + head;
    std::memcpy(cache.Slot(params.slots[entry]),
                reinterpret_cast<const std::byte*>(page) + record * bytes, bytes);
  }
}

struct Token {
  float logit;
  const __nv_bfloat16* value;
};

/// The visible tokens of a list, with their logits for `q`.
std::vector<Token> Tokens(const AttendParams& params, int row, int64_t pair,
                          const __nv_bfloat16* q) {
  const int D = params.cache.head_dim;
  std::vector<Token> tokens;
  for (int i = 0; i < params.ranges[pair].y; ++i) {
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

void AttendHead(const std::vector<Token>& tokens, int head_dim, __nv_bfloat16* out) {
  float m = -std::numeric_limits<float>::infinity();
  for (const Token& token : tokens) m = std::max(m, token.logit);
  double z = 0;
  std::vector<double> o(head_dim, 0.0);
  for (const Token& token : tokens) {
    const float p = std::exp(token.logit - m);
    const float rounded = __bfloat162float(__float2bfloat16_rn(p));
    z += p;
    for (int d = 0; d < head_dim; ++d) o[d] += double{rounded} * __bfloat162float(token.value[d]);
  }
  for (int d = 0; d < head_dim; ++d) out[d] = __float2bfloat16_rn(static_cast<float>(o[d] / z));
}

}  // namespace

void AttendReference(const AttendParams& params) {
  const int D = params.cache.head_dim;
  const int G = params.num_heads / params.num_kv_heads;
  for (int r = 0; r < params.rows; ++r) {
    const int64_t first_head = int64_t{r} * params.num_heads;
    if (params.rows_info[r].sequence < 0) {
      std::fill_n(params.out + first_head * D, int64_t{params.num_heads} * D,
                  __float2bfloat16_rn(0.0f));
      continue;
    }
    for (int h = 0; h < params.num_kv_heads; ++h) {
      if (params.missing != AttendMissing::kInSlots) FetchMissing(params, r, h);
      for (int64_t head = first_head + h * G; head < first_head + (h + 1) * G; ++head) {
        const int64_t pair = int64_t{r} * params.num_kv_heads + h;
        AttendHead(Tokens(params, r, pair, params.q + head * D), D, params.out + head * D);
      }
    }
  }
}

}  // namespace nosara::kernels
