#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/rng.h"
#include "server/batch/batch_gate.h"
#include "server/batch/dispatch_core.h"
#include "server/batch/input_index.h"
#include "server/batch/output_log.h"
#include "server/batch/prefix_plan.h"
#include "server/batch/retry.h"
#include "server/batch/transport.h"

namespace tidepool {

struct BatchCounts {
  uint64_t lines = 0;
  uint64_t completed = 0;  // answered with 2xx
  uint64_t failed = 0;     // have another answer, or none for good
  uint64_t expired = 0;    // of the failed ones
  size_t running = 0;
  uint64_t retries = 0;
  uint64_t given_back = 0;  // stopped for online traffic, to run again
  // Of the prompts planned so far, in units of kPathUnitBytes.
  uint64_t prompt_units = 0;
  uint64_t prompt_units_shared = 0;

  uint64_t left() const { return lines - completed - failed; }
};

// What of a batch is done already. Made by OpenOutput, one call for each file that the batch writes.
struct DoneLines {
  std::vector<bool> done;  // of InputIndex::lines()
  uint64_t completed = 0, failed = 0;
};

// OutputLog::Open with its lines entered into `done`. `where`: filled with each line's place in the file,
// where not null. Errors also: InvalidArgument for a line that the input does not have, or that is there
// twice.
absl::StatusOr<std::unique_ptr<OutputLog>> OpenOutput(const std::string& path, const InputIndex& index,
                                                      DoneLines& done,
                                                      std::vector<InputLine>* where = nullptr);

// BatchRun: answers the lines of one batch that have no answer yet (Driver; Run uses the calling thread).
// Every line ends as exactly one line of output, appended whole; a run that is killed and begun again goes on
// with the lines that are not there. Memory: the index, what runs, and a window of prompts' paths.
class BatchRun {
 public:
  enum class StopKind {
    kPause,   // as a crash, without its torn line: lines in flight are dropped, to be run again another time
    kCancel,  // the same, for good
    // The same, and every line without an answer gets the failure `batch_expired`. Where the last answer came
    // first the end is kComplete all the same; a run that was begun with nothing left ends as kExpired.
    kExpire,
  };
  enum class End { kComplete, kPaused, kCancelled, kExpired };

  struct Options {
    const InputIndex* index = nullptr;  // borrowed, as all that follows
    DoneLines done;
    OutputLog* answers = nullptr;
    OutputLog* failures = nullptr;  // may be `answers`
    BatchTransport* transport = nullptr;
    BatchGate* gate = nullptr;
    const Clock* clock = &Clock::Real();
    RetryPolicy retry;
    bool by_prefix = true;  // false: the file's order
    size_t lookahead = 256;
    absl::Duration gate_max = absl::Seconds(10);
    // Lines planned together, and units of their paths: 8 bytes each.
    size_t window_lines = 100'000;
    size_t window_units = size_t{8} << 20;
    // Called on Run's thread every `tick` or so.
    std::function<void(const BatchCounts&)> on_tick;
    absl::Duration tick = absl::Milliseconds(200);
  };

  explicit BatchRun(Options options);
  ~BatchRun();

  // Until every line has an answer, or Stop. What was answered is durable when it returns. Errors: of the
  // files: what was answered and not written will be asked again.
  absl::StatusOr<End> Run();
  // From any thread; the first call counts.
  void Stop(StopKind kind);
  BatchCounts counts() const;

 private:
  struct Event {
    uint32_t line = 0;
    std::optional<BatchReply> reply;  // absent: it runs ahead
  };
  // Where transports report to; outlives the run where one is late.
  struct Inbox {
    std::mutex mu;
    std::condition_variable wake;
    std::vector<Event> events;
    std::optional<StopKind> stop;
  };
  struct Running {
    std::string custom_id;
    absl::Time started;
    bool giving_back = false;
    std::shared_ptr<BatchTransport::InFlight> call;
  };

  std::optional<StopKind> stop() const;
  absl::Status Loop();
  absl::Status StartLines();
  absl::Status Send(uint32_t line);
  absl::Status FillWindow();
  void Yield();
  void Handle(Event event);
  void Answered(uint32_t line, const Running& running, BatchReply reply);
  void Write(bool ok, std::string text);
  void WaitForEvents();
  void DropRunning();
  absl::Status ExpireRest();
  absl::Status FileStatus() const;
  void Publish();

  const Options options_;
  DispatchCore core_;
  std::vector<bool> done_;
  size_t next_line_ = 0;  // the first that is in no window yet
  const BatchGate::RunId id_;
  const std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  absl::flat_hash_map<uint32_t, Running> running_;
  absl::flat_hash_map<uint32_t, RetryState> retries_;
  Rng rng_;
  absl::Time next_tick_;
  BatchCounts counts_;
  uint64_t begun_with_ = 0;  // lines without an answer, at the beginning
  mutable std::mutex counts_mu_;
  BatchCounts published_;
};

}  // namespace tidepool
