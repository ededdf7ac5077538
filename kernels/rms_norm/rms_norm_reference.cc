#include "kernels/rms_norm/rms_norm_reference.h"

#include <cmath>

namespace nosara::kernels {

void RmsNormReference(const RmsNormParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    const int64_t from = params.source != nullptr ? params.source[r] : r;
    float* hidden = params.hidden + from * params.width;
    if (params.addend != nullptr) {
      const float* addend = params.addend + from * params.width;
      for (int i = 0; i < params.width; ++i) hidden[i] += addend[i];
    }
    double squares = 0;
    for (int i = 0; i < params.width; ++i) squares += double{hidden[i]} * hidden[i];
    const double scale = 1 / std::sqrt(squares / params.width + params.eps);
    __nv_bfloat16* out = params.out + int64_t{r} * params.width;
    for (int i = 0; i < params.width; ++i) {
      out[i] = __float2bfloat16_rn(static_cast<float>(hidden[i] * scale * params.weight[i]));
    }
  }
}

}  // namespace nosara::kernels
