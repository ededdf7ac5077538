// The operation of kernels/score/score.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/score/score.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void ScoreReference(const ScoreParams& params);

}  // namespace nosara::kernels
