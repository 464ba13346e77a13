#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "kvstore/disk/disk_io.h"

namespace tidepool {

// DiskFaults: what a test does to a disk. Thread-safe.
struct DiskFaults {
  std::atomic<int> write_error{0};  // errno of every write from now on
  std::atomic<int> read_error{0};
  std::atomic<int64_t> delay_ms{0};           // of every operation that ends from now on
  std::atomic<bool> hang{false};              // operations that end stay unseen until it is false again
  std::atomic<uint64_t> reads{0}, writes{0};  // submitted
};

// FaultyDiskIo: a real DiskIo whose completions come late, wrong or not at all.
class FaultyDiskIo final : public DiskIo {
 public:
  FaultyDiskIo(std::unique_ptr<DiskIo> real, std::shared_ptr<DiskFaults> faults)
      : real_(std::move(real)), faults_(std::move(faults)) {}

  void Attach(int fd) override { real_->Attach(fd); }
  void Submit(const Op& op) override {
    ++(op.write ? faults_->writes : faults_->reads);
    const int error = op.write ? faults_->write_error : faults_->read_error;
    if (error != 0) {
      late_.push_back({{op.tag, error}, Clock::Real().Now()});
    } else {
      real_->Submit(op);
    }
  }
  void Wait(absl::Duration timeout, std::vector<Completion>& out) override {
    const absl::Time end = Clock::Real().Now() + timeout;
    while (true) {
      absl::Duration wait = std::max(end - Clock::Real().Now(), absl::ZeroDuration());
      // Switches of the test are looked at every few milliseconds.
      if (!late_.empty()) wait = std::min(wait, absl::Milliseconds(2));
      std::vector<Completion> done;
      real_->Wait(wait, done);
      const absl::Time now = Clock::Real().Now();
      for (const Completion& c : done)
        late_.push_back({c, now + absl::Milliseconds(faults_->delay_ms.load())});
      const size_t before = out.size();
      if (!faults_->hang) {
        std::erase_if(late_, [&](const auto& late) {
          if (now < late.second) return false;
          out.push_back(late.first);
          return true;
        });
      }
      if (out.size() > before || done.empty()) return;
    }
  }
  void Wake() override { real_->Wake(); }
  std::string Describe() const override { return "faulty " + real_->Describe(); }

 private:
  const std::unique_ptr<DiskIo> real_;
  const std::shared_ptr<DiskFaults> faults_;
  std::vector<std::pair<Completion, absl::Time>> late_;
};

}  // namespace tidepool
