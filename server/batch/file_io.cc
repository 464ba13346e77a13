#include "server/batch/file_io.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {
namespace {

constexpr size_t kReadBytes = size_t{1} << 20;

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Cuts a file's bytes into lines.
class LineCutter {
 public:
  LineCutter(size_t bytes_max, const std::function<bool(const FileLine&)>& line)
      : bytes_max_(bytes_max), line_(line) {}

  // False: stopped.
  bool Take(std::string_view chunk) {
    for (size_t end = chunk.find('\n'); end != chunk.npos; end = chunk.find('\n')) {
      if (!End(chunk.substr(0, end), true)) return false;
      ++offset_;  // the line's end
      chunk.remove_prefix(end + 1);
    }
    Keep(chunk);
    return true;
  }
  bool Finish() { return bytes_ == 0 || End({}, false); }

 private:
  void Keep(std::string_view part) {
    bytes_ += part.size();
    if (bytes_ <= bytes_max_) {
      rest_.append(part);
    } else {
      std::string().swap(rest_);
    }
  }
  bool End(std::string_view part, bool whole) {
    std::string_view text = part;
    if (bytes_ > 0) {
      Keep(part);
      text = rest_;
    } else {
      bytes_ = part.size();
    }
    FileLine line{offset_, ++number_, bytes_, text, whole, bytes_ > bytes_max_};
    if (line.too_long) line.text = {};
    const bool blank = !line.too_long && text.find_first_not_of(" \t\r") == text.npos;
    const bool go_on = blank || line_(line);
    offset_ += bytes_;
    bytes_ = 0;
    rest_.clear();
    return go_on;
  }

  const size_t bytes_max_;
  const std::function<bool(const FileLine&)>& line_;
  std::string rest_;    // of the unfinished line, while it is not too long
  uint64_t bytes_ = 0;  // of the unfinished line
  uint64_t offset_ = 0, number_ = 0;
};

}  // namespace

FileHandle& FileHandle::operator=(FileHandle&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = other.Release();
  }
  return *this;
}

FileHandle::~FileHandle() {
  if (fd_ >= 0) close(fd_);
}

int FileHandle::Release() { return std::exchange(fd_, -1); }

absl::Status ErrnoStatus(std::string_view path, int error) {
  const std::string message = absl::StrCat(std::string(path), ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    case EISDIR:
      return absl::InvalidArgumentError(message);
    default:
      return absl::UnavailableError(message);
  }
}

absl::Status WriteAll(int fd, std::string_view bytes, std::string_view path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(path, errno);
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadAt(int fd, uint64_t offset, size_t bytes, std::string_view path) {
  std::string out(bytes, '\0');
  for (size_t have = 0; have < bytes;) {
    const ssize_t n = ::pread(fd, out.data() + have, bytes - have, static_cast<off_t>(offset + have));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(path, errno);
    if (n == 0)
      return absl::DataLossError(absl::StrCat(std::string(path), ": became shorter while it was read"));
    have += static_cast<size_t>(n);
  }
  return out;
}

absl::Status SyncDirectoryOf(const std::string& path) {
  const std::string dir = DirectoryOf(path);
  const FileHandle handle(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // Some file systems know no fsync of a directory (EINVAL): nothing more can be done there.
  if (!handle.valid() || (::fsync(handle.fd()) != 0 && errno != EINVAL)) return ErrnoStatus(dir, errno);
  return absl::OkStatus();
}

absl::Status WriteFileAtomically(const std::string& path, std::string_view text) {
  const std::string temporary = path + ".new";
  absl::Status status;
  {
    const FileHandle file(
        ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!file.valid()) return ErrnoStatus(temporary, errno);
    status = WriteAll(file.fd(), text, temporary);
    if (status.ok() && ::fsync(file.fd()) != 0) status = ErrnoStatus(temporary, errno);
  }
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) status = ErrnoStatus(path, errno);
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  return SyncDirectoryOf(path);
}

absl::Status ForEachLine(int fd, std::string_view path, size_t line_bytes_max,
                         const std::function<void(std::string_view)>& bytes,
                         const std::function<bool(const FileLine&)>& line) {
  std::vector<char> buffer(kReadBytes);
  LineCutter cutter(line_bytes_max, line);
  uint64_t offset = 0;
  for (;;) {
    const ssize_t n = ::pread(fd, buffer.data(), buffer.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(path, errno);
    if (n == 0) break;
    const std::string_view chunk(buffer.data(), static_cast<size_t>(n));
    offset += chunk.size();
    if (bytes) bytes(chunk);
    if (line && !cutter.Take(chunk)) return absl::OkStatus();
  }
  if (line) cutter.Finish();
  return absl::OkStatus();
}

}  // namespace tidepool
