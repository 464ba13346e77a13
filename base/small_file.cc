#include "base/small_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {
namespace {

absl::Status FileError(const std::string& path, int error) {
  const std::string message = absl::StrCat(path, ": ", std::strerror(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(message);
    case ELOOP:
    case ENAMETOOLONG:
    case ENXIO:  // a socket, or a device without a driver
      return absl::InvalidArgumentError(message);
    default:
      return absl::UnavailableError(message);
  }
}

}  // namespace

absl::StatusOr<int> OpenRegularFile(const std::string& path, uint64_t& bytes) {
  // O_NONBLOCK: opening a pipe without a writer would wait for one. It changes nothing for a regular file.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) return FileError(path, errno);
  struct stat st {};
  if (fstat(fd, &st) != 0) {
    const int error = errno;
    close(fd);
    return FileError(path, error);
  }
  if (!S_ISREG(st.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(
        absl::StrCat(path, S_ISDIR(st.st_mode) ? ": a directory, not a file" : ": not a regular file"));
  }
  bytes = static_cast<uint64_t>(st.st_size);
  return fd;
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) {
  uint64_t bytes = 0;
  TP_ASSIGN_OR_RETURN(const int fd, OpenRegularFile(path, bytes));
  if (bytes > bytes_max) {
    close(fd);
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", bytes, " bytes; at most ", bytes_max, " are read"));
  }
  std::string out(bytes, '\0');
  size_t done = 0;
  int error = 0;
  while (done < out.size()) {
    const ssize_t n = read(fd, out.data() + done, out.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) error = errno;
    if (n <= 0) break;  // 0: somebody cut the file meanwhile
    done += static_cast<size_t>(n);
  }
  close(fd);
  if (error != 0) return FileError(path, error);
  out.resize(done);
  return out;
}

}  // namespace tidepool
