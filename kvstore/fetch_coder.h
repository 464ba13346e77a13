#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "base/bounded_queue.h"
#include "base/clock.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/codec/codec_probe.h"
#include "kvstore/fetch_client.h"
#include "kvstore/fetch_server.h"

namespace tidepool {

// FetchCoder: encodes and decodes blocks on their way to and from peers, on a thread of its own, so that the
// node's goes on moving bytes (Driver). How much may wait is bounded by who asks: the server core has a few
// encodings under way, the client core what its windows let in.
class FetchCoder {
 public:
  using Result = std::variant<ServerEncoded, ClientDecoded>;

  // `wake` is called on the coder's thread whenever there is a result.
  FetchCoder(const BlockLayout& layout, const BlockCodec& codec, MetricRegistry& metrics, const Clock& clock,
             std::function<void()> wake);
  // What waits is dropped; `wake` is not called any more, and no buffer touched.
  ~FetchCoder();

  // From now on what waits and what comes is answered with Cancelled; what is being done ends as it would.
  void Cancel();
  // Cancel, and waits for what is being done (one block): every job is answered then.
  void Stop();

  void Take(ServerEncode job) { Push(std::move(job)); }
  // The payload and the slot stay as they are until the result is taken.
  void Take(ClientDecode job) { Push(std::move(job)); }
  // In the order of the jobs.
  std::vector<Result> TakeResults();

 private:
  using Job = std::variant<ServerEncode, ClientDecode>;
  static constexpr size_t kMaxJobs = 65536;  // far above what the cores have under way

  void Push(Job job);
  void Refuse(const Job& job, absl::Status why);
  void Run();
  Result Do(ServerEncode& job);
  Result Do(ClientDecode& job);
  void Put(Result result);

  const BlockLayout layout_;
  const BlockCodec& codec_;
  CodecProbe probe_;
  const Clock& clock_;
  const std::function<void()> wake_;
  BoundedQueue<Job> jobs_{kMaxJobs};
  std::mutex mu_;
  std::vector<Result> results_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace tidepool
