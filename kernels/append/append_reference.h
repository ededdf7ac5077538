// The operation of kernels/append/append.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/append/append.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void AppendReference(const AppendParams& params);

}  // namespace nosara::kernels
