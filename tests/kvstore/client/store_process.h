// nosara-kvstore as a process of its own, to be killed and stopped.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "base/check.h"

extern char** environ;

namespace nosara::kvstore {

/// Kills the process when destroyed.
class StoreProcess final {
 public:
  /// Starts the program with `flags` and waits until it says where it listens, or ends.
  explicit StoreProcess(std::vector<std::string> flags) {
    int out[2];
    CHECK(pipe2(out, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDERR_FILENO);
    flags.insert(flags.begin(), NOSARA_KVSTORE_BINARY);
    std::vector<char*> argv;
    for (std::string& flag : flags) argv.push_back(flag.data());
    argv.push_back(nullptr);
    CHECK(posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    close(out[1]);
    err_ = out[0];
    char byte;
    while (read(err_, &byte, 1) == 1) {
      said_.push_back(byte);
      const size_t at = said_.find("listening on ");
      if (byte != '\n' || at == std::string::npos) continue;
      const size_t begin = at + 13;
      address_ = said_.substr(begin, said_.find(',', begin) - begin);
      break;
    }
  }
  StoreProcess(const StoreProcess&) = delete;
  StoreProcess& operator=(const StoreProcess&) = delete;
  ~StoreProcess() {
    if (pid_ > 0) Kill();
    if (::testing::Test::HasFailure()) {
      // What it said last, to tell why.
      char rest[4096];
      for (ssize_t bytes; (bytes = read(err_, rest, sizeof(rest))) > 0;) {
        said_.append(rest, static_cast<size_t>(bytes));
      }
      ADD_FAILURE() << "the store said: " << said_;
    }
    close(err_);
  }

  const std::string& address() const { return address_; }
  /// What it wrote to stderr until it listened or ended.
  const std::string& said() const { return said_; }
  void Signal(int signal) { CHECK(kill(pid_, signal) == 0); }
  /// Stops all its threads; returns when they stand still.
  void Stop() {
    Signal(SIGSTOP);
    int status = 0;
    CHECK(waitpid(pid_, &status, WUNTRACED) == pid_ && WIFSTOPPED(status));
  }
  void Kill() {
    Signal(SIGKILL);
    Wait();
  }
  /// Waits for its end; the exit status, or minus the signal.
  int Wait() {
    int status = 0;
    CHECK(waitpid(pid_, &status, 0) == pid_);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  pid_t pid_ = 0;
  int err_ = -1;
  std::string address_;
  std::string said_;
};

}  // namespace nosara::kvstore
