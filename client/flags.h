// Flags of the subcommands of `nosara`.
//
// Abseil's flags belong to a whole program; here each subcommand has its own, so that its --help
// shows what it takes and nothing else.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace nosara::client {

/// The flags of one command: --name=value or --name value; switches: --name or --noname. Dashes and
/// underscores in names are the same. "--" ends the flags. One thread.
class FlagSet final {
 public:
  /// Adds a flag. `target` holds the default and must outlive the set; an optional or a list shows
  /// no default. A list takes every occurrence of the flag.
  void Add(absl::string_view name, std::string* target, absl::string_view help);
  void Add(absl::string_view name, bool* target, absl::string_view help);
  void Add(absl::string_view name, int64_t* target, absl::string_view help);
  void Add(absl::string_view name, absl::Duration* target, absl::string_view help);
  void Add(absl::string_view name, std::optional<float>* target, absl::string_view help);
  void Add(absl::string_view name, std::optional<uint32_t>* target, absl::string_view help);
  void Add(absl::string_view name, std::optional<uint64_t>* target, absl::string_view help);
  void Add(absl::string_view name, std::vector<std::string>* target, absl::string_view help);

  /// A second name of the flag `name`.
  void AddAlias(absl::string_view alias, absl::string_view name);

  /// Sets the targets; returns what is no flag. INVALID_ARGUMENT names the flag, the value and what
  /// is allowed.
  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& args) const;

  /// One paragraph per flag.
  std::string Help() const;

 private:
  using Setter = std::function<absl::Status(const std::string& value)>;
  struct Flag {
    std::string name;
    std::string help;
    std::string default_value;  // "": none to show
    bool is_switch = false;
    Setter set;
    std::string alias;
  };

  void AddFlag(absl::string_view name, absl::string_view help, std::string default_value,
               Setter set);
  const Flag* Find(const std::string& name) const;

  std::vector<Flag> flags_;
};

}  // namespace nosara::client
