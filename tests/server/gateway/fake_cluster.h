#pragma once

#include <gtest/gtest.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/gateway/json.h"
#include "server/rpc/rpc.h"
#include "tests/server/gateway/byte_model.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {

constexpr absl::Duration kTestWait = absl::Seconds(30);

// Signal: counts events; a test waits for the n-th, with a deadline.
class Signal {
 public:
  void Set() {
    {
      std::lock_guard lock(mu_);
      ++count_;
    }
    changed_.notify_all();
  }
  bool Wait(int n = 1) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, absl::ToChronoNanoseconds(kTestWait), [&] { return count_ >= n; });
  }
  int count() {
    std::lock_guard lock(mu_);
    return count_;
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  int count_ = 0;
};

// FakeWorker: streams what its script says. Token ids are bytes (see WriteByteModel).
class FakeWorker final : public v1::Worker::Service {
 public:
  using Writer = grpc::ServerWriter<v1::WorkerGenerateEvent>;
  using Script = std::function<grpc::Status(grpc::ServerContext&, const v1::WorkerGenerateRequest&, Writer&)>;

  explicit FakeWorker(std::string id) : id_(std::move(id)) {
    auto server = StartRpcServer("127.0.0.1:0", this);
    EXPECT_TRUE(server.ok());
    server_ = std::move(server->server);
    address_.set_worker_id(id_);
    address_.set_boot_id("boot-" + id_);
    address_.set_grpc("127.0.0.1:" + std::to_string(server->port));
    address_.set_pid(4711);
  }
  ~FakeWorker() override { server_->Shutdown(std::chrono::system_clock::now()); }

  const v1::WorkerAddress& address() const { return address_; }
  void SetScript(Script script) {
    std::lock_guard lock(mu_);
    script_ = std::move(script);
  }
  std::vector<v1::WorkerGenerateRequest> requests() {
    std::lock_guard lock(mu_);
    return requests_;
  }
  Signal started, cancelled;

  // Sends `text` byte by byte from `index` on; false: the stream is gone.
  static bool SendText(Writer& writer, const std::string& text, uint32_t& index) {
    for (char c : text) {
      v1::WorkerGenerateEvent event;
      auto& token = *event.add_tokens();
      token.set_id(static_cast<unsigned char>(c));
      token.set_index(index++);
      token.set_logprob(-0.5f);
      if (!writer.Write(event)) return false;
    }
    return true;
  }
  static void SendFinish(Writer& writer, const std::string& reason, int32_t stop_token, uint32_t cached = 0) {
    v1::WorkerGenerateEvent event;
    event.set_finish_reason(reason);
    event.set_stop_token(stop_token);
    event.mutable_path()->set_decode_worker("decode-0");
    event.mutable_path()->set_prefill_worker("prefill-0");
    event.mutable_path()->set_cached_tokens(cached);
    event.mutable_path()->set_transport("tcp");
    writer.Write(event);
  }
  static Script Says(std::string text, std::string reason = "stop", int32_t stop_token = 257,
                     uint32_t cached = 0) {
    return [=](grpc::ServerContext&, const v1::WorkerGenerateRequest&, Writer& writer) {
      uint32_t index = 0;
      SendText(writer, text, index);
      SendFinish(writer, reason, stop_token, cached);
      return grpc::Status::OK;
    };
  }
  static Script Fails(std::string text, grpc::StatusCode code) {
    return [=](grpc::ServerContext&, const v1::WorkerGenerateRequest&, Writer& writer) {
      uint32_t index = 0;
      SendText(writer, text, index);
      return grpc::Status(code, "as the test wants it");
    };
  }
  // Says `text`, then nothing until the call is cancelled or `until` is set.
  Script Hangs(std::string text, Signal* until = nullptr) {
    return
        [this, text, until](grpc::ServerContext& context, const v1::WorkerGenerateRequest&, Writer& writer) {
          uint32_t index = 0;
          SendText(writer, text, index);
          const absl::Time deadline = absl::Now() + kTestWait;
          while (!context.IsCancelled() && absl::Now() < deadline) {
            if (until != nullptr && until->count() > 0) {
              SendFinish(writer, "length", -1);
              return grpc::Status::OK;
            }
            absl::SleepFor(absl::Milliseconds(2));  // the synchronous API has no cancellation to wait for
          }
          if (context.IsCancelled()) cancelled.Set();
          return grpc::Status::CANCELLED;
        };
  }

 private:
  grpc::Status Generate(grpc::ServerContext* context, const v1::WorkerGenerateRequest* request,
                        Writer* writer) override {
    Script script;
    {
      std::lock_guard lock(mu_);
      requests_.push_back(*request);
      script = script_;
    }
    started.Set();
    return script ? script(*context, *request, *writer)
                  : grpc::Status(grpc::StatusCode::UNAVAILABLE, "no script");
  }

  const std::string id_;
  std::unique_ptr<grpc::Server> server_;
  v1::WorkerAddress address_;
  std::mutex mu_;
  Script script_;
  std::vector<v1::WorkerGenerateRequest> requests_;
};

// FakeScheduler: places on the first worker that is not excluded, unless `place` says otherwise.
class FakeScheduler final : public v1::Scheduler::Service {
 public:
  FakeScheduler() {
    auto server = StartRpcServer("127.0.0.1:0", this);
    EXPECT_TRUE(server.ok());
    server_ = std::move(server->server);
    port_ = server->port;
  }
  ~FakeScheduler() override { server_->Shutdown(std::chrono::system_clock::now()); }

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  void Register(const v1::WorkerAddress& worker, v1::Role role) {
    std::lock_guard lock(mu_);
    auto& view = *cluster_.add_workers();
    *view.mutable_address() = worker;
    view.set_role(role);
    view.set_state("ready");
    view.set_slots_total(1000);
    auto& model = *cluster_.mutable_model();
    model.set_name("toy");
    model.set_fingerprint("0123456789abcdef0123");
    model.set_layers(2);
    model.set_kv_heads(1);
    model.set_head_dim(4);
    model.set_block_tokens(4);
    model.set_kv_dtype(2);
    model.set_max_model_len(200);
    model.set_vocab_size(258);
    model.set_hidden_size(2);
  }
  void SetPlace(std::function<grpc::Status(const v1::PlaceRequest&, v1::PlaceReply*)> place) {
    std::lock_guard lock(mu_);
    place_ = std::move(place);
  }
  std::vector<v1::PlaceRequest> places() {
    std::lock_guard lock(mu_);
    return places_;
  }
  Signal finished;

 private:
  grpc::Status Place(grpc::ServerContext*, const v1::PlaceRequest* request, v1::PlaceReply* reply) override {
    std::lock_guard lock(mu_);
    places_.push_back(*request);
    if (place_) return place_(*request, reply);
    for (const auto& worker : cluster_.workers()) {
      const auto& excluded = request->exclude_workers();
      if (std::find(excluded.begin(), excluded.end(), worker.address().boot_id()) != excluded.end()) continue;
      *reply->mutable_decode() = worker.address();
      reply->set_reason("because the test says so");
      return grpc::Status::OK;
    }
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "no worker can take the request now");
  }
  grpc::Status Finish(grpc::ServerContext*, const v1::FinishRequest*, v1::FinishReply*) override {
    finished.Set();
    return grpc::Status::OK;
  }
  grpc::Status Cluster(grpc::ServerContext*, const v1::ClusterRequest*, v1::ClusterReply* reply) override {
    std::lock_guard lock(mu_);
    *reply = cluster_;
    return grpc::Status::OK;
  }

  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  std::mutex mu_;
  v1::ClusterReply cluster_;
  std::function<grpc::Status(const v1::PlaceRequest&, v1::PlaceReply*)> place_;
  std::vector<v1::PlaceRequest> places_;
};

}  // namespace tidepool
