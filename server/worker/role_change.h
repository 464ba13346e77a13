#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tidepool/v1/cluster.pb.h"

namespace tidepool {

// prefill, decode, both or store; unknown for what is none of them.
const char* RoleText(v1::Role role);

// RoleChange: which work a worker takes, and how it comes to take another kind while it runs. Core: no thread
// and no clock of its own; under its own lock, so thread-safe.
//
// A worker that is to give up one kind of work (prefill to decode, both to prefill, ...) says that it drains,
// so that nobody is placed on it, and changes when the scheduler has heard that and the last request of that
// kind has ended. One that only gains a kind (prefill to both) changes at once. What was placed before the
// scheduler heard of it may come late, of a request that waited for slots elsewhere: it is served for
// kLateCalls, as every worker can do both. So nothing fails and nothing is computed twice.
class RoleChange {
 public:
  static constexpr absl::Duration kLateCalls = absl::Seconds(60);

  struct State {
    v1::Role role = v1::ROLE_UNSPECIFIED;
    v1::Role next = v1::ROLE_UNSPECIFIED;  // unspecified: it stays what it is

    bool changing() const { return next != v1::ROLE_UNSPECIFIED; }
    bool operator==(const State&) const = default;
  };
  // Requests whose outcome is open.
  struct Active {
    uint32_t generate = 0;
    uint32_t prefill = 0;  // for others
  };

  explicit RoleChange(v1::Role configured) : state_{.role = configured} {}

  State Get() const;
  // From now on it is to be `wanted`; its role of now ends a change that is not done. InvalidArgument: no
  // role of a worker's.
  absl::StatusOr<State> Order(v1::Role wanted);
  // Makes the change that waits for nothing any more. `told`: what the scheduler has heard last; where that
  // is not Get() as it is by now, it waits. True: Get() says something else now.
  bool Advance(const std::optional<State>& told, Active active, absl::Time now);

  bool TakesGenerate(absl::Time now) const { return Takes(v1::ROLE_DECODE, now); }
  bool TakesPrefill(absl::Time now) const { return Takes(v1::ROLE_PREFILL, now); }

 private:
  bool Takes(v1::Role kind, absl::Time now) const;
  // Holds mu_.
  void Become(v1::Role role);

  mutable std::mutex mu_;
  State state_;
  // The kind of work that was given up last, and when; unspecified: none.
  v1::Role given_up_ = v1::ROLE_UNSPECIFIED;
  absl::Time given_up_at_;
};

}  // namespace tidepool
