// Where things lie in the one block that a step gets, and in the one that it gives back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/cache_view.h"
#include "kernels/sample/draw.h"

namespace nosara::worker::step_layout {

// Offsets in the input: the stamp of the step, then arrays of max_rows, the widest elements first.
inline constexpr size_t kDrawsOffset = 16;

inline size_t RowsOffset(int rows) { return kDrawsOffset + rows * sizeof(kernels::DrawParams); }
inline size_t TokensOffset(int rows) { return RowsOffset(rows) + rows * sizeof(kernels::StepRow); }
inline size_t ScoreTilesOffset(int rows) { return TokensOffset(rows) + rows * sizeof(int32_t); }
inline size_t TilesOffset(int rows) {
  return ScoreTilesOffset(rows) + rows * sizeof(kernels::RowTile);
}
inline size_t SourceOffset(int rows) { return TilesOffset(rows) + rows * sizeof(kernels::RowTile); }
inline size_t InputBytes(int rows) { return SourceOffset(rows) + rows * sizeof(int32_t); }

// Offsets in the output, in ints: tokens [max_rows], failures, one unused, totals [max_rows, 2].
inline size_t FailuresOffset(int rows) { return rows; }
inline size_t TotalsOffset(int rows) { return rows + 2; }
inline size_t OutputInts(int rows) { return TotalsOffset(rows) + 2 * static_cast<size_t>(rows); }

/// Windows of a row of scores: those of so many blocks, in whole tiles.
inline int WindowsFor(int blocks) {
  return (4 * blocks + kernels::kIndexWindows - 1) / kernels::kIndexWindows *
         kernels::kIndexWindows;
}

}  // namespace nosara::worker::step_layout
