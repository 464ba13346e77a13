#pragma once

#include <sys/stat.h>

#include <string>
#include <tuple>
#include <vector>

namespace tidepool {

// FileWatch: have files changed? By their place and time on disk, through links, so that a Kubernetes secret
// that is swapped below its link shows. Polled; not thread-safe.
class FileWatch {
 public:
  // Empty paths are left out.
  explicit FileWatch(std::vector<std::string> paths) : paths_(std::move(paths)) {
    std::erase(paths_, "");
    (void)Changed();
  }

  // True once for each change since the last call. A file that cannot be seen is one that differs from
  // itself.
  bool Changed() {
    std::vector<Stamp> now;
    for (const std::string& path : paths_) {
      struct stat s {};
      if (::stat(path.c_str(), &s) != 0) s = {};
      now.emplace_back(s.st_dev, s.st_ino, s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
    }
    const bool changed = now != stamps_;
    stamps_ = std::move(now);
    return changed;
  }

 private:
  using Stamp = std::tuple<dev_t, ino_t, off_t, time_t, long>;
  std::vector<std::string> paths_;
  std::vector<Stamp> stamps_;
};

}  // namespace tidepool
