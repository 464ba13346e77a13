#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace tidepool {

// TokenConstraint: what a sequence's answer is held to, token by token (a grammar's matcher, as the worker
// makes it). The engine calls it from its own thread and from its mask worker, never from both at once.
//
// Calls go: FillMask, Accept (of a token that the mask allowed), FillMask, ... An error ends the sequence
// with that status, and nobody else's.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  // Sets bit i % 32 of bits[i / 32] for each token i that may come next, clears all others. Bits that do not
  // stand for a token are cleared. Stop tokens are the engine's business. May take long: it runs beside the
  // forward pass.
  virtual absl::Status FillMask(std::span<uint32_t> bits) = 0;
  // The answer goes on with `token`. Must be quick: the whole batch waits. InvalidArgument: it may not.
  virtual absl::Status Accept(int32_t token) = 0;
  // The answer is complete as it stands.
  virtual bool CanEnd() const = 0;
  // CanEnd, and nothing can follow.
  virtual bool MustEnd() const = 0;
};

}  // namespace tidepool
