#include "kernels/sample/sample_reference.h"

#include <cmath>
#include <limits>

namespace nosara::kernels {

void ArgMaxReference(const ArgMaxParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    const float* logits = params.logits + int64_t{r} * params.vocab;
    float best = -std::numeric_limits<float>::infinity();
    params.token[r] = 0;
    for (int i = 0; i < params.vocab; ++i) {
      if (!std::isnan(logits[i]) && logits[i] > best) {
        best = logits[i];
        params.token[r] = i;
      }
    }
  }
}

}  // namespace nosara::kernels
