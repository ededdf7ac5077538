#include "tests/router/tcp_relay.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nosara::router {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

// Copies bytes until one side ends, then ends both.
void Pump(int from, int to) {
  char buffer[1 << 16];
  for (;;) {
    const ssize_t size = recv(from, buffer, sizeof buffer, 0);
    if (size <= 0) break;
    for (ssize_t sent = 0; sent < size;) {
      const ssize_t n = send(to, buffer + sent, size - sent, MSG_NOSIGNAL);
      if (n <= 0) {
        sent = size;
        shutdown(from, SHUT_RDWR);
      } else {
        sent += n;
      }
    }
  }
  shutdown(to, SHUT_RDWR);
}

}  // namespace

TcpRelay::TcpRelay(int target_port) : target_port_(target_port) {
  listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof address;
  CHECK(listener_ >= 0);
  CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  CHECK(listen(listener_, 16) == 0);
  CHECK(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  accept_thread_ = std::thread([this] { Accept(); });
}

std::string TcpRelay::address() const { return absl::StrCat("127.0.0.1:", port_); }

void TcpRelay::Accept() {
  for (;;) {
    const int client = accept(listener_, nullptr, nullptr);
    if (client < 0) return;
    const int target = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in address = Loopback(target_port_);
    const bool connected =
        connect(target, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    absl::MutexLock lock(&mu_);
    sockets_.push_back(client);
    sockets_.push_back(target);
    if (cut_ || !connected) {
      shutdown(client, SHUT_RDWR);
      continue;
    }
    pumps_.emplace_back([client, target] { Pump(client, target); });
    pumps_.emplace_back([client, target] { Pump(target, client); });
  }
}

void TcpRelay::Cut() {
  {
    absl::MutexLock lock(&mu_);
    if (cut_) return;
    cut_ = true;
    for (const int s : sockets_) shutdown(s, SHUT_RDWR);
  }
  shutdown(listener_, SHUT_RDWR);
  accept_thread_.join();
  absl::MutexLock lock(&mu_);
  for (std::thread& pump : pumps_) pump.join();
  for (const int s : sockets_) close(s);
  close(listener_);
}

}  // namespace nosara::router
