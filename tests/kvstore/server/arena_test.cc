#include "kvstore/server/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "tests/status_matchers.h"

namespace nosara::kvstore {
namespace {

using ::nosara::testing::StatusIs;

Arena::Options Options(uint64_t bytes) {
  Arena::Options options;
  options.bytes = bytes;
  options.epoch = 0x1234567800000000 | static_cast<uint64_t>(getpid());
  return options;
}

TEST(ArenaTest, AllItsMemoryIsThereAndZero) {
  std::string path;
  {
    const auto arena = Arena::Create(Options((uint64_t{5} << 20) + 1));
    ASSERT_OK(arena);
    path = (*arena)->path();
    struct stat file;
    ASSERT_EQ(stat(path.c_str(), &file), 0);
    EXPECT_GE(file.st_size, (5 << 20) + 1);
    EXPECT_GE(file.st_blocks * 512, file.st_size) << "has holes";
    EXPECT_EQ(file.st_mode & 0777, 0600u);
    for (uint64_t at = 0; at < (*arena)->bytes(); at += 4096) {
      ASSERT_EQ((*arena)->data()[at], std::byte{0});
    }
    const Arena::Startup& startup = (*arena)->startup();
    EXPECT_GT(startup.map, absl::ZeroDuration());
    EXPECT_GT(startup.allocate, absl::ZeroDuration());
    EXPECT_LE(startup.huge_bytes, static_cast<uint64_t>(file.st_size) + (uint64_t{4} << 20));
  }
  EXPECT_NE(access(path.c_str(), F_OK), 0) << "is left behind";
}

TEST(ArenaTest, SaysWhenThereIsNoRoom) {
  for (const uint64_t bytes : {uint64_t{1} << 46, uint64_t{1} << 62}) {
    const Arena::Options options = Options(bytes);
    EXPECT_THAT(Arena::Create(options),
                StatusIs(absl::StatusCode::kResourceExhausted, "/dev/shm has room for"));
  }
  Arena::Options options = Options(1 << 20);
  options.folder = "/no/such/folder";
  EXPECT_THAT(Arena::Create(options),
              StatusIs(absl::StatusCode::kNotFound, "arena folder '/no/such/folder'"));
}

}  // namespace
}  // namespace nosara::kvstore
