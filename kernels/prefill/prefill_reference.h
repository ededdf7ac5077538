// The operation of kernels/prefill/prefill.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/prefill/prefill.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void PrefillReference(const PrefillParams& params);

}  // namespace nosara::kernels
