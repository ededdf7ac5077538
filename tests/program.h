// One of our programs as a process of its own, to be signalled and killed.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"

extern char** environ;

namespace nosara::testing {

/// Killed when destroyed. What it said is shown when the test has failed.
class Program final {
 public:
  /// Starts `path` with `flags` and waits until it says "listening on host:port", or ends.
  Program(const std::string& path, std::vector<std::string> flags) : path_(path) {
    int out[2];
    CHECK(pipe2(out, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    // Both: one that outlives a crashed test must not keep that test's output open.
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, out[1], STDERR_FILENO);
    flags.insert(flags.begin(), path);
    std::vector<char*> argv;
    for (std::string& flag : flags) argv.push_back(flag.data());
    argv.push_back(nullptr);
    CHECK(posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    close(out[1]);
    stderr_ = out[0];
    constexpr char kListening[] = "listening on ";
    for (char byte; read(stderr_, &byte, 1) == 1;) {
      said_.push_back(byte);
      const size_t at = said_.find(kListening);
      if (byte != '\n' || at == std::string::npos) continue;
      const size_t begin = at + sizeof(kListening) - 1;
      address_ = said_.substr(begin, said_.find_first_of(",\n", begin) - begin);
      break;
    }
    announcement_ = said_;
    // Goes on reading, or the program would stand still once the pipe is full.
    reader_ = std::thread([this] {
      char bytes[4096];
      for (ssize_t count; (count = read(stderr_, bytes, sizeof(bytes))) > 0;) {
        said_.append(bytes, static_cast<size_t>(count));
      }
    });
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (pid_ > 0) Kill();
    if (said().find("Sanitizer") != std::string::npos) {
      ADD_FAILURE() << "a sanitizer has found something in " << path_;
    }
    // Its end: 10 kB tell why.
    if (::testing::Test::HasFailure()) {
      ADD_FAILURE() << path_ << " said:\n"
                    << said().substr(said_.size() - std::min<size_t>(said_.size(), 10000));
    }
    if (reader_.joinable()) reader_.join();
    close(stderr_);
  }

  /// "host:port"; empty when it ended instead.
  const std::string& address() const { return address_; }
  /// What it wrote to stderr until it listened or ended.
  const std::string& announcement() const { return announcement_; }
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
  /// All that it wrote to stderr. Only after its end.
  const std::string& said() {
    if (reader_.joinable()) reader_.join();
    return said_;
  }

 private:
  const std::string path_;
  pid_t pid_ = 0;
  int stderr_ = -1;
  std::string said_;  // the reader's until it is joined
  std::string announcement_;
  std::string address_;
  std::thread reader_;
};

}  // namespace nosara::testing
