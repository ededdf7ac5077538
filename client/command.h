// What the subcommands of `nosara` have in common.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/flags.h"

namespace nosara::client {

/// How `nosara` exits.
enum ExitCode {
  kExitOk = 0,
  kExitFailed = 1,       // the request was refused or failed
  kExitUsage = 2,        // wrong flags or arguments
  kExitUnavailable = 3,  // no server, no worker, or no room now: the same command may work later
};

inline constexpr absl::string_view kDefaultAddress = "127.0.0.1:50050";

/// A subcommand.
struct Command {
  std::string name;
  std::string summary;  // one line
  std::function<int(const std::vector<std::string>& args)> run;
};

/// All subcommands, in the order of the help.
std::vector<Command> AllCommands();

/// The beginning of every subcommand: parses `args`. An exit code means: leave now (help was
/// shown, or the flags are wrong and that was said). `usage` is what --help shows above the flags.
/// At most `max_positional` arguments that are no flags are allowed; they go to `positional`.
std::optional<int> ParseFlags(const FlagSet& flags, absl::string_view usage,
                              const std::vector<std::string>& args, size_t max_positional,
                              std::vector<std::string>* positional);

/// Adds --address (also --router) with its default.
void AddAddressFlag(FlagSet* flags, std::string* address);

/// Says on stderr what went wrong and, where there is something to do, what; the exit code.
int Report(const absl::Status& status);

/// The content of a file; "-": of stdin. NOT_FOUND names the file.
absl::StatusOr<std::string> ReadText(const std::string& path);

}  // namespace nosara::client
