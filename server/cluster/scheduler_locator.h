#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tidepool/v1/member.pb.h"

namespace tidepool {

// Metadata of every call from or to a scheduler of a cluster with etcd: the highest term that the caller
// knows; a scheduler's calls: the term that it leads.
inline constexpr char kSchedulerTermHeader[] = "x-tidepool-scheduler-term";

void AddSchedulerTerm(grpc::ClientContext& context, uint64_t term);
// 0: none was sent, or it is no number.
uint64_t SchedulerTermOf(const grpc::ServerContextBase& context);

// SchedulerLocator: whom to ask for placements and to report to. Thread-safe.
class SchedulerLocator {
 public:
  struct Place {
    std::string address;  // host:port; empty: none is known now, ask again soon
    uint64_t term = 0;    // 0: there are no terms

    bool operator==(const Place&) const = default;
  };

  virtual ~SchedulerLocator() = default;
  virtual Place Get() const = 0;
  // A scheduler said that it leads this term. False: it is older than what is known, and is not to be obeyed.
  virtual bool Obey(uint64_t term) = 0;
};

// The one of the configuration.
class FixedScheduler final : public SchedulerLocator {
 public:
  explicit FixedScheduler(std::string address) : place_{.address = std::move(address), .term = 0} {}
  Place Get() const override { return place_; }
  bool Obey(uint64_t) override { return true; }

 private:
  const Place place_;
};

// Leadership: what a scheduler that may stand by asks before it answers. Thread-safe.
class Leadership {
 public:
  virtual ~Leadership() = default;
  // The term that this process leads; nullopt: it does not. `callers_term`: the highest that the caller
  // knows; a higher one than ours ends our leadership.
  virtual std::optional<uint64_t> Term(uint64_t callers_term) = 0;
  // Who leads, as far as known; empty: nobody.
  virtual std::string LeaderAddress() const = 0;
  // Everybody who has joined, as last seen. Workers and stores are those that a scheduler has accepted.
  virtual std::vector<v1::Member> Members() const = 0;
  // Etcd answered last time; else all of this is as it was then.
  virtual bool EtcdReachable() const = 0;
};

}  // namespace tidepool
