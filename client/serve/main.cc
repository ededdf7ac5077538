// nosara: everything a user does with Nosara, as subcommands.
#include <csignal>
#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "client/chat.h"
#include "client/command.h"
#include "client/generate.h"
#include "client/inspect.h"
#include "client/serve/serve.h"
#include "client/store.h"

namespace nosara::client {

std::vector<Command> AllCommands() {
  return {ServeCommand(),  GenerateCommand(), ChatCommand(),
          ModelsCommand(), TokenizeCommand(), StoreCommand()};
}

namespace {

void PrintHelp(std::ostream& out) {
  out << "nosara: text from NOSA models.\n"
         "Usage: nosara COMMAND [--flag=value ...]\n\n";
  for (const Command& command : AllCommands()) {
    out << absl::StrFormat("  %-10s %s\n", command.name, command.summary);
  }
  out << "\n`nosara COMMAND --help` shows the flags of a command; --version the version.\n"
         "Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no server, worker or room "
         "now.\n";
}

int Main(const std::vector<std::string>& args) {
  // A reader that goes away shows as a failed write.
  std::signal(SIGPIPE, SIG_IGN);
  if (args.empty()) {
    PrintHelp(std::cerr);
    return kExitUsage;
  }
  const std::string& name = args.front();
  if (name == "--help" || name == "-h" || name == "help") {
    PrintHelp(std::cout);
    return kExitOk;
  }
  if (name == "--version") {
    std::cout << "nosara " NOSARA_VERSION "\n";
    return kExitOk;
  }
  for (const Command& command : AllCommands()) {
    if (command.name == name) return command.run({args.begin() + 1, args.end()});
  }
  std::cerr << "nosara: unknown command '" << name << "'; see `nosara --help`\n";
  return kExitUsage;
}

}  // namespace
}  // namespace nosara::client

int main(int argc, char** argv) {
  return nosara::client::Main(std::vector<std::string>(argv + 1, argv + argc));
}
