#include "kvstore/disk/disk_directory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "kvstore/disk/crc32c.h"

// FORMAT is two lines of text: "tidepool disk tier format 1 record BYTES" and the CRC-32C of that line in
// hex.

namespace tidepool {
namespace {

constexpr std::string_view kFormatStart = "tidepool disk tier format ";
constexpr int kFormatVersion = 1;

absl::Status Errno(int error, std::string_view what) {
  const std::string text = absl::StrCat(std::string(what), ": ", std::generic_category().message(error));
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(text);
  return absl::UnavailableError(text);
}

std::string FormatLine(int version, uint64_t record_bytes) {
  return absl::StrCat(std::string(kFormatStart), version, " record ", record_bytes);
}

std::string LineCrc(std::string_view line) {
  return absl::StrCat(absl::Hex(Crc32c(std::as_bytes(std::span(line.data(), line.size()))), absl::kZeroPad8));
}

absl::Status WriteFormat(const std::string& path, uint64_t record_bytes) {
  const std::string line = FormatLine(kFormatVersion, record_bytes);
  const std::string text = line + "\n" + LineCrc(line) + "\n", fresh = path + ".new";
  const int fd = open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return Errno(errno, fresh);
  const ssize_t n = write(fd, text.data(), text.size());
  const int error = n < 0 ? errno : static_cast<size_t>(n) < text.size() ? ENOSPC : 0;
  close(fd);
  if (error != 0) return Errno(error, fresh);
  if (rename(fresh.c_str(), path.c_str()) != 0) return Errno(errno, path);
  return absl::OkStatus();
}

// Bytes that a person recognises.
std::string Size(uint64_t bytes) {
  return bytes < (uint64_t{10} << 30) ? absl::StrCat(bytes >> 20, " MiB") : absl::StrCat(bytes >> 30, " GiB");
}

}  // namespace

DiskDirectory::DiskDirectory(DiskDirectory&& other) noexcept { *this = std::move(other); }

DiskDirectory& DiskDirectory::operator=(DiskDirectory&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(lock_fd_, other.lock_fd_);
  std::swap(blocks_fd_, other.blocks_fd_);
  std::swap(direct_, other.direct_);
  std::swap(fresh_, other.fresh_);
  return *this;
}

DiskDirectory::~DiskDirectory() {
  if (blocks_fd_ >= 0) close(blocks_fd_);
  if (lock_fd_ >= 0) close(lock_fd_);
}

absl::StatusOr<DiskDirectory> DiskDirectory::Open(const Options& options) {
  DiskDirectory dir;
  TP_RETURN_IF_ERROR(dir.Lock(options));
  TP_RETURN_IF_ERROR(dir.CheckFormat(options));
  TP_RETURN_IF_ERROR(dir.OpenBlocks(options));
  return dir;
}

absl::Status DiskDirectory::Lock(const Options& options) {
  const auto give_up = absl::Now() + options.lock_wait;
  for (size_t i = 0; i < options.max_tiers;) {
    path_ = options.path + "/" + options.name + (i == 0 ? "" : absl::StrCat("-", i));
    std::error_code error;
    std::filesystem::create_directories(path_, error);
    if (error) return Errno(error.value(), path_);
    // KV is as confidential as the prompts that it was made from.
    (void)!chmod(path_.c_str(), 0700);
    const std::string lock = path_ + "/LOCK";
    if (lock_fd_ >= 0) close(lock_fd_);
    lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (lock_fd_ < 0) return Errno(errno, lock);
    if (flock(lock_fd_, LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
    if (errno != EWOULDBLOCK && errno != EINTR) return Errno(errno, lock);
    if (i == 0 && absl::Now() < give_up) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    } else {
      ++i;
    }
  }
  return absl::UnavailableError(absl::StrCat(
      options.path, "/", options.name, ": held by another process, and so are the ", options.max_tiers - 1,
      " directories for further workers of that name; give workers ids of their own (worker.id) or another "
      "kv.disk.path"));
}

absl::Status DiskDirectory::CheckFormat(const Options& options) {
  const std::string file = path_ + "/FORMAT";
  const auto text = ReadSmallFile(file, 4096);
  if (!text.ok() && !absl::IsNotFound(text.status()) && !absl::IsInvalidArgument(text.status()))
    return text.status();
  if (text.ok()) {
    const std::string_view all = *text;
    const std::string_view line = all.substr(0, all.find('\n'));
    const bool whole = all == absl::StrCat(std::string(line), "\n", LineCrc(line), "\n");
    if (whole && line == FormatLine(kFormatVersion, options.record_bytes)) return absl::OkStatus();
    int version = 0;
    if (whole && line.starts_with(kFormatStart)) {
      const std::string_view rest = line.substr(kFormatStart.size());
      std::from_chars(rest.data(), rest.data() + rest.size(), version);
    }
    if (version != 0 && version != kFormatVersion)
      return absl::FailedPreconditionError(
          absl::StrCat(path_, ": written in format ", version, ", this version of Tidepool uses format ",
                       kFormatVersion, "; remove the directory (it is a cache) or set another kv.disk.path"));
    spdlog::info("disk tier: {}: starting anew ({})", path_,
                 whole ? "its records have another size" : "its FORMAT is damaged");
  }
  fresh_ = true;
  return WriteFormat(file, options.record_bytes);
}

absl::Status DiskDirectory::OpenBlocks(const Options& options) {
  const std::string file = path_ + "/blocks";
  const int flags = O_RDWR | O_CREAT | O_CLOEXEC;
  blocks_fd_ = open(file.c_str(), flags | O_DIRECT, 0600);
  direct_ = blocks_fd_ >= 0;
  if (blocks_fd_ < 0 && errno == EINVAL) {
    blocks_fd_ = open(file.c_str(), flags, 0600);
    spdlog::info("disk tier: {}: the file system has no direct I/O; going through the page cache", file);
  }
  if (blocks_fd_ < 0) return Errno(errno, file);
  struct stat st {};
  if (fstat(blocks_fd_, &st) != 0) return Errno(errno, file);
  if (!S_ISREG(st.st_mode)) return absl::UnavailableError(file + ": not a regular file");
  const auto had = static_cast<uint64_t>(st.st_size);
  if (had == 0) fresh_ = true;
  if (had > options.file_bytes && ftruncate(blocks_fd_, static_cast<off_t>(options.file_bytes)) != 0)
    return Errno(errno, file);
  if (options.preallocate) {
    int rc = 0;
    do {
      rc = fallocate(blocks_fd_, 0, 0, static_cast<off_t>(options.file_bytes));
    } while (rc != 0 && errno == EINTR);
    if (rc == 0) return absl::OkStatus();
    const int error = errno;
    if (error == ENOSPC || error == EDQUOT) {
      (void)!ftruncate(blocks_fd_, static_cast<off_t>(std::min(had, options.file_bytes)));
      struct statvfs fs {};
      const uint64_t room = fstatvfs(blocks_fd_, &fs) == 0 ? uint64_t{fs.f_bavail} * fs.f_frsize : 0;
      return absl::ResourceExhaustedError(absl::StrCat(
          file, ": no room for kv.disk.bytes (", Size(options.file_bytes), "); ", Size(room), " are free"));
    }
    if (error != EOPNOTSUPP) return Errno(error, file);
    spdlog::info("disk tier: {}: the file system cannot set room aside; the file grows as it is written",
                 file);
  }
  if (had < options.file_bytes && ftruncate(blocks_fd_, static_cast<off_t>(options.file_bytes)) != 0)
    return Errno(errno, file);
  return absl::OkStatus();
}

}  // namespace tidepool
