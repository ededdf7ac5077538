// The operation of kernels/resolve/resolve.h on the host: plain loops, for tests and benchmarks.
#pragma once

#include "kernels/resolve/resolve.h"

namespace nosara::kernels {

/// As the launch functions of the same parameters, all pointers being host pointers. Missing blocks
/// take slots in the order of the selection, and the first free slot where there is one.
void ResolveReference(const ResolveParams& params);
void ResolveChunksReference(const ResolveParams& params);
void OpenBlocksReference(const OpenBlocksParams& params);

}  // namespace nosara::kernels
