#include "text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace nosara::text {
namespace {

std::vector<size_t> FailureFunction(absl::string_view pattern) {
  std::vector<size_t> failure(pattern.size(), 0);
  size_t length = 0;
  for (size_t i = 1; i < pattern.size(); ++i) {
    while (length > 0 && pattern[i] != pattern[length]) length = failure[length - 1];
    if (pattern[i] == pattern[length]) ++length;
    failure[i] = length;
  }
  return failure;
}

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stop_strings) {
  for (std::string& stop : stop_strings) {
    if (stop.empty()) continue;
    Pattern pattern;
    pattern.failure = FailureFunction(stop);
    pattern.text = std::move(stop);
    patterns_.push_back(std::move(pattern));
  }
}

StopMatcher::Result StopMatcher::Push(absl::string_view text) {
  Result result;
  result.matched = matched_;
  if (matched_) return result;
  for (const char byte : text) {
    held_.push_back(byte);
    const Pattern* complete = nullptr;
    for (Pattern& pattern : patterns_) {
      while (pattern.length > 0 && pattern.text[pattern.length] != byte) {
        pattern.length = pattern.failure[pattern.length - 1];
      }
      if (pattern.text[pattern.length] == byte) ++pattern.length;
      if (pattern.length == pattern.text.size() &&
          (complete == nullptr || pattern.text.size() > complete->text.size())) {
        complete = &pattern;
      }
    }
    if (complete != nullptr) {
      matched_ = result.matched = true;
      matched_stop_ = complete->text;
      result.emit = held_.substr(0, held_.size() - complete->text.size());
      held_.clear();
      return result;
    }
  }
  size_t keep = 0;
  for (const Pattern& pattern : patterns_) keep = std::max(keep, pattern.length);
  result.emit = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return result;
}

std::string StopMatcher::Flush() { return std::exchange(held_, std::string()); }

}  // namespace nosara::text
