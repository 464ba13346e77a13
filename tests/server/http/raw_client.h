#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <string_view>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tidepool {

// RawClient: a TCP connection to 127.0.0.1 that sends what it is told, well-formed or not. Every read has a
// deadline; a test that runs into it fails on what it then asserts.
class RawClient {
 public:
  // `receive_buffer`: SO_RCVBUF, for clients that stop reading; 0: the system's.
  explicit RawClient(int port, int receive_buffer = 0) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer > 0) ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  }
  ~RawClient() { Close(); }
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  bool connected() const { return connected_; }

  // False once the server has closed.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return true;
  }

  // Reads until `sign` was received, the server closed, or the time is over; returns everything since the
  // last Take, and keeps it.
  const std::string& ReadUntil(std::string_view sign, absl::Duration timeout = absl::Seconds(20)) {
    const absl::Time deadline = absl::Now() + timeout;
    while (received_.find(sign) == std::string::npos && ReadSome(deadline)) {
    }
    return received_;
  }
  const std::string& ReadToEnd(absl::Duration timeout = absl::Seconds(20)) {
    const absl::Time deadline = absl::Now() + timeout;
    while (ReadSome(deadline)) {
    }
    return received_;
  }
  // One response with Content-Length, or chunked; takes it out of what was received.
  std::string ReadResponse() {
    ReadUntil("\r\n\r\n");
    const size_t head = received_.find("\r\n\r\n");
    if (head == std::string::npos) return Take(received_.size());
    const size_t at = received_.find("Content-Length: ");
    if (at == std::string::npos || at > head) {
      ReadUntil("\r\n0\r\n\r\n");
      const size_t end = received_.find("\r\n0\r\n\r\n");
      return Take(end == std::string::npos ? received_.size() : end + 7);
    }
    const size_t size = head + 4 + std::strtoul(received_.c_str() + at + 16, nullptr, 10);
    const absl::Time deadline = absl::Now() + absl::Seconds(20);
    while (received_.size() < size && ReadSome(deadline)) {
    }
    return Take(std::min(size, received_.size()));
  }
  bool closed_by_server() const { return eof_; }

  // With a reset instead of an orderly end.
  void Reset() {
    linger hard{1, 0};
    ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
    Close();
  }
  void Close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  std::string Take(size_t n) {
    std::string out = received_.substr(0, n);
    received_.erase(0, n);
    return out;
  }
  bool ReadSome(absl::Time deadline) {
    pollfd wait{fd_, POLLIN, 0};
    const auto ms = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (ms <= 0 || ::poll(&wait, 1, static_cast<int>(ms)) <= 0) return false;
    char buffer[16384];
    const ssize_t n = ::recv(fd_, buffer, sizeof buffer, 0);
    if (n <= 0) {
      eof_ = true;
      return false;
    }
    received_.append(buffer, static_cast<size_t>(n));
    return true;
  }

  int fd_;
  bool connected_ = false, eof_ = false;
  std::string received_;
};

inline int StatusOf(std::string_view response) {
  return response.size() < 12 ? 0 : std::atoi(std::string(response.substr(9, 3)).c_str());
}
inline std::string BodyOf(const std::string& response) {
  const size_t head = response.find("\r\n\r\n");
  return head == std::string::npos ? "" : response.substr(head + 4);
}
inline std::string Get(std::string_view path, std::string_view headers = "") {
  return "GET " + std::string(path) + " HTTP/1.1\r\nHost: localhost\r\n" + std::string(headers) + "\r\n";
}
inline std::string Post(std::string_view path, std::string_view body, std::string_view headers = "") {
  return "POST " + std::string(path) + " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" +
         std::string(headers) + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
         std::string(body);
}

}  // namespace tidepool
