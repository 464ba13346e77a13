#include "server/batch/input_index.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/small_file.h"
#include "base/status.h"

namespace tidepool {
namespace {

BatchLine TooLong(uint64_t number, size_t bytes_max) {
  BatchLine line;
  line.error = BatchError{"line_too_long", absl::StrCat("is longer than ", bytes_max, " bytes"), "", number};
  return line;
}

}  // namespace

absl::StatusOr<InputIndex> InputIndex::Build(const std::string& path, const Options& options) {
  InputIndex index;
  index.path_ = path;
  index.line_bytes_max_ = std::min<size_t>(options.line_bytes_max, UINT32_MAX - 1);
  uint64_t size = 0;
  TP_ASSIGN_OR_RETURN(const int fd, OpenRegularFile(path, size));
  index.file_ = FileHandle(fd);
  Sha256 digest;
  absl::Status ended;
  bool stopped = false;
  const auto on_bytes = [&](std::string_view bytes) {
    digest.Update(bytes);
    index.bytes_ += bytes.size();
    if (options.progress && !options.progress(index.bytes_)) stopped = true;
  };
  const auto on_line = [&](const FileLine& line) {
    if (stopped) return false;
    if (index.lines_.size() >= std::min<uint64_t>(options.lines_max, UINT32_MAX) ||
        line.number > UINT32_MAX) {
      ended = absl::InvalidArgumentError(
          absl::StrCat(path, ": has more than ", options.lines_max, " lines; split it"));
      return false;
    }
    const InputLine entry{line.offset, static_cast<uint32_t>(std::min<uint64_t>(line.bytes, UINT32_MAX)),
                          static_cast<uint32_t>(line.number)};
    const BatchLine parsed =
        line.too_long ? TooLong(line.number, index.line_bytes_max_) : ParseBatchLine(line.text, line.number);
    index.keys_.push_back({KeyOf(parsed.custom_id, line.number), static_cast<uint32_t>(index.lines_.size())});
    index.lines_.push_back(entry);
    return !options.on_line || options.on_line(entry, parsed);
  };
  TP_RETURN_IF_ERROR(ForEachLine(fd, path, index.line_bytes_max_, on_bytes, on_line));
  TP_RETURN_IF_ERROR(ended);
  if (stopped) return absl::CancelledError(absl::StrCat(path, ": reading was stopped"));
  std::sort(index.keys_.begin(), index.keys_.end());
  const Sha256Digest full = digest.Finish();
  index.digest_ = HexEncode(full);
  return index;
}

std::vector<InputIndex::Duplicate> InputIndex::Duplicates(size_t max) const {
  std::vector<Duplicate> out;
  size_t first = 0;
  for (size_t i = 1; i < keys_.size(); ++i) {
    if (keys_[i].key != keys_[first].key) {
      first = i;
    } else {
      out.push_back({lines_[keys_[i].index].number, lines_[keys_[first].index].number});
    }
  }
  std::ranges::sort(out, {}, &Duplicate::number);
  if (out.size() > max) out.resize(max);
  return out;
}

int64_t InputIndex::Find(const LineKey& key) const {
  const auto it = std::ranges::lower_bound(keys_, key, {}, &Key::key);
  return it == keys_.end() || it->key != key ? -1 : static_cast<int64_t>(it->index);
}

absl::StatusOr<BatchLine> InputIndex::Read(size_t index) const {
  const InputLine& line = lines_.at(index);
  if (line.bytes > line_bytes_max_) return TooLong(line.number, line_bytes_max_);
  TP_ASSIGN_OR_RETURN(const std::string text, ReadAt(file_.fd(), line.offset, line.bytes, path_));
  BatchLine parsed = ParseBatchLine(text, line.number);
  // The digest was taken once; a file that changes under a run must not answer under another line's name.
  if (Find(KeyOf(parsed.custom_id, line.number)) != static_cast<int64_t>(index)) {
    return absl::DataLossError(absl::StrCat(path_, ": line ", line.number, " changed while the batch ran"));
  }
  return parsed;
}

}  // namespace tidepool
