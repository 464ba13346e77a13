#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "server/bench/arrivals.h"
#include "server/bench/http_client.h"
#include "server/bench/prompt_writer.h"
#include "server/bench/report.h"
#include "server/bench/request_record.h"
#include "server/bench/session.h"

namespace tidepool {

// What the requests of a load look like.
struct RequestShape {
  HttpUrl url;
  std::string target;  // /v1/chat/completions
  bool chat = false;
  std::string model;
  HttpHeaders headers;  // Authorization and others
  bool ignore_eos = false;
  bool return_trace = false;
  std::optional<double> temperature;
  // Fields that are added to each body, or put in the place of ours.
  nlohmann::ordered_json extra = nlohmann::ordered_json::object();
  PromptWriter prompts = PromptWriter::Words(1, 0);
  absl::Duration timeout = absl::Minutes(10);
  bool keep_text = false;
};

struct LoadOptions {
  uint64_t requests_max = UINT64_MAX;  // turns
  // No request is planned later than this; those under way are waited for.
  absl::Duration duration = absl::InfiniteDuration();
  // For sessions that say no start themselves. Rate 0: the next starts when a place is free.
  ArrivalSpec arrivals;
  // Requests under way, or, in a closed loop, conversations; 0: no cap.
  size_t concurrency_max = 0;
  uint64_t seed = 0;
};

struct LoadProgress {
  absl::Duration elapsed;
  uint64_t planned_max = UINT64_MAX;  // UINT64_MAX: not known
  uint64_t sent = 0, done = 0, failed = 0, output_tokens = 0;
};

struct LoadResult {
  std::vector<RequestRecord> records;  // in the order of planning
  GeneratorHealth health;
  bool stopped = false;  // by `stop`, before its work was over
};

// LoadRunner: plays a load against a server and measures it (Driver). Open loop: what arrives does not wait
// for what is under way, but for turns of one conversation and for the concurrency cap, and that waiting
// counts (see RequestRecord). Used from one thread.
class LoadRunner {
 public:
  // `client` is borrowed, and no one else's while Run runs.
  LoadRunner(HttpClient& client, RequestShape shape) : client_(client), shape_(std::move(shape)) {}

  // Runs `source` to its end or to a limit, and returns when every answer is over. `progress` is called about
  // five times a second, on this thread. `stop`: once true, nothing new is sent and what is under way is
  // cancelled.
  LoadResult Run(SessionSource& source, const LoadOptions& options,
                 const std::function<void(const LoadProgress&)>& progress, const std::atomic<bool>& stop);

 private:
  class Run_;

  HttpClient& client_;
  const RequestShape shape_;
};

// The JSON of one request. `history`: the messages of the turns before, answers included.
std::string RequestBody(const RequestShape& shape, const std::vector<ChatMessage>& history, const Turn& turn);
// What `turn` adds to a conversation.
std::vector<ChatMessage> MessagesOf(const RequestShape& shape, const Turn& turn, bool first);

}  // namespace tidepool
