// The operation of kernels/embed/embed.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/embed/embed.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void EmbedReference(const EmbedParams& params);

}  // namespace nosara::kernels
