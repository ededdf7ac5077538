#include "client/flags.h"

#include <type_traits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status_macros.h"

namespace nosara::client {
namespace {

absl::Status Wrong(const std::string& value, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat("'", value, "' is not ", allowed));
}

template <typename T>
absl::Status ParseInteger(const std::string& value, T* target) {
  if (absl::SimpleAtoi(value, target)) return absl::OkStatus();
  return Wrong(value, std::is_signed_v<T> ? "a whole number" : "a whole number of 0 or more");
}

}  // namespace

void FlagSet::AddFlag(absl::string_view name, absl::string_view help, std::string default_value,
                      Setter set) {
  flags_.push_back(
      {std::string(name), std::string(help), std::move(default_value), false, std::move(set), ""});
}

void FlagSet::Add(absl::string_view name, std::string* target, absl::string_view help) {
  AddFlag(name, help, *target, [target](const std::string& value) {
    *target = value;
    return absl::OkStatus();
  });
}

void FlagSet::Add(absl::string_view name, bool* target, absl::string_view help) {
  AddFlag(name, help, *target ? "true" : "", [target](const std::string& value) {
    if (absl::SimpleAtob(value, target)) return absl::OkStatus();
    return Wrong(value, "true or false");
  });
  flags_.back().is_switch = true;
}

void FlagSet::Add(absl::string_view name, int64_t* target, absl::string_view help) {
  AddFlag(name, help, absl::StrCat(*target),
          [target](const std::string& value) { return ParseInteger(value, target); });
}

void FlagSet::Add(absl::string_view name, absl::Duration* target, absl::string_view help) {
  AddFlag(name, help, absl::FormatDuration(*target), [target](const std::string& value) {
    if (absl::ParseDuration(value, target)) return absl::OkStatus();
    return Wrong(value, "a duration such as 500ms, 30s or 5m");
  });
}

void FlagSet::Add(absl::string_view name, std::optional<float>* target, absl::string_view help) {
  AddFlag(name, help, "", [target](const std::string& value) {
    float parsed = 0;
    if (!absl::SimpleAtof(value, &parsed)) return Wrong(value, "a number");
    *target = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::Add(absl::string_view name, std::optional<uint32_t>* target, absl::string_view help) {
  AddFlag(name, help, "", [target](const std::string& value) {
    uint32_t parsed = 0;
    RETURN_IF_ERROR(ParseInteger(value, &parsed));
    *target = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::Add(absl::string_view name, std::optional<uint64_t>* target, absl::string_view help) {
  AddFlag(name, help, "", [target](const std::string& value) {
    uint64_t parsed = 0;
    RETURN_IF_ERROR(ParseInteger(value, &parsed));
    *target = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::Add(absl::string_view name, std::vector<std::string>* target,
                  absl::string_view help) {
  AddFlag(name, help, "", [target](const std::string& value) {
    target->push_back(value);
    return absl::OkStatus();
  });
}

void FlagSet::AddAlias(absl::string_view alias, absl::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) flag.alias = std::string(alias);
  }
}

const FlagSet::Flag* FlagSet::Find(const std::string& name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name || (!flag.alias.empty() && flag.alias == name)) return &flag;
  }
  return nullptr;
}

absl::StatusOr<std::vector<std::string>> FlagSet::Parse(
    const std::vector<std::string>& args) const {
  std::vector<std::string> positional;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "--") {
      positional.insert(positional.end(), args.begin() + i + 1, args.end());
      break;
    }
    if (!absl::StartsWith(arg, "--")) {
      positional.push_back(arg);
      continue;
    }
    const size_t equals = arg.find('=');
    const std::string name = absl::StrReplaceAll(
        arg.substr(2, equals == std::string::npos ? equals : equals - 2), {{"-", "_"}});
    std::optional<std::string> value;
    if (equals != std::string::npos) value = arg.substr(equals + 1);
    const Flag* flag = Find(name);
    if (flag == nullptr && absl::StartsWith(name, "no") && !value) {
      flag = Find(name.substr(2));
      if (flag != nullptr && !flag->is_switch) flag = nullptr;
      value = "false";
    }
    if (flag == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, "; see --help"));
    }
    if (!value && flag->is_switch) value = "true";
    if (!value) {
      if (i + 1 == args.size()) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, ": a value is missing"));
      }
      value = args[++i];
    }
    RETURN_IF_ERROR(Annotate(flag->set(*value), absl::StrCat("--", name)));
  }
  return positional;
}

std::string FlagSet::Help() const {
  std::string help;
  for (const Flag& flag : flags_) {
    absl::StrAppend(&help, "  --", flag.name, flag.is_switch ? "" : "=...");
    if (!flag.default_value.empty()) absl::StrAppend(&help, "  (default ", flag.default_value, ")");
    absl::StrAppend(&help, "\n      ", absl::StrReplaceAll(flag.help, {{"\n", "\n      "}}), "\n");
  }
  return help;
}

}  // namespace nosara::client
