// The operation of kernels/attend/attend.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/attend/attend.h"

namespace nosara::kernels {

/// As the launch functions of the same parameters, all pointers being host pointers. The reference
/// of attention takes contiguous shares of equal size; how a kernel shares a list is its own
/// affair.
void AttendReference(const AttendParams& params);
void MergeReference(const MergeParams& params);

}  // namespace nosara::kernels
