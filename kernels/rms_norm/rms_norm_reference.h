// The operation of kernels/rms_norm/rms_norm.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include <cstdint>

#include "kernels/rms_norm/rms_norm.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void RmsNormReference(const RmsNormParams& params);

}  // namespace nosara::kernels
