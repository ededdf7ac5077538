// A real etcd server as a process of its own, to be killed and started again with its data.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/check.h"
#include "cluster/etcd_client.h"

extern char** environ;

namespace nosara::testing {

/// Killed, and its data removed, when destroyed.
class Etcd final {
 public:
  /// Waits until it answers. NOSARA_ETCD is the path of the program.
  Etcd() {
    static int count = 0;
    folder_ = std::filesystem::temp_directory_path() /
              absl::StrCat("nosara_etcd.", getpid(), ".", count++);
    // etcd takes no port 0. Another process may take the port that was free a moment ago.
    for (int i = 0; i < 10 && !Start(); ++i) endpoint_.clear();
    EXPECT_NE(endpoint_, "") << "etcd does not start";
  }
  Etcd(const Etcd&) = delete;
  Etcd& operator=(const Etcd&) = delete;
  ~Etcd() {
    if (pid_ > 0) Kill();
    std::filesystem::remove_all(folder_);
  }

  /// "host:port" of its client address.
  const std::string& endpoint() const { return endpoint_; }
  void Kill() {
    CHECK(kill(pid_, SIGKILL) == 0);
    int status = 0;
    CHECK(waitpid(pid_, &status, 0) == pid_);
    pid_ = 0;
  }
  /// With the data and the address of before. Waits until it answers.
  void Restart() { ASSERT_TRUE(Start()); }

 private:
  static int FreePort() {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    CHECK(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    CHECK(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    close(fd);
    return ntohs(address.sin_port);
  }

  bool Start() {
    if (endpoint_.empty()) {
      endpoint_ = absl::StrCat("127.0.0.1:", FreePort());
      peer_ = absl::StrCat("http://127.0.0.1:", FreePort());
    }
    const std::string client = absl::StrCat("http://", endpoint_);
    std::vector<std::string> arguments = {NOSARA_ETCD,
                                          "--name=test",
                                          absl::StrCat("--data-dir=", folder_.string()),
                                          absl::StrCat("--listen-client-urls=", client),
                                          absl::StrCat("--advertise-client-urls=", client),
                                          absl::StrCat("--listen-peer-urls=", peer_),
                                          absl::StrCat("--initial-advertise-peer-urls=", peer_),
                                          absl::StrCat("--initial-cluster=test=", peer_),
                                          "--log-level=error"};
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    CHECK(posix_spawn(&pid_, argv[0], nullptr, nullptr, argv.data(), environ) == 0);
    cluster::EtcdClient client_of(endpoint_);
    const absl::Time end = absl::Now() + absl::Seconds(30);
    while (absl::Now() < end) {
      if (client_of.List("/").ok()) return true;
      int status = 0;
      if (waitpid(pid_, &status, WNOHANG) == pid_) {
        pid_ = 0;
        return false;
      }
      std::this_thread::yield();
    }
    Kill();
    return false;
  }

  std::filesystem::path folder_;
  std::string endpoint_;
  std::string peer_;
  pid_t pid_ = 0;
};

}  // namespace nosara::testing
