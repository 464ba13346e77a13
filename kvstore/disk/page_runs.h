#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace tidepool {

// PageRuns: which pages of a file are free, as runs. Core; memory and time follow the number of runs, not of
// pages. Not thread-safe.
class PageRuns {
 public:
  struct Run {
    uint64_t page = 0;
    uint64_t pages = 0;
  };

  explicit PageRuns(uint64_t pages) : free_pages_(pages) {
    if (pages > 0) Add(0, pages);
  }

  // `n` >= 1 pages in a row: of the shortest run that has them, the front one where several are equal.
  // nullopt: no run is that long.
  std::optional<uint64_t> Take(uint64_t n) {
    const auto it = by_length_.lower_bound({n, 0});
    if (it == by_length_.end()) return std::nullopt;
    const auto [length, page] = *it;
    Cut(page, length, page, n);
    return page;
  }

  // These pages; false where some of them are not free.
  bool TakeAt(uint64_t page, uint64_t n) {
    auto it = by_page_.upper_bound(page);
    if (n == 0 || it == by_page_.begin()) return false;
    --it;
    const auto [start, length] = *it;
    if (page - start > length || length - (page - start) < n) return false;
    Cut(start, length, page, n);
    return true;
  }

  // Back again, joined with what is free beside them.
  void Give(uint64_t page, uint64_t n) {
    free_pages_ += n;
    auto after = by_page_.lower_bound(page);
    if (after != by_page_.end() && after->first == page + n) {
      n += after->second;
      by_length_.erase({after->second, after->first});
      after = by_page_.erase(after);
    }
    if (after != by_page_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == page) {
        page = before->first;
        n += before->second;
        by_length_.erase({before->second, before->first});
        by_page_.erase(before);
      }
    }
    Add(page, n);
  }

  // The longest run; of no pages where nothing is free.
  Run Longest() const {
    if (by_length_.empty()) return {};
    return {by_length_.rbegin()->second, by_length_.rbegin()->first};
  }
  uint64_t free_pages() const { return free_pages_; }

 private:
  void Add(uint64_t page, uint64_t n) {
    by_page_.emplace(page, n);
    by_length_.emplace(n, page);
  }
  // Takes [page, page + n) out of the run [start, start + length).
  void Cut(uint64_t start, uint64_t length, uint64_t page, uint64_t n) {
    by_page_.erase(start);
    by_length_.erase({length, start});
    if (page > start) Add(start, page - start);
    if (page + n < start + length) Add(page + n, start + length - page - n);
    free_pages_ -= n;
  }

  std::map<uint64_t, uint64_t> by_page_;               // start to length
  std::set<std::pair<uint64_t, uint64_t>> by_length_;  // length and start
  uint64_t free_pages_;
};

}  // namespace tidepool
