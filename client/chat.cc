#include "client/chat.h"

#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "client/client.h"
#include "client/sampling_flags.h"
#include "client/stream_printer.h"

namespace nosara::client {
namespace {

constexpr absl::string_view kUsage =
    "nosara chat: a conversation; what was said before is kept.\n"
    "  nosara chat --system=\"You are a sailor.\"\n"
    "One line is one message. /reset forgets, /exit or Ctrl-D ends.\n";

int Run(const std::vector<std::string>& args) {
  std::string address(kDefaultAddress);
  std::string system;
  bool statistics = false;
  SamplingFlags sampling;
  FlagSet set;
  AddAddressFlag(&set, &address);
  set.Add("system", &system, "the system message at the beginning of the conversation");
  sampling.AddTo(&set);
  set.Add("statistics", &statistics, "print times and cache statistics after each answer");
  if (const auto exit = ParseFlags(set, kUsage, args, 0, nullptr)) return *exit;
  const auto client = Client::Connect(address);
  if (!client.ok()) return Report(client.status());
  // Say now, not after the first message, that nobody is there.
  if (const auto models = (*client)->ListModels(); !models.ok()) return Report(models.status());

  const auto add_message = [](inference::v1::ChatPrompt* chat, const std::string& role,
                              const std::string& content) {
    auto& message = *chat->add_messages();
    message.set_role(role);
    message.set_content(content);
  };
  const bool interactive = isatty(STDIN_FILENO) != 0;
  inference::v1::ChatPrompt history;
  if (!system.empty()) add_message(&history, "system", system);
  for (std::string line;;) {
    if (interactive) std::cerr << "you> " << std::flush;
    if (!std::getline(std::cin, line) || line == "/exit") break;
    if (line.empty()) continue;
    if (line == "/reset") {
      history.clear_messages();
      if (!system.empty()) add_message(&history, "system", system);
      continue;
    }
    inference::v1::GenerateRequest request;
    sampling.Fill(&request);
    *request.mutable_chat() = history;
    add_message(request.mutable_chat(), "user", line);
    StreamPrinter::Options options;
    options.progress = isatty(STDERR_FILENO) != 0;
    options.statistics = statistics;
    StreamPrinter printer(options, &std::cout, &std::cerr);
    const absl::Status status =
        (*client)->Generate(request, [&printer](const inference::v1::GenerateResponse& event) {
          printer.Print(event);
          return Continue::kYes;
        });
    printer.End();
    if (!status.ok()) {
      // A message that failed is not part of the conversation; a script must see the failure.
      const int code = Report(status);
      if (!interactive) return code;
      continue;
    }
    history = request.chat();
    add_message(&history, "assistant", printer.text());
  }
  if (interactive) std::cerr << "\n";
  return kExitOk;
}

}  // namespace

Command ChatCommand() { return {"chat", "talk with a model", Run}; }

}  // namespace nosara::client
