#include "server/batch/ordered_output.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "base/small_file.h"
#include "base/status.h"
#include "server/batch/batch_run.h"

namespace tidepool {
namespace {

constexpr size_t kWriteBytes = size_t{4} << 20;

absl::Status WriteInOrder(const std::vector<InputLine>& where, const std::string& from,
                          const std::string& to) {
  uint64_t bytes = 0;
  TP_ASSIGN_OR_RETURN(const int fd, OpenRegularFile(from, bytes));
  const FileHandle source(fd);
  const FileHandle target(::open(to.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!target.valid()) return ErrnoStatus(to, errno);
  std::string block;
  for (const InputLine& line : where) {
    TP_ASSIGN_OR_RETURN(const std::string text, ReadAt(source.fd(), line.offset, line.bytes, from));
    block.append(text).push_back('\n');
    if (block.size() < kWriteBytes) continue;
    TP_RETURN_IF_ERROR(WriteAll(target.fd(), block, to));
    block.clear();
  }
  TP_RETURN_IF_ERROR(WriteAll(target.fd(), block, to));
  return ::fsync(target.fd()) == 0 ? absl::OkStatus() : ErrnoStatus(to, errno);
}

}  // namespace

absl::Status PutInOrder(const InputIndex& index, const std::string& unordered, const std::string& output) {
  DoneLines done;
  std::vector<InputLine> where;
  // Held open: the lock keeps a second run away.
  TP_ASSIGN_OR_RETURN(const auto log, OpenOutput(unordered, index, done, &where));
  if (done.completed + done.failed < index.lines().size()) return absl::OkStatus();
  const std::string temporary = output + ".new";
  if (const absl::Status status = WriteInOrder(where, unordered, temporary); !status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  if (::rename(temporary.c_str(), output.c_str()) != 0) return ErrnoStatus(output, errno);
  TP_RETURN_IF_ERROR(SyncDirectoryOf(output));
  if (::unlink(unordered.c_str()) != 0) return ErrnoStatus(unordered, errno);
  return SyncDirectoryOf(output);
}

}  // namespace tidepool
