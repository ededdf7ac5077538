// The main function that our programs share: flags, --help, --version, exit status.
#pragma once

#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"

namespace nosara {

/// What a program says of itself.
struct ProgramInfo {
  std::string name;
  /// Shown by --help, above the flags.
  std::string usage;
  /// The source file whose flags --help lists, by its path in the source tree: "router/main.cc".
  std::string main_file;
};

/// Parses the flags (absl/flags), then calls `run`. The exit status: 0, or 1 when the flags are
/// wrong or `run` failed, with the reason on stderr. Call once, from main.
int RunProgram(int argc, char** argv, const ProgramInfo& info,
               absl::FunctionRef<absl::Status()> run);

}  // namespace nosara
