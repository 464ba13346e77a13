#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/probe.h"
#include "config/config.h"
#include "config/tenants.h"
#include "server/batch/batch_gate.h"
#include "server/batch/batch_run.h"
#include "server/batch/transport.h"
#include "server/gateway/batches_record.h"
#include "server/gateway/files_store.h"
#include "server/gateway/work_pool.h"

namespace tidepool {

// BatchesService: the tenants' files and batches (Driver): keeps them on disk, and runs the batches a few at
// a time, one of a tenant, oldest first, tenants in turn, in the room that online traffic leaves. What it
// says is durable: a batch that was accepted goes on after a crash at any moment, and none of its lines is
// lost or answered twice. Thread-safe. Calls touch the disk: make them in Submit, not on an I/O thread.
class BatchesService {
 public:
  struct Dependencies {
    const GatewayConfig* config = nullptr;  // borrowed, as all pointers
    // Answers the lines of one tenant.
    std::function<std::unique_ptr<BatchTransport>(const std::string& tenant)> transport;
    std::function<OnlineLoad()> load;
    MetricRegistry* metrics = nullptr;
    const Clock* clock = &Clock::Real();
    absl::Duration completion_window = absl::Hours(24);  // OpenAI's only one
  };

  explicit BatchesService(Dependencies deps);
  ~BatchesService();

  // Takes the directory as soon as it is free, and goes on with what is in there. Nothing to do where
  // gateway.batch_dir is empty or off.
  void Start();
  // Pauses every batch and lets go of the directory. Idempotent.
  void Stop();

  // Empty: files and batches can be used. Else why not, for a client; `ever` tells whether waiting helps.
  std::string WhyNot(bool& ever) const;
  // Runs `work` on a thread of the service's; false: too much is queued.
  bool Submit(std::function<void()> work);
  // The same for the next step of a response under way, one queued for a connection: has room kept for it, so
  // that new requests do not end what was begun. False: the service stops.
  bool Continue(std::function<void()> work) { return pool_.TrySubmit(std::move(work)); }

  // From now on lines run for these tenants alone; what others have waits until they are back, or it expires.
  // Before the first call: for all.
  void Replace(const TenantTable& tenants);

  // The rest is for when WhyNot is empty. Unknown ids, and other tenants', are NotFound.
  FilesStore& files() { return *files_; }
  absl::Duration file_ttl() const { return deps_.config->batch_file_ttl; }

  struct NewBatch {
    std::string endpoint, input_file_id;
    std::vector<std::pair<std::string, std::string>> metadata;
    int64_t output_ttl_seconds = 0;
  };
  // Where kBatchesKept are kept already, the oldest that has ended goes. Errors: NotFound, InvalidArgument
  // (the file is no batch's input), Aborted (too many unfinished ones), FailedPrecondition (the tenant's
  // files leave no room for results), and of the files.
  absl::StatusOr<BatchRecord> Create(const std::string& tenant, NewBatch batch);
  absl::StatusOr<BatchRecord> Get(const std::string& tenant, const std::string& id) const;
  // Newest first.
  std::vector<BatchRecord> List(const std::string& tenant) const;
  // Errors also: FailedPrecondition (it has ended).
  absl::StatusOr<BatchRecord> Cancel(const std::string& tenant, const std::string& id);

 private:
  struct Entry {
    BatchRecord record;
    bool running = false;     // has a Worker
    BatchRun* run = nullptr;  // of the Worker, while lines are run
    absl::Time not_before;    // the disk failed it; on the clock
  };
  // A thread that takes one batch to its end.
  struct Worker {
    std::string tenant, id;
    std::thread thread;
    std::atomic<bool> done{false};
  };
  using Entries = std::map<std::string, Entry, std::less<>>;  // by id

  void Loop();
  void Open();
  void LoadBatches();
  void LoadBatch(const std::string& tenant, const std::string& path, std::set<std::string>& pending);
  void Reap();
  void StartNext();
  void Sweep();
  void Publish();

  // On a Worker's thread: validating to the end.
  void Execute(const std::string& tenant, const std::string& id);
  absl::StatusOr<InputIndex> Validate(const std::string& tenant, const BatchRecord& record,
                                      std::vector<BatchError>& errors);
  bool Serves(const std::string& tenant) const;
  // Starts a thread for it. Holds mu_.
  void StartWorker(const std::string& tenant, Entry& entry);
  // Holds mu_: makes room for one more record. Errors: Aborted.
  absl::Status MakeRoom(const std::string& tenant, Entries& entries);
  // Files failed it: the same from the beginning, in a while.
  void TryLater(const std::string& tenant, const std::string& id, const absl::Status& why);
  void Conclude(const std::string& tenant, const std::string& id, BatchStatus status);
  // The same where no run has closed the outputs: a crash or a full disk may have left a torn line in them.
  void ConcludeAsFound(const std::string& tenant, const std::string& id, BatchStatus status);
  absl::StatusOr<BatchRun::End> RunLines(const std::string& tenant, const BatchRecord& record,
                                         const InputIndex& index);
  void Count(const BatchCounts& now, BatchCounts& before);
  bool Stopping() const;

  // Changes a record and makes the change durable; the record as it is then. What cannot be written is logged
  // and held in memory alone: it is done again after a restart.
  BatchRecord Change(const std::string& tenant, const std::string& id,
                     const std::function<void(BatchRecord&)>& change);
  BatchRecord RecordOf(const std::string& tenant, const std::string& id) const;
  // Holds mu_, as Persist.
  void Apply(const std::string& tenant, BatchRecord& record, const std::function<void(BatchRecord&)>& change);
  absl::Status Persist(const std::string& tenant, const BatchRecord& record);
  std::string PathOf(const std::string& tenant, const std::string& id) const;
  int64_t Now() const;  // Unix seconds

  const Dependencies deps_;
  BatchGate gate_;
  std::atomic<size_t> submitted_{0};  // by Submit, and waiting
  WorkPool pool_;
  std::unique_ptr<FilesStore> files_;  // set once, before open_
  std::atomic<bool> open_{false};

  mutable std::mutex mu_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::string why_not_;
  std::map<std::string, Entries, std::less<>> batches_;  // by tenant
  std::map<std::string, uint64_t> turns_;  // of a tenant's last start: whose is longest ago is next
  uint64_t turn_ = 0;
  std::optional<std::set<std::string>> tenants_;  // that are served; absent: all
  std::vector<std::unique_ptr<Worker>> workers_;  // the loop's
  absl::Time next_open_, next_sweep_;             // the loop's
  std::thread thread_;

  Counter &completed_, &failed_, &expired_, &retries_, &given_back_, &prompt_bytes_, &shared_bytes_;
  Gauge &inflight_, &bytes_, &unfinished_;
};

}  // namespace tidepool
