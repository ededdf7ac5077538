#include "base/program.h"

#include <iostream>
#include <vector>

#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace nosara {

int RunProgram(int argc, char** argv, const ProgramInfo& info,
               absl::FunctionRef<absl::Status()> run) {
  absl::SetProgramUsageMessage(info.usage);
  absl::FlagsUsageConfig config;
  config.version_string = [name = info.name] {
    return absl::StrCat(name, " ", NOSARA_VERSION, "\n");
  };
  // The path within the source tree, not where it lay when it was built.
  config.normalize_filename = [main_file = info.main_file](absl::string_view file) {
    return absl::EndsWith(file, main_file) ? main_file : std::string(file);
  };
  config.contains_help_flags = [main_file = info.main_file](absl::string_view file) {
    return file == main_file;
  };
  absl::SetFlagsUsageConfig(config);
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  const absl::Status status = rest.size() > 1
                                  ? absl::InvalidArgumentError(absl::StrCat(
                                        "unknown argument '", rest[1], "'; flags begin with --"))
                                  : run();
  if (status.ok()) return 0;
  std::cerr << info.name << ": " << status.message() << "\n";
  return 1;
}

}  // namespace nosara
