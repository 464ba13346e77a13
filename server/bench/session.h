#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// A stretch of made-up prompt: equal pieces give equal text, so that prompts that begin with the same pieces
// share a prefix.
struct PromptPiece {
  uint64_t seed = 0;
  uint32_t tokens = 0;
};

struct ChatMessage {
  std::string role, content;
};

// One request of a conversation: made-up text, or (pieces empty) messages from a file.
struct Turn {
  std::vector<PromptPiece> pieces;
  std::vector<ChatMessage> messages;
  uint32_t output_tokens = 0;
  absl::Duration think;  // from the end of the answer before to this turn's planned start
};

// A conversation: each turn carries all before it, and waits for their answers. Mostly of one turn.
struct Session {
  std::optional<absl::Duration> start;  // planned, from the run's start; nullopt: as the arrivals say
  std::vector<Turn> turns;              // not empty
};

// SessionSource: the work of a load, one session after the other, in the order of their starts.
// Deterministic; not thread-safe.
class SessionSource {
 public:
  virtual ~SessionSource() = default;
  // nullopt: there is no more, for good.
  virtual std::optional<Session> Next() = 0;
};

}  // namespace tidepool
