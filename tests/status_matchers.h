// GoogleTest support for absl::Status.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nosara::testing {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& value) {
  return value.status();
}

MATCHER(IsOk, "is OK") {
  *result_listener << StatusOf(arg);
  return StatusOf(arg).ok();
}

/// Matches a Status or StatusOr by code and by a part of its message.
MATCHER_P2(StatusIs, code, part, "") {
  const absl::Status& status = StatusOf(arg);
  *result_listener << status;
  return status.code() == code && std::string(status.message()).find(part) != std::string::npos;
}

}  // namespace nosara::testing

#define EXPECT_OK(expr) EXPECT_THAT((expr), ::nosara::testing::IsOk())
#define ASSERT_OK(expr) ASSERT_THAT((expr), ::nosara::testing::IsOk())
#define NOSARA_ASSERT_OK_AND_ASSIGN_(tmp, lhs, expr) \
  auto tmp = (expr);                                 \
  ASSERT_TRUE(tmp.ok()) << tmp.status();             \
  lhs = *std::move(tmp)
#define ASSERT_OK_AND_ASSIGN(lhs, expr) \
  NOSARA_ASSERT_OK_AND_ASSIGN_(NOSARA_TEST_CONCAT_(nosara_tmp_, __LINE__), lhs, expr)
#define NOSARA_TEST_CONCAT_INNER_(a, b) a##b
#define NOSARA_TEST_CONCAT_(a, b) NOSARA_TEST_CONCAT_INNER_(a, b)
