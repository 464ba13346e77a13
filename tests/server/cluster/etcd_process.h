#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/cluster/etcd_client.h"

namespace tidepool {

// Polls until `holds`; false: not within 15 s, which a busy machine may take.
inline bool Eventually(const std::function<bool()>& holds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(15);
  while (!holds()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

// EtcdProcess: a real etcd on loopback with its data in a folder of its own. Etcd does not tell which port it
// was given, so that it gets one that was free a moment before.
class EtcdProcess {
 public:
  // False: Debian's etcd-server is not installed; such tests are skipped.
  static bool Installed() {
    for (const char* path : {"/usr/bin/etcd", "/usr/local/bin/etcd"}) {
      if (access(path, X_OK) == 0) return true;
    }
    return false;
  }

  // PEM files: etcd's own, and those of a client, where etcd is to ask for one.
  struct Tls {
    std::string ca, cert, key, client_cert, client_key;
  };

  explicit EtcdProcess(std::vector<std::string> args = {}, Tls tls = {})
      : args_(std::move(args)), tls_(std::move(tls)) {
    char path[] = "/tmp/tidepool-etcd-XXXXXX";
    folder_ = mkdtemp(path);
    port_ = FreePort();
    peer_port_ = FreePort();
    Start();
  }
  ~EtcdProcess() {
    Kill();
    std::filesystem::remove_all(folder_);
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }
  EtcdOptions options() const {
    EtcdOptions o;
    o.endpoints = {address()};
    o.ca = tls_.ca;
    o.cert = tls_.client_cert;
    o.key = tls_.client_key;
    return o;
  }

  void Start() {
    const std::string client = absl::StrCat(tls_.ca.empty() ? "http" : "https", "://127.0.0.1:", port_),
                      peer = absl::StrCat("http://127.0.0.1:", peer_port_);
    std::vector<std::string> args = {"etcd",
                                     "--name",
                                     "a",
                                     "--data-dir",
                                     folder_ + "/data",
                                     "--listen-client-urls",
                                     client,
                                     "--advertise-client-urls",
                                     client,
                                     "--listen-peer-urls",
                                     peer,
                                     "--initial-advertise-peer-urls",
                                     peer,
                                     "--initial-cluster",
                                     "a=" + peer};
    if (!tls_.ca.empty()) {
      args.insert(args.end(), {"--cert-file", tls_.cert, "--key-file", tls_.key, "--trusted-ca-file", tls_.ca,
                               "--client-cert-auth"});
    }
    args.insert(args.end(), args_.begin(), args_.end());
    std::vector<char*> argv;
    for (std::string& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const int log = open((folder_ + "/log").c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      dup2(log, 1);
      dup2(log, 2);
      execvp("etcd", argv.data());
      _exit(127);
    }
    auto client_or = EtcdClient::Create(options());
    ready_ = client_or.ok() && Eventually([&] {
               // Also that we may not see this is an answer.
               const absl::Status status = (*client_or)->List("/").status();
               return !absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status);
             });
  }
  bool ready() const { return ready_; }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  // Stands still; when this returns, all of it does. False: it does not.
  [[nodiscard]] bool Pause() const {
    kill(pid_, SIGSTOP);
    return Eventually([&] {
      std::error_code error;
      for (const auto& thread :
           std::filesystem::directory_iterator(absl::StrCat("/proc/", pid_, "/task"), error)) {
        std::ifstream in(thread.path() / "stat");
        const std::string stat{std::istreambuf_iterator<char>(in), {}};
        // PID (NAME) STATE ...; a name may hold anything.
        const size_t name_end = stat.rfind(')');
        if (name_end == std::string::npos || stat.substr(name_end + 2, 1) != "T") return false;
      }
      return !error;
    });
  }
  void Resume() const { kill(pid_, SIGCONT); }
  // As after a lost disk.
  void LoseData() const { std::filesystem::remove_all(folder_ + "/data"); }

 private:
  static int FreePort() {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    bind(fd, reinterpret_cast<sockaddr*>(&address), size);
    getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    close(fd);
    return ntohs(address.sin_port);
  }

  const std::vector<std::string> args_;
  const Tls tls_;
  std::string folder_;
  int port_ = 0, peer_port_ = 0;
  pid_t pid_ = -1;
  bool ready_ = false;
};

#define TP_NEEDS_ETCD() \
  if (!EtcdProcess::Installed()) GTEST_SKIP() << "etcd is not installed (Debian: etcd-server)"

}  // namespace tidepool
