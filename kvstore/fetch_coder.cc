#include "kvstore/fetch_coder.h"

namespace tidepool {

FetchCoder::FetchCoder(const BlockLayout& layout, const BlockCodec& codec, MetricRegistry& metrics,
                       const Clock& clock, std::function<void()> wake)
    : layout_(layout),
      codec_(codec),
      probe_(metrics, "wire"),
      clock_(clock),
      wake_(std::move(wake)),
      thread_([this] { Run(); }) {}

FetchCoder::~FetchCoder() { Stop(); }

void FetchCoder::Cancel() {
  stop_ = true;
  jobs_.Close();
}

void FetchCoder::Stop() {
  Cancel();
  if (thread_.joinable()) thread_.join();
}

void FetchCoder::Push(Job job) {
  if (jobs_.TryPush(job)) return;
  // Beyond every limit of the cores, or stopped: answered, so that nobody waits.
  Refuse(job, stop_ ? absl::CancelledError("the node is shutting down")
                    : absl::ResourceExhaustedError("too many blocks wait to be encoded or decoded"));
}

void FetchCoder::Refuse(const Job& job, absl::Status why) {
  if (const auto* encode = std::get_if<ServerEncode>(&job)) {
    Put(ServerEncoded{encode->job, std::move(why), 0});
  } else {
    Put(ClientDecoded{std::get<ClientDecode>(job).receive, std::move(why)});
  }
}

void FetchCoder::Run() {
  while (std::optional<Job> job = jobs_.Pop(absl::InfiniteDuration())) {
    if (stop_) {
      Refuse(*job, absl::CancelledError("the node is shutting down"));
    } else {
      Put(std::visit([this](auto& j) { return Do(j); }, *job));
    }
  }
}

FetchCoder::Result FetchCoder::Do(ServerEncode& job) {
  const BlockCodec& codec = CodecById(job.codec);
  auto payload = std::make_shared<std::vector<std::byte>>(codec.MaxEncodedBytes(layout_));
  const absl::Time begin = clock_.Now();
  const absl::StatusOr<size_t> bytes = codec.Encode(layout_, job.lease.data(), *payload);
  const double seconds = absl::ToDoubleSeconds(clock_.Now() - begin);
  probe_.encode_seconds.Observe(seconds);
  if (!bytes.ok()) {
    probe_.encode_failures.Add();
    return ServerEncoded{job.job, bytes.status(), seconds};
  }
  probe_.raw_bytes.Add(layout_.block_bytes());
  probe_.coded_bytes.Add(*bytes);
  payload->resize(*bytes);
  payload->shrink_to_fit();  // it may wait for its turn
  return ServerEncoded{job.job, std::move(payload), seconds};
}

FetchCoder::Result FetchCoder::Do(ClientDecode& job) {
  const absl::Time begin = clock_.Now();
  absl::Status status = codec_.Decode(layout_, job.payload, job.dst);
  probe_.decode_seconds.Observe(absl::ToDoubleSeconds(clock_.Now() - begin));
  if (!status.ok()) probe_.decode_failures.Add();
  return ClientDecoded{job.receive, std::move(status)};
}

void FetchCoder::Put(Result result) {
  {
    std::lock_guard lock(mu_);
    results_.push_back(std::move(result));
  }
  wake_();
}

std::vector<FetchCoder::Result> FetchCoder::TakeResults() {
  std::lock_guard lock(mu_);
  return std::exchange(results_, {});
}

}  // namespace tidepool
