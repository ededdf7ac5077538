#include "kernels/append/append_reference.h"

#include <cmath>
#include <vector>

#include "kernels/common/record_reference.h"

namespace nosara::kernels {
namespace {

/// log(1 + exp(x)) without overflow.
double SoftPlus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

/// One head through RoPE: element i turns with element i + D/2. Rounded to bf16.
void Rotate(const float* x, const float* cosine, const float* sine, int head_dim,
            __nv_bfloat16* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    out[i] = __float2bfloat16_rn(x[i] * cosine[i] - x[i + half] * sine[i]);
    out[i + half] = __float2bfloat16_rn(x[i + half] * cosine[i] + x[i] * sine[i]);
  }
}

}  // namespace

void AppendReference(const AppendParams& params) {
  const int D = params.cache.head_dim;
  const int Hq = params.num_heads;
  const int Hkv = params.num_kv_heads;
  const int width = (Hq + 2 * Hkv) * D;
  std::vector<float> x(width);
  for (int r = 0; r < params.rows; ++r) {
    const StepRow info = params.rows_info[r];
    if (info.sequence < 0) continue;
    for (int i = 0; i < width; ++i) {
      x[i] = params.qkv[int64_t{r} * width + i] + (params.bias != nullptr ? params.bias[i] : 0.0f);
    }
    const float* cosine = params.cosine + int64_t{r} * (D / 2);
    const float* sine = params.sine + int64_t{r} * (D / 2);
    for (int h = 0; h < Hq; ++h) {
      Rotate(&x[h * D], cosine, sine, D, params.q + (int64_t{r} * Hq + h) * D);
    }
    const float* v = &x[(Hq + Hkv) * D];
    const int block = info.position / kBlockTokens;
    const int token = info.position % kBlockTokens;
    for (int h = 0; h < Hkv; ++h) {
      const int record = params.layer * Hkv + h;
      std::byte* slot = params.cache.Slot(params.cache.SlotOf(info.sequence, record, block));
      Rotate(&x[(Hq + h) * D], cosine, sine, D, RecordKey(slot, D, token));
      __nv_bfloat16* value = RecordValue(slot, D, token);
      for (int i = 0; i < D; ++i) value[i] = __float2bfloat16_rn(v[h * D + i]);
      double c = 0;
      if (params.A != nullptr) {
        double sum = params.delta_bias != nullptr ? params.delta_bias[h] : 0.0;
        for (int j = 0; j < Hkv * D; ++j) {
          sum += double{params.delta[int64_t{h} * Hkv * D + j]} * v[j];
        }
        c = params.A[h] * SoftPlus(sum);
      }
      RecordBias(slot, D)[token] = static_cast<float>(c);
    }
  }
}

}  // namespace nosara::kernels
