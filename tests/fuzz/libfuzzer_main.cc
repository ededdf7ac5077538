// libFuzzer's entry for one target; the build names it in NOSARA_FUZZ_TARGET.
#include <cstddef>
#include <cstdint>

#include "tests/fuzz/fuzz_targets.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nosara::fuzz::NOSARA_FUZZ_TARGET({data, size});
  return 0;
}
