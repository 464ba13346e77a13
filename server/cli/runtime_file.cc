#include "server/cli/runtime_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "config/cluster_document.h"
#include "nlohmann/json.hpp"

namespace tidepool {
namespace {

using nlohmann::json;

// The signal by which `serve` reads its configuration again.
constexpr char kReloadSignal[] = "SIGUSR1";

constexpr SupervisorCore::State kStates[] = {
    SupervisorCore::State::kPending, SupervisorCore::State::kStarting, SupervisorCore::State::kReady,
    SupervisorCore::State::kBackoff, SupervisorCore::State::kStopped};

// The token is in there: a directory that another user made or can enter is refused.
absl::Status PrepareDirectory(const std::string& dir) {
  if (mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::FailedPreconditionError(absl::StrCat(dir, ": ", std::strerror(errno)));
  }
  struct stat st;
  if (lstat(dir.c_str(), &st) != 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
      (st.st_mode & 077) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        dir, " must be a directory of this user with mode 0700; remove it or set XDG_RUNTIME_DIR"));
  }
  return absl::OkStatus();
}

// When the process was started, in the kernel's ticks: another that gets its number later has another. Empty:
// there is no such process.
std::string StartOf(pid_t pid) {
  std::ifstream in(absl::StrCat("/proc/", pid, "/stat"));
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  // The second field, in parentheses, may hold anything.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return "";
  const std::vector<std::string> fields = absl::StrSplit(text.substr(name_end + 1), ' ', absl::SkipEmpty());
  constexpr size_t kStartTime = 22 - 3;  // proc(5): the 22nd; here the third is the first
  return fields.size() > kStartTime ? fields[kStartTime] : "";
}

std::string ToJson(const ServeRuntime& runtime) {
  json children = json::array();
  for (const ChildStatus& child : runtime.children) {
    children.push_back({{"name", child.name},
                        {"state", StateName(child.state)},
                        {"pid", child.pid},
                        {"restarts", child.restarts},
                        {"ready", child.ready}});
  }
  return json{{"pid", runtime.pid},
              {"http", runtime.http},
              {"grpc", runtime.grpc},
              {"scheduler", runtime.scheduler},
              {"token", runtime.token},
              {"metrics", runtime.metrics},
              {"started", StartOf(runtime.pid)},
              {"reload", kReloadSignal},
              {"children", std::move(children)}}
      .dump(1, ' ', false, json::error_handler_t::replace);
}

ServeRuntime FromJson(const json& in) {
  ServeRuntime out;
  out.pid = in.at("pid");
  out.http = in.at("http");
  out.grpc = in.at("grpc");
  out.scheduler = in.at("scheduler");
  out.token = in.at("token");
  out.metrics = in.at("metrics");
  out.reloads = in.value("reload", "") == kReloadSignal;
  for (const json& entry : in.at("children")) {
    ChildStatus child;
    child.name = entry.at("name");
    for (const auto state : kStates) {
      if (entry.at("state") == StateName(state)) child.state = state;
    }
    child.pid = entry.at("pid");
    child.restarts = entry.at("restarts");
    child.ready = entry.at("ready").get<ReadyInfo>();
    out.children.push_back(std::move(child));
  }
  return out;
}

// In one step, in a directory that is ours alone.
absl::Status Replace(const std::string& path, const std::string& text) {
  TP_RETURN_IF_ERROR(PrepareDirectory(RuntimeDirectory()));
  const std::string temporary = path + ".new";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return absl::InternalError(absl::StrCat(temporary, ": ", std::strerror(errno)));
  const bool written = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  close(fd);
  if (!written || rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    unlink(temporary.c_str());
    return absl::InternalError(absl::StrCat(path, ": ", why));
  }
  return absl::OkStatus();
}

}  // namespace

const char* StateName(SupervisorCore::State state) {
  switch (state) {
    case SupervisorCore::State::kPending:
      return "pending";
    case SupervisorCore::State::kStarting:
      return "starting";
    case SupervisorCore::State::kReady:
      return "ready";
    case SupervisorCore::State::kBackoff:
      return "backoff";
    case SupervisorCore::State::kStopped:
      return "stopped";
  }
  return "unknown";
}

std::string RuntimeDirectory() {
  const char* xdg = std::getenv("XDG_RUNTIME_DIR");
  if (xdg != nullptr && *xdg != '\0') return absl::StrCat(xdg, "/tidepool");
  return absl::StrCat("/tmp/tidepool-", geteuid());
}

std::string RuntimePath(pid_t pid) { return absl::StrCat(RuntimeDirectory(), "/serve-", pid, ".json"); }

absl::Status WriteRuntime(const ServeRuntime& runtime) {
  return Replace(RuntimePath(runtime.pid), ToJson(runtime));
}

std::string ReloadedPath(pid_t pid) { return absl::StrCat(RuntimeDirectory(), "/serve-", pid, ".yaml"); }

absl::Status WriteReloaded(pid_t pid, const std::string& yaml) {
  if (yaml.size() > kClusterDocumentBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("what can change while processes run has ", yaml.size(),
                                                   " bytes; at most ", kClusterDocumentBytesMax,
                                                   ": name fewer tenants"));
  }
  return Replace(ReloadedPath(pid), yaml);
}

void RemoveRuntime(pid_t pid) {
  unlink(RuntimePath(pid).c_str());
  unlink(ReloadedPath(pid).c_str());
}

std::vector<ServeRuntime> ListRuntimes() {
  std::vector<ServeRuntime> out;
  // A directory that others can write to could name a false scheduler.
  struct stat st;
  const std::string dir = RuntimeDirectory();
  if (lstat(dir.c_str(), &st) != 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
      (st.st_mode & 077) != 0) {
    return out;
  }
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    if (entry.path().extension() != ".json") continue;
    std::ifstream in(entry.path());
    const json parsed = json::parse(in, nullptr, /*allow_exceptions=*/false);
    try {
      ServeRuntime runtime = FromJson(parsed);
      if (runtime.pid <= 0 || kill(runtime.pid, 0) != 0) continue;
      // Files of older versions do not say it.
      if (const std::string started = parsed.value("started", "");
          !started.empty() && started != StartOf(runtime.pid)) {
        continue;
      }
      out.push_back(std::move(runtime));
    } catch (const json::exception&) {
      continue;
    }
  }
  return out;
}

}  // namespace tidepool
