#include "kernels/sample/sample_reference.h"

namespace nosara::kernels {

void SampleReference(const SampleParams& params) {
  for (int r = 0; r < params.rows; ++r) {
    params.token[r] =
        DrawToken(params.logits + int64_t{r} * params.vocab, params.vocab, params.draw[r]);
  }
}

}  // namespace nosara::kernels
