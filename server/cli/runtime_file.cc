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

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace tidepool {
namespace {

using nlohmann::json;

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
  TP_RETURN_IF_ERROR(PrepareDirectory(RuntimeDirectory()));
  const std::string path = RuntimePath(runtime.pid), temporary = path + ".new";
  const std::string text = ToJson(runtime);
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

void RemoveRuntime(pid_t pid) { unlink(RuntimePath(pid).c_str()); }

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
      if (runtime.pid > 0 && kill(runtime.pid, 0) == 0) out.push_back(std::move(runtime));
    } catch (const json::exception&) {
      continue;
    }
  }
  return out;
}

}  // namespace tidepool
