// The operation of kernels/swiglu/swiglu.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/swiglu/swiglu.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void SwiGluReference(const SwiGluParams& params);

}  // namespace nosara::kernels
