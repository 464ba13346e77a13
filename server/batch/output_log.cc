#include "server/batch/output_log.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"

namespace tidepool {
namespace {

// An answer is a line, and bodies of foreign servers can be large.
constexpr size_t kOutputLineBytesMax = size_t{512} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<OutputLog>> OutputLog::Open(
    const std::string& path, const std::function<absl::Status(const DoneLine&, const FileLine&)>& on_line) {
  FileHandle file(::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600));
  if (!file.valid()) return ErrnoStatus(path, errno);
  struct stat st {};
  if (::fstat(file.fd(), &st) != 0) return ErrnoStatus(path, errno);
  if (!S_ISREG(st.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  if (::flock(file.fd(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": another process is writing it"));
  }
  uint64_t end = 0;  // of the last whole line
  absl::Status failed;
  const auto take = [&](const FileLine& line) {
    if (!line.whole) return false;
    if (line.too_long) {
      failed = absl::InvalidArgumentError(absl::StrCat(path, ": line ", line.number, " is too long"));
      return false;
    }
    auto done = ParseDoneLine(line.text);
    failed = done.ok() ? on_line(*done, line)
                       : Annotate(done.status(), absl::StrCat(path, ": line ", line.number));
    if (!failed.ok()) return false;
    end = line.offset + line.bytes + 1;
    return true;
  };
  TP_RETURN_IF_ERROR(ForEachLine(file.fd(), path, kOutputLineBytesMax, nullptr, take));
  TP_RETURN_IF_ERROR(failed);
  const auto size = static_cast<uint64_t>(st.st_size);
  if (end < size) {
    spdlog::warn("cut {} bytes of an unfinished line off {}", size - end, path);
    if (::ftruncate(file.fd(), static_cast<off_t>(end)) != 0) return ErrnoStatus(path, errno);
  }
  if (::fsync(file.fd()) != 0) return ErrnoStatus(path, errno);
  TP_RETURN_IF_ERROR(SyncDirectoryOf(path));
  return std::unique_ptr<OutputLog>(new OutputLog(path, std::move(file), end));
}

OutputLog::OutputLog(std::string path, FileHandle file, uint64_t bytes)
    : path_(std::move(path)), file_(std::move(file)), bytes_(bytes) {
  thread_ = std::thread([this] { Run(); });
}

OutputLog::~OutputLog() {
  {
    std::lock_guard lock(mu_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void OutputLog::Append(std::string line) {
  {
    std::lock_guard lock(mu_);
    if (!status_.ok()) return;
    bytes_ += line.size();
    queued_.append(line);
  }
  wake_.notify_one();
}

void OutputLog::Run() {
  std::unique_lock lock(mu_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || !queued_.empty(); });
    if (queued_.empty()) return;
    // While this group goes to the disk the next one gathers.
    const std::string group = std::exchange(queued_, {});
    writing_bytes_ = group.size();
    lock.unlock();
    absl::Status status = WriteAll(file_.fd(), group, path_);
    if (status.ok() && ::fdatasync(file_.fd()) != 0) status = ErrnoStatus(path_, errno);
    lock.lock();
    writing_bytes_ = 0;
    if (!status.ok() && status_.ok()) {
      spdlog::error("{}", std::string(status.message()));
      status_ = status;
      queued_.clear();
    }
    durable_.notify_all();
  }
}

size_t OutputLog::backlog_bytes() const {
  std::lock_guard lock(mu_);
  return queued_.size() + writing_bytes_;
}

uint64_t OutputLog::bytes() const {
  std::lock_guard lock(mu_);
  return bytes_;
}

absl::Status OutputLog::Flush() {
  std::unique_lock lock(mu_);
  durable_.wait(lock, [&] { return !status_.ok() || (queued_.empty() && writing_bytes_ == 0); });
  return status_;
}

absl::Status OutputLog::status() const {
  std::lock_guard lock(mu_);
  return status_;
}

}  // namespace tidepool
