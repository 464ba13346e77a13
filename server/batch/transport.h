#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace tidepool {

struct BatchCall {
  std::string url;   // one of BatchUrls()
  std::string body;  // JSON
};

struct BatchReply {
  // OK: a server answered, with whatever `http_status`. Else: Unavailable (no connection), DeadlineExceeded,
  // Cancelled, DataLoss (the answer broke off, or is no JSON), ResourceExhausted (it is too large).
  absl::Status status;
  int http_status = 0;
  std::string request_id;
  std::string body;  // JSON on one line
  absl::Duration retry_after = absl::ZeroDuration();
};

// BatchTransport: where a batch's lines are answered. Thread-safe.
class BatchTransport {
 public:
  class InFlight {
   public:
    virtual ~InFlight() = default;
    // The call ends soon, with Cancelled unless it had ended. From any thread; later calls do nothing.
    virtual void Cancel() = 0;
  };
  // `ahead`: the prompt is computed and the first token is there; at most once, before `done`, and never
  // where a transport cannot know. `done`: exactly once. Both on any thread, neither may block; both may run
  // before Send returns.
  struct Callbacks {
    std::function<void()> ahead;
    std::function<void(BatchReply)> done;
  };

  virtual ~BatchTransport() = default;
  virtual std::shared_ptr<InFlight> Send(BatchCall call, Callbacks callbacks) = 0;
};

}  // namespace tidepool
