// The operation of kernels/windows/windows.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/windows/windows.h"

namespace nosara::kernels {

/// As the launch function of the same parameters, all pointers being host pointers.
void WindowsReference(const WindowsParams& params);

}  // namespace nosara::kernels
