// The operation of kernels/sample/sample.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/sample/sample.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void SampleReference(const SampleParams& params);

}  // namespace nosara::kernels
