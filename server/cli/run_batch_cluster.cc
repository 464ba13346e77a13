#include "server/cli/run_batch_cluster.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status.h"
#include "config/fields.h"
#include "server/cli/supervisor.h"

extern char** environ;

namespace tidepool {
namespace {

constexpr size_t kReadyLineMax = 4096;
constexpr absl::Duration kPoll = absl::Milliseconds(100);
// Beyond the supervisor's own patience with its children.
constexpr absl::Duration kStopMargin = absl::Seconds(15);

std::string EnvOf(std::string_view path) {
  const Field* field = FindField(path);
  TP_CHECK(field != nullptr);
  return field->env();
}

// Our own environment, with what the configuration says, as a private cluster needs it.
std::vector<std::string> Environment(const LoadedConfig& loaded) {
  std::map<std::string, std::string> env;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const size_t equals = text.find('=');
    if (equals != text.npos) env[std::string(text.substr(0, equals))] = std::string(text.substr(equals + 1));
  }
  for (const Field& field : Fields()) {
    if (!loaded.IsDefault(field.path)) env[field.env()] = FormatField(field, loaded.config);
  }
  for (const char* path : {"gateway.http_listen", "gateway.grpc_listen", "serve.metrics_listen"}) {
    env[EnvOf(path)] = "127.0.0.1:0";
  }
  for (const char* path : {"gateway.api_keys", "gateway.api_keys_file", "gateway.tls.cert", "gateway.tls.key",
                           "gateway.tls.client_ca"}) {
    env[EnvOf(path)] = "";
  }
  env[EnvOf("gateway.batch_dir")] = "off";
  if (loaded.IsDefault("gateway.access_log")) env[EnvOf("gateway.access_log")] = "off";
  if (loaded.IsDefault("log.level")) env[EnvOf("log.level")] = "warn";
  std::vector<std::string> out;
  for (const auto& [name, value] : env) out.push_back(absl::StrCat(name, "=", value));
  return out;
}

std::vector<char*> Pointers(const std::vector<std::string>& texts) {
  std::vector<char*> out;
  for (const std::string& text : texts) out.push_back(const_cast<char*>(text.c_str()));
  out.push_back(nullptr);
  return out;
}

// After the fork: async-signal-safe calls only.
[[noreturn]] void Exec(pid_t parent, int ready_fd, char* const* argv, char* const* env) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);
  setpgid(0, 0);  // a terminal's Ctrl-C reaches the command, which then stops us in its order
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null_fd = open("/dev/null", O_RDWR);
  if (null_fd < 0 || dup2(null_fd, STDIN_FILENO) < 0 || dup2(null_fd, STDOUT_FILENO) < 0) _exit(1);
  fcntl(ready_fd, F_SETFD, 0);
  execve("/proc/self/exe", argv, env);
  _exit(1);
}

}  // namespace

absl::StatusOr<std::unique_ptr<EmbeddedCluster>> EmbeddedCluster::Start(const LoadedConfig& config,
                                                                        const std::atomic<bool>& stop) {
  std::unique_ptr<EmbeddedCluster> cluster(new EmbeddedCluster());
  FileHandle ready;
  TP_RETURN_IF_ERROR(cluster->Spawn(config, ready));
  TP_RETURN_IF_ERROR(cluster->WaitReady(ready, config.config.cluster.start_timeout + kStopMargin, stop));
  return cluster;
}

absl::Status EmbeddedCluster::Spawn(const LoadedConfig& config, FileHandle& ready) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0)
    return absl::ResourceExhaustedError(absl::StrCat("pipe: ", std::strerror(errno)));
  ready = FileHandle(fds[0]);
  const FileHandle write_end(fds[1]);
  std::vector<std::string> env = Environment(config);
  env.push_back(absl::StrCat(kReadyFdEnv, "=", write_end.fd()));
  const std::vector<std::string> argv = {"tidepool", "serve"};
  const std::vector<char*> argv_pointers = Pointers(argv), env_pointers = Pointers(env);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) Exec(parent, write_end.fd(), argv_pointers.data(), env_pointers.data());
  if (pid < 0) return absl::ResourceExhaustedError(absl::StrCat("fork: ", std::strerror(errno)));
  pid_ = pid;
  return absl::OkStatus();
}

absl::Status EmbeddedCluster::WaitReady(const FileHandle& ready, absl::Duration timeout,
                                        const std::atomic<bool>& stop) {
  std::string text;
  const absl::Time deadline = Clock::Real().Now() + timeout;
  while (text.find('\n') == text.npos) {
    if (stop) return absl::CancelledError("stopped while the cluster started");
    if (Clock::Real().Now() >= deadline) {
      return absl::DeadlineExceededError("the cluster was not ready within cluster.start_timeout");
    }
    pollfd wait{ready.fd(), POLLIN, 0};
    if (poll(&wait, 1, static_cast<int>(absl::ToInt64Milliseconds(kPoll))) <= 0) continue;
    char buffer[512];
    const ssize_t n = read(ready.fd(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0 || text.size() > kReadyLineMax) {
      int code = 0;
      if (n == 0 && waitpid(pid_, &code, 0) == pid_) pid_ = 0;
      const bool usage = pid_ == 0 && WIFEXITED(code) && WEXITSTATUS(code) == 2;
      return usage ? absl::InvalidArgumentError("the cluster refused its configuration; see above")
                   : absl::InternalError("the cluster ended before it was ready; see above");
    }
    text.append(buffer, static_cast<size_t>(n));
  }
  TP_ASSIGN_OR_RETURN(const ReadyInfo info, ParseReadyLine(text.substr(0, text.find('\n'))));
  const auto http = info.find("http");
  if (http == info.end()) return absl::InternalError("the cluster did not say where it listens");
  endpoint_ = "http://" + http->second;
  return absl::OkStatus();
}

EmbeddedCluster::~EmbeddedCluster() {
  if (pid_ <= 0) return;
  kill(pid_, SIGTERM);
  const absl::Time deadline = Clock::Real().Now() + kStopMargin;
  while (waitpid(pid_, nullptr, WNOHANG) == 0) {
    if (Clock::Real().Now() >= deadline) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
      return;
    }
    absl::SleepFor(absl::Milliseconds(20));
  }
}

}  // namespace tidepool
