// The operation of kernels/pages/pages.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/pages/pages.h"

namespace nosara::kernels {

/// As the launch functions of the same parameters, all pointers being host pointers.
void ExportReference(const ExportParams& params);
void ImportIndexReference(const ExportParams& params);
void ShrinkReference(const ShrinkParams& params);

}  // namespace nosara::kernels
