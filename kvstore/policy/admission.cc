#include "kvstore/policy/admission.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "absl/container/flat_hash_map.h"
#include "base/rng.h"

namespace tidepool {

namespace {

uint64_t Short(const BlockKey& key) {
  uint64_t v;
  std::memcpy(&v, key.bytes.data(), sizeof v);
  return v;
}

class AlwaysAdmit final : public AdmissionFilter {
 public:
  std::string_view name() const override { return "always"; }
  void OnUse(const BlockKey&) override {}
  bool Admit(const BlockKey&, const BlockKey*) const override { return true; }
};

class Frequent final : public AdmissionFilter {
 public:
  explicit Frequent(size_t capacity) : round_(std::max(capacity, kMinRound)) {}
  std::string_view name() const override { return "frequent"; }
  void OnUse(const BlockKey& key) override {
    uint32_t& score = scores_[Short(key)];
    score = std::min(kMaxScore, score == 0 ? 1 : 2 * score);
    if (++uses_ < round_) return;
    uses_ = 0;
    // A round adds at most one entry per use and each round takes 1 from all of them, so entries are bounded.
    absl::erase_if(scores_, [](auto& entry) { return --entry.second == 0; });
  }
  bool Admit(const BlockKey& key, const BlockKey*) const override {
    const auto it = scores_.find(Short(key));
    return it != scores_.end() && it->second >= kWritten;
  }

 private:
  static constexpr uint32_t kWritten = 2;
  static constexpr uint32_t kMaxScore = 64;  // forgotten after as many rounds
  static constexpr size_t kMinRound = 256;

  const size_t round_;
  absl::flat_hash_map<uint64_t, uint32_t> scores_;
  size_t uses_ = 0;
};

class TinyLfu final : public AdmissionFilter {
 public:
  explicit TinyLfu(size_t capacity)
      : period_(kPeriod * std::max(capacity, kMinCapacity)),
        mask_(std::bit_ceil(std::max(capacity, kMinCapacity)) - 1),
        seen_((kSeenBits * (mask_ + 1) + 63) / 64) {
    for (auto& row : rows_) row.resize((mask_ + 2) / 2);
  }
  std::string_view name() const override { return "tinylfu"; }
  void OnUse(const BlockKey& key) override {
    const uint64_t h = Short(key);
    if (!MarkSeen(h)) {
      // First use in this period: one bit, no counter.
    } else {
      for (size_t r = 0; r < rows_.size(); ++r) Increment(rows_[r], Column(h, r));
    }
    if (++uses_ < period_) return;
    uses_ /= 2;
    for (auto& row : rows_) {
      for (uint8_t& pair : row) pair = (pair >> 1) & 0x77;
    }
    std::fill(seen_.begin(), seen_.end(), 0);
  }
  bool Admit(const BlockKey& key, const BlockKey* victim) const override {
    return victim == nullptr || Estimate(Short(key)) > Estimate(Short(*victim));
  }

 private:
  static constexpr size_t kPeriod = 10;
  static constexpr size_t kMinCapacity = 64;
  static constexpr size_t kSeenBits = 8;  // per counter

  size_t Column(uint64_t h, size_t row) const { return Mix64(h + row) & mask_; }
  std::array<size_t, 2> SeenAt(uint64_t h) const {
    const uint64_t m = Mix64(~h);
    const size_t bits = 64 * seen_.size();
    return {static_cast<size_t>(m >> 32) % bits, static_cast<size_t>(m & 0xffffffff) % bits};
  }
  bool Seen(uint64_t h) const {
    const auto at = SeenAt(h);
    return std::all_of(at.begin(), at.end(), [&](size_t b) { return seen_[b / 64] >> (b % 64) & 1; });
  }
  // Whether it was seen before.
  bool MarkSeen(uint64_t h) {
    if (Seen(h)) return true;
    for (const size_t b : SeenAt(h)) seen_[b / 64] |= uint64_t{1} << (b % 64);
    return false;
  }
  static uint32_t Get(const std::vector<uint8_t>& row, size_t i) { return row[i / 2] >> (4 * (i % 2)) & 15; }
  static void Increment(std::vector<uint8_t>& row, size_t i) {
    if (Get(row, i) < 15) row[i / 2] = static_cast<uint8_t>(row[i / 2] + (1 << (4 * (i % 2))));
  }
  uint32_t Estimate(uint64_t h) const {
    uint32_t least = 15;
    for (size_t r = 0; r < rows_.size(); ++r) least = std::min(least, Get(rows_[r], Column(h, r)));
    return least + (Seen(h) ? 1 : 0);
  }

  const size_t period_;
  const size_t mask_;
  std::array<std::vector<uint8_t>, 4> rows_;  // two counters to a byte
  std::vector<uint64_t> seen_;
  size_t uses_ = 0;
};

}  // namespace

std::vector<std::string_view> AdmissionNames() { return {"always", "frequent", "tinylfu"}; }

absl::StatusOr<std::unique_ptr<AdmissionFilter>> CreateAdmissionFilter(std::string_view name,
                                                                       size_t capacity) {
  std::unique_ptr<AdmissionFilter> filter;
  if (name == "always") filter = std::make_unique<AlwaysAdmit>();
  if (name == "frequent") filter = std::make_unique<Frequent>(capacity);
  if (name == "tinylfu") filter = std::make_unique<TinyLfu>(capacity);
  if (filter == nullptr)
    return absl::InvalidArgumentError("admission filter: none is called '" + std::string(name) +
                                      "'; there are always, frequent and tinylfu");
  return filter;
}

}  // namespace tidepool
