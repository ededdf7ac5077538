// The operation of kernels/gather/gather.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/gather/gather.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void GatherReference(const GatherParams& params);

}  // namespace nosara::kernels
