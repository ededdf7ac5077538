#include "client/inspect.h"

#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/client.h"

namespace nosara::client {
namespace {

int RunModels(const std::vector<std::string>& args) {
  std::string address(kDefaultAddress);
  FlagSet set;
  AddAddressFlag(&set, &address);
  constexpr absl::string_view kUsage = "nosara models: the models that a router serves.\n";
  if (const auto exit = ParseFlags(set, kUsage, args, 0, nullptr)) return *exit;
  const auto client = Client::Connect(address);
  if (!client.ok()) return Report(client.status());
  const auto models = (*client)->ListModels();
  if (!models.ok()) return Report(models.status());
  std::cout << absl::StrFormat("%-32s %8s %10s %7s\n", "MODEL", "CONTEXT", "VOCABULARY", "WORKERS");
  for (const inference::v1::Model& model : *models) {
    std::cout << absl::StrFormat("%-32s %8d %10d %7d\n", model.name(), model.max_context_tokens(),
                                 model.vocab_size(), model.ready_workers());
  }
  return kExitOk;
}

int RunTokenize(const std::vector<std::string>& args) {
  std::string address(kDefaultAddress);
  std::string model, text, file;
  bool count = false;
  FlagSet set;
  AddAddressFlag(&set, &address);
  set.Add("model", &model, "name of the model; not needed where only one is served");
  set.Add("text", &text, "the text");
  set.Add("file", &file, "a file with the text; absent: stdin");
  set.Add("count", &count, "print only how many tokens there are");
  constexpr absl::string_view kUsage =
      "nosara tokenize: the token ids of a text, as a prompt has them.\n"
      "  nosara tokenize --text=\"Once upon a time\"\n"
      "  nosara tokenize --count --file=story.txt\n";
  if (const auto exit = ParseFlags(set, kUsage, args, 0, nullptr)) return *exit;
  if (text.empty()) {
    auto read = ReadText(file.empty() ? "-" : file);
    if (!read.ok()) {
      Report(read.status());
      return kExitUsage;
    }
    text = *std::move(read);
  }
  const auto client = Client::Connect(address);
  if (!client.ok()) return Report(client.status());
  inference::v1::TokenizeRequest request;
  request.set_model(model);
  request.set_text(text);
  const auto response = (*client)->Tokenize(request);
  if (!response.ok()) return Report(response.status());
  if (count) {
    std::cout << response->token_ids_size() << "\n";
  } else {
    std::cout << absl::StrJoin(response->token_ids(), " ") << "\n";
  }
  return kExitOk;
}

}  // namespace

Command ModelsCommand() { return {"models", "list the models that are served", RunModels}; }
Command TokenizeCommand() { return {"tokenize", "show the tokens of a text", RunTokenize}; }

}  // namespace nosara::client
