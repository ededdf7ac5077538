#include "client/command.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/retry_delay.h"
#include "client/client.h"

namespace nosara::client {

std::optional<int> ParseFlags(const FlagSet& flags, absl::string_view usage,
                              const std::vector<std::string>& args, size_t max_positional,
                              std::vector<std::string>* positional) {
  const auto wants_help = [](const std::string& arg) { return arg == "--help" || arg == "-h"; };
  if (std::any_of(args.begin(), args.end(), wants_help)) {
    std::cout << usage << "\nFlags:\n"
              << flags.Help()
              << "\nExit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no server, worker or "
                 "room now.\n";
    return kExitOk;
  }
  auto parsed = flags.Parse(args);
  if (parsed.ok() && parsed->size() > max_positional) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("argument '", (*parsed)[max_positional], "' is not expected; see --help"));
  }
  if (!parsed.ok()) {
    std::cerr << "nosara: " << parsed.status().message() << "\n";
    return kExitUsage;
  }
  if (positional != nullptr) *positional = *std::move(parsed);
  return std::nullopt;
}

void AddAddressFlag(FlagSet* flags, std::string* address) {
  flags->Add("address", address, "host:port of the router (also --router)");
  flags->AddAlias("router", "address");
}

int Report(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  std::cerr << "nosara: " << status.message() << " [" << absl::StatusCodeToString(status.code())
            << "]\n";
  if (IsNoServer(status)) {
    std::cerr << "Start one with `nosara serve`, or name one with --address=host:port.\n";
  }
  if (const auto delay = RetryDelay(status)) {
    std::cerr << "Try again in " << absl::FormatDuration(*delay) << ".\n";
  }
  const bool later = absl::IsUnavailable(status) || absl::IsResourceExhausted(status);
  return later ? kExitUnavailable : kExitFailed;
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  if (path == "-") {
    return std::string(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string text;
  if (file) text.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (!file || file.bad()) {
    return absl::NotFoundError(
        absl::StrCat("cannot read '", path, "': ", std::generic_category().message(errno)));
  }
  return text;
}

}  // namespace nosara::client
