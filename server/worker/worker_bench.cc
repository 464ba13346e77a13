#include "server/worker/worker_bench.h"

#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/rng.h"
#include "base/status.h"
#include "server/model/synthesize.h"
#include "server/rpc/rpc.h"
#include "server/worker/worker.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

constexpr char kToken[] = "bench";
constexpr uint32_t kVocab = 2048;
constexpr absl::Duration kAskTimeout = absl::Seconds(120);

// Accepts everybody and remembers where they are.
class OpenScheduler final : public v1::Scheduler::Service {
 public:
  grpc::Status Report(grpc::ServerContext*, const v1::WorkerReport* report, v1::ReportReply*) override {
    std::lock_guard lock(mu_);
    addresses_[report->address().worker_id()] = report->address();
    return grpc::Status::OK;
  }
  void Forget(const std::string& id) {
    std::lock_guard lock(mu_);
    addresses_.erase(id);
  }
  absl::StatusOr<v1::WorkerAddress> AddressOf(const std::string& id) {
    for (int i = 0; i < 3000; ++i) {
      {
        std::lock_guard lock(mu_);
        if (const auto it = addresses_.find(id); it != addresses_.end()) return it->second;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return absl::DeadlineExceededError(absl::StrCat("worker ", id, " did not report within 30 s"));
  }

 private:
  std::mutex mu_;
  std::map<std::string, v1::WorkerAddress> addresses_;
};

// Some workers around such a scheduler, and a folder of their own.
class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Create(const WorkerBenchOptions& options) {
    auto bench = std::unique_ptr<Bench>(new Bench(options));
    std::string folder = (options.folder.empty() ? std::filesystem::temp_directory_path()
                                                 : std::filesystem::path(options.folder)) /
                         "tidepool-bench-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr) {
      return absl::UnavailableError(absl::StrCat(folder, " cannot be made; name another folder"));
    }
    bench->folder_ = folder;
    TP_ASSIGN_OR_RETURN(bench->rpc_, StartRpcServer("127.0.0.1:0", &bench->scheduler_));
    return bench;
  }
  ~Bench() {
    workers_.clear();
    rpc_.server->Shutdown();
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  // A model whose layers have feed-forward blocks of `intermediate`; its KV is 2 KiB a token and layer.
  absl::Status MakeModel(uint32_t layers, uint32_t intermediate) {
    ShapeChanges changes;
    changes.layers = layers;
    changes.hidden = 256;
    changes.heads = 4;
    changes.kv_heads = 4;
    changes.head_dim = 128;
    changes.intermediate = intermediate;
    changes.vocab = kVocab;
    changes.max_positions = options_.prompt_tokens * 2;
    TP_ASSIGN_OR_RETURN(auto config, SynthesisConfig("llama", changes));
    model_ = absl::StrCat(folder_, "/model-", intermediate);
    SynthesisOptions how;
    how.out = model_;
    return Synthesize(std::move(config), how).status();
  }

  absl::Status StartWorker(const std::string& role, const std::string& id, uint64_t bytes_per_second,
                           bool layer_streaming) {
    Config config;
    config.model.path = model_;
    config.engine.max_step_tokens = options_.prompt_tokens;
    config.kv.host_bytes = uint64_t{512} << 20;
    config.worker.role = role;
    config.worker.id = id;
    config.worker.report_interval = absl::Milliseconds(20);
    config.cluster.scheduler = absl::StrCat("127.0.0.1:", rpc_.port);
    config.cluster.token = kToken;
    config.transport.max_bytes_per_second = bytes_per_second;
    config.transport.layer_streaming = layer_streaming;
    config.transport.share_arena = false;  // the link is what is measured
    metrics_.push_back(std::make_unique<MetricRegistry>());
    TP_ASSIGN_OR_RETURN(workers_[id], WorkerServer::Start(config, *metrics_.back()));
    return scheduler_.AddressOf(id).status();
  }
  void StopWorker(const std::string& id) {
    workers_.erase(id);
    scheduler_.Forget(id);
  }

  v1::WorkerGenerateRequest MakeRequest(uint64_t prompt) {
    v1::WorkerGenerateRequest request;
    request.set_salt("bench");
    request.set_max_tokens(1);
    request.mutable_sampling()->set_top_p(1);
    Rng rng(prompt);
    for (uint32_t i = 0; i < options_.prompt_tokens; ++i) {
      request.add_prompt(static_cast<int32_t>(rng.Below(kVocab)));
    }
    return request;
  }

  absl::StatusOr<v1::WorkerAddress> AddressOf(const std::string& id) { return scheduler_.AddressOf(id); }

  // Seconds to the first token.
  absl::StatusOr<double> Ask(const std::string& id, v1::WorkerGenerateRequest request,
                             v1::RequestPath* path = nullptr) {
    TP_ASSIGN_OR_RETURN(const v1::WorkerAddress address, scheduler_.AddressOf(id));
    request.set_request_id(absl::StrCat("bench-", next_++));
    const auto stub = v1::Worker::NewStub(channels_.Get(address.grpc()));
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    SetTimeout(context, kAskTimeout);
    const absl::Time begin = Clock::Real().Now();
    const auto reader = stub->Generate(&context, request);
    std::optional<double> seconds;
    v1::WorkerGenerateEvent event;
    while (reader->Read(&event)) {
      if (!seconds && event.tokens_size() > 0) seconds = absl::ToDoubleSeconds(Clock::Real().Now() - begin);
      if (path != nullptr && event.has_path()) *path = event.path();
    }
    TP_RETURN_IF_ERROR(FromGrpc(reader->Finish()));
    if (!seconds) return absl::InternalError("no token came");
    return *seconds;
  }

  // A prompt that was not asked for before.
  uint64_t FreshPrompt() { return next_prompt_++; }
  const WorkerBenchOptions& options() const { return options_; }

 private:
  explicit Bench(const WorkerBenchOptions& options) : options_(options) {}

  const WorkerBenchOptions options_;
  std::string folder_, model_;
  OpenScheduler scheduler_;
  RpcServer rpc_;
  ChannelCache channels_;
  std::vector<std::unique_ptr<MetricRegistry>> metrics_;
  std::map<std::string, std::unique_ptr<WorkerServer>> workers_;
  int next_ = 0;
  uint64_t next_prompt_ = 1;
};

constexpr uint32_t kLayers = 12;
constexpr uint64_t kBytesPerToken = kLayers * 2048;

}  // namespace

absl::StatusOr<std::vector<BenchRow>> BenchLayerStreaming(const WorkerBenchOptions& options) {
  const double transfer = static_cast<double>(options.prompt_tokens) * kBytesPerToken /
                          static_cast<double>(options.link_bytes_per_second);
  TP_ASSIGN_OR_RETURN(std::unique_ptr<Bench> bench, Bench::Create(options));
  // The feed-forward blocks are as wide as it takes: computing is linear in them, but for what else there is.
  uint32_t intermediate = 512;
  double compute = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    TP_RETURN_IF_ERROR(bench->MakeModel(kLayers, intermediate));
    TP_RETURN_IF_ERROR(bench->StartWorker("both", "alone", 0, true));
    std::vector<double> seconds;
    for (int i = 0; i < 3; ++i) {
      TP_ASSIGN_OR_RETURN(const double took, bench->Ask("alone", bench->MakeRequest(bench->FreshPrompt())));
      seconds.push_back(took);
    }
    bench->StopWorker("alone");
    compute = MedianOf(seconds);
    if (attempt == 1 || (compute > transfer * 0.7 && compute < transfer * 1.4)) break;
    // About 1,500 of the width stand for attention and its projections.
    const double width = (intermediate + 1500.0) * transfer / compute - 1500.0;
    intermediate = static_cast<uint32_t>(std::clamp(width, 128.0, 16384.0)) / 64 * 64;
  }
  TP_RETURN_IF_ERROR(bench->StartWorker("prefill", "streaming", options.link_bytes_per_second, true));
  TP_RETURN_IF_ERROR(bench->StartWorker("prefill", "whole", options.link_bytes_per_second, false));
  TP_RETURN_IF_ERROR(bench->StartWorker("decode", "decode", 0, true));
  std::map<std::string, std::vector<double>> seconds;
  for (int round = -1; round < options.rounds; ++round) {
    for (const std::string prefill : {"streaming", "whole"}) {
      auto request = bench->MakeRequest(bench->FreshPrompt());
      TP_ASSIGN_OR_RETURN(*request.mutable_prefill(), bench->AddressOf(prefill));
      v1::RequestPath path;
      TP_ASSIGN_OR_RETURN(const double took, bench->Ask("decode", request, &path));
      if (path.prefill_worker() != prefill || path.fetched_blocks() == 0) {
        return absl::InternalError("the prompt was not handed over");
      }
      if (round >= 0) seconds[prefill].push_back(took * 1e3);  // the first round connects
    }
  }
  return std::vector<BenchRow>{RowOfRounds("TTFT of one chunk over the link, layer by layer",
                                           seconds["streaming"], "ms", "after the chunk", seconds["whole"]),
                               {.name = "computing that chunk",
                                .value = compute * 1e3,
                                .unit = "ms",
                                .reference_name = "sending its KV",
                                .reference = transfer * 1e3,
                                .ratio = compute / transfer}};
}

absl::StatusOr<std::vector<BenchRow>> BenchLoadOrRecompute(const WorkerBenchOptions& options) {
  TP_ASSIGN_OR_RETURN(std::unique_ptr<Bench> bench, Bench::Create(options));
  TP_RETURN_IF_ERROR(bench->MakeModel(kLayers, 512));
  TP_RETURN_IF_ERROR(bench->StartWorker("both", "asked", 0, true));
  std::vector<BenchRow> rows;
  const uint64_t link = options.link_bytes_per_second;
  for (const uint64_t speed : {link / 32, link / 8, link / 4, link / 2, link, 4 * link}) {
    TP_RETURN_IF_ERROR(bench->StartWorker("both", absl::StrCat("holder-", speed), speed, true));
    std::vector<double> loaded, computed, shares;
    // One round teaches what the link does.
    for (int round = -1; round < options.rounds; ++round) {
      auto request = bench->MakeRequest(bench->FreshPrompt());
      const std::string holder = absl::StrCat("holder-", speed);
      TP_RETURN_IF_ERROR(bench->Ask(holder, request).status());
      TP_ASSIGN_OR_RETURN(const double alone, bench->Ask("asked", bench->MakeRequest(bench->FreshPrompt())));
      auto* named = request.add_holders();
      TP_ASSIGN_OR_RETURN(*named->mutable_worker(), bench->AddressOf(holder));
      named->set_end(options.prompt_tokens);  // as many as there are
      v1::RequestPath path;
      TP_ASSIGN_OR_RETURN(const double with, bench->Ask("asked", request, &path));
      if (round < 0) continue;
      loaded.push_back(with * 1e3);
      computed.push_back(alone * 1e3);
      shares.push_back(static_cast<double>(path.cached_tokens()) / options.prompt_tokens);
    }
    rows.push_back(
        RowOfRounds(absl::StrCat("TTFT with the prefix at a peer behind ", speed / 1'000'000, " MB/s"),
                    loaded, "ms", "computing it", computed));
    rows.push_back({.name = "  of the prompt loaded", .value = MedianOf(shares), .unit = "share"});
    bench->StopWorker(absl::StrCat("holder-", speed));
  }
  return rows;
}

}  // namespace tidepool
