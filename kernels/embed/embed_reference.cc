#include "kernels/embed/embed_reference.h"

#include <algorithm>
#include <cmath>

namespace nosara::kernels {

void EmbedReference(const EmbedParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    float* hidden = params.hidden + int64_t{r} * params.width;
    float* cosine = params.cosine + int64_t{r} * params.half;
    float* sine = params.sine + int64_t{r} * params.half;
    if (params.rows_info[r].sequence < 0) {
      std::fill(hidden, hidden + params.width, 0.0f);
      std::fill(cosine, cosine + params.half, 0.0f);
      std::fill(sine, sine + params.half, 0.0f);
      continue;
    }
    const __nv_bfloat16* row = params.table + int64_t{params.tokens[r]} * params.width;
    for (int i = 0; i < params.width; ++i) hidden[i] = __bfloat162float(row[i]);
    for (int i = 0; i < params.half; ++i) {
      const double angle = params.rows_info[r].position * params.inverse_frequencies[i];
      cosine[i] = static_cast<float>(std::cos(angle));
      sine[i] = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace nosara::kernels
