#include "kernels/swiglu/swiglu_reference.h"

#include <cmath>

namespace nosara::kernels {

void SwiGluReference(const SwiGluParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    const float* gate = params.gate_up + int64_t{2} * r * params.width;
    const float* up = gate + params.width;
    __nv_bfloat16* out = params.out + int64_t{r} * params.width;
    for (int i = 0; i < params.width; ++i) {
      out[i] = __float2bfloat16_rn(gate[i] / (1 + std::exp(-gate[i])) * up[i]);
    }
  }
}

}  // namespace nosara::kernels
