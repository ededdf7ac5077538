// The operation of kernels/attend/attend.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/attend/attend.h"

namespace nosara::kernels {

/// As LaunchAttend with the same parameters, all pointers being host pointers. The list is attended
/// to as a whole: how a kernel shares it is its own affair, and the scratch is left as it is.
void AttendReference(const AttendParams& params);

}  // namespace nosara::kernels
