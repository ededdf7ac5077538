#include "kernels/prefill/prefill_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

/// The attention of one query head, in two passes.
void AttendHead(const PrefillParams& params, int row, int head, const __nv_bfloat16* q,
                __nv_bfloat16* out) {
  const CacheView& cache = params.cache;
  const int D = cache.head_dim;
  const StepRow info = params.rows_info[row];
  const int64_t pair = int64_t{row} * params.num_kv_heads + head;
  const int record = params.layer * params.num_kv_heads + head;
  std::vector<double> logits;
  std::vector<const __nv_bfloat16*> values;
  double max = -std::numeric_limits<double>::infinity();
  for (int i = 0; i < params.count[pair]; ++i) {
    const int block = params.selected[pair * params.max_selected + i];
    std::byte* slot = cache.Slot(cache.SlotOf(info.sequence, record, block));
    for (int j = 0; j < kBlockTokens && block * kBlockTokens + j <= info.position; ++j) {
      const __nv_bfloat16* key = RecordKey(slot, D, j);
      double logit = 0;
      for (int d = 0; d < D; ++d) {
        logit += double{__bfloat162float(q[d])} * __bfloat162float(key[d]);
      }
      logit /= std::sqrt(double(D));
      if (params.bias == AttendBias::kCache) logit += RecordBias(slot, D)[j];
      logits.push_back(logit);
      values.push_back(RecordValue(slot, D, j));
      max = std::max(max, logit);
    }
  }
  double z = 0;
  std::vector<double> o(D, 0.0);
  for (size_t j = 0; j < logits.size(); ++j) {
    const double p = std::exp(logits[j] - max);
    z += p;
    for (int d = 0; d < D; ++d) o[d] += p * __bfloat162float(values[j][d]);
  }
  for (int d = 0; d < D; ++d) {
    out[d] = __float2bfloat16_rn(z > 0 ? static_cast<float>(o[d] / z) : 0.0f);
  }
}

}  // namespace

void PrefillReference(const PrefillParams& params) {
  const int D = params.cache.head_dim;
  const int G = params.num_heads / params.num_kv_heads;
  for (int i = 0; i < params.num_tiles; ++i) {
    for (int r = 0; r < params.tiles[i].rows; ++r) {
      const int row = params.tiles[i].first_row + r;
      if (params.rows_info[row].sequence < 0) continue;
      for (int head = 0; head < params.num_heads; ++head) {
        const int64_t offset = (int64_t{row} * params.num_heads + head) * D;
        AttendHead(params, row, head / G, params.q + offset, params.out + offset);
      }
    }
  }
}

}  // namespace nosara::kernels
