#include "server/scheduler/scheduler_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>

#include "server/cluster/model_digest.h"
#include "server/rpc/long_call.h"
#include "server/rpc/rpc.h"
#include "tidepool/v1/cluster.grpc.pb.h"
#include "tidepool/v1/kv.grpc.pb.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

constexpr char kToken[] = "secret";

std::string Key(char c) { return std::string(32, c); }

class SchedulerServerTest : public testing::Test {
 protected:
  SchedulerServerTest() { config_.listen = "127.0.0.1:0"; }

  void Start() {
    auto server = SchedulerServer::Start(config_, kToken, metrics_, clock_, leadership_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server);
    const std::string address = "127.0.0.1:" + std::to_string(server_->port());
    stub_ = v1::Scheduler::NewStub(channels_.Get(address));
  }

  static v1::WorkerReport Report(const std::string& id, v1::Role role, uint64_t seq = 1) {
    v1::WorkerReport r;
    r.mutable_address()->set_worker_id(id);
    r.mutable_address()->set_boot_id("boot-" + id);
    r.mutable_address()->set_grpc(id + ":1");
    r.mutable_address()->set_transport(std::string("\0\xff", 2));
    r.mutable_address()->set_pid(42);
    r.set_role(role);
    r.mutable_model()->set_name("demo");
    r.mutable_model()->set_fingerprint("f1");
    r.mutable_model()->set_layers(2);
    r.mutable_model()->set_kv_heads(2);
    r.mutable_model()->set_head_dim(16);
    r.mutable_model()->set_block_tokens(32);
    r.mutable_model()->set_kv_dtype(2);
    r.mutable_model()->set_max_model_len(4096);
    r.mutable_model()->set_vocab_size(100);
    r.mutable_model()->set_hidden_size(64);
    r.set_seq(seq);
    r.set_snapshot(seq == 1);
    r.set_slots_total(1000);
    r.set_slots_free(1000);
    return r;
  }
  static v1::PlaceRequest Request(const std::string& id, uint32_t tokens) {
    v1::PlaceRequest r;
    r.set_request_id(id);
    r.set_prompt_tokens(tokens);
    r.set_max_tokens(8);
    return r;
  }

  // Calls with the token and a deadline.
  template <typename Method, typename In, typename Out>
  grpc::Status Call(Method method, const In& in, Out* out, std::string_view token = kToken) {
    grpc::ClientContext context;
    AddClusterToken(context, token);
    SetTimeout(context, absl::Seconds(10));
    return (stub_.get()->*method)(&context, in, out);
  }
  grpc::Status Send(const v1::WorkerReport& r) { return Call(&v1::Scheduler::Stub::Report, r, &reply_); }
  grpc::Status Place(const v1::PlaceRequest& r) { return Call(&v1::Scheduler::Stub::Place, r, &placed_); }
  v1::ClusterReply Cluster() {
    v1::ClusterReply out;
    EXPECT_TRUE(Call(&v1::Scheduler::Stub::Cluster, v1::ClusterRequest(), &out).ok());
    return out;
  }
  uint64_t Decisions(const std::string& kind) {
    return metrics_.AddCounter("tidepool_scheduler_decisions_total", "", {{"kind", kind}}).value();
  }
  double Workers(const std::string& role, const std::string& state) {
    return metrics_.AddGauge("tidepool_workers", "", {{"role", role}, {"state", state}}).value();
  }

  FakeClock clock_;
  MetricRegistry metrics_;
  Leadership* leadership_ = nullptr;
  SchedulerConfig config_;
  ChannelCache channels_;
  std::unique_ptr<SchedulerServer> server_;
  std::unique_ptr<v1::Scheduler::Stub> stub_;
  v1::ReportReply reply_;
  v1::PlaceReply placed_;
};

TEST_F(SchedulerServerTest, PlacesOnRegisteredWorkersAndPassesAddressesWhole) {
  Start();
  EXPECT_EQ(Place(Request("r", 64)).error_code(), grpc::StatusCode::UNAVAILABLE);
  auto prefill = Report("p1", v1::ROLE_PREFILL);
  for (char c : {'a', 'b'}) prefill.add_events()->set_key(Key(c));
  ASSERT_TRUE(Send(prefill).ok());
  EXPECT_FALSE(reply_.resync());
  ASSERT_TRUE(Send(Report("d1", v1::ROLE_DECODE)).ok());

  auto request = Request("r", 100);
  for (char c : {'a', 'b', 'c'}) request.add_keys(Key(c));
  const auto status = Place(request);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(placed_.prefill().worker_id(), "p1");
  EXPECT_EQ(placed_.prefill().transport(), std::string("\0\xff", 2));
  EXPECT_EQ(placed_.decode().worker_id(), "d1");
  EXPECT_EQ(placed_.decode().pid(), 42u);
  EXPECT_EQ(placed_.expected_cached_tokens(), 64u);
  EXPECT_GT(placed_.predicted_ttft_seconds(), 0);
  EXPECT_THAT(placed_.reason(), HasSubstr("decode on d1"));
  EXPECT_EQ(Decisions("remote"), 1u);
  EXPECT_EQ(Decisions("unavailable"), 1u);
}

TEST_F(SchedulerServerTest, ClusterShowsModelAndWorkers) {
  Start();
  EXPECT_TRUE(Cluster().model().fingerprint().empty());
  auto r = Report("w1", v1::ROLE_BOTH);
  r.add_events()->set_key(Key('a'));
  r.set_running(3);
  ASSERT_TRUE(Send(r).ok());
  clock_.Advance(absl::Seconds(2));
  const auto cluster = Cluster();
  EXPECT_EQ(cluster.model().SerializeAsString(), r.model().SerializeAsString());
  ASSERT_EQ(cluster.workers_size(), 1);
  EXPECT_EQ(cluster.workers(0).role(), v1::ROLE_BOTH);
  EXPECT_EQ(cluster.workers(0).state(), "ready");
  EXPECT_EQ(cluster.workers(0).running(), 3u);
  EXPECT_EQ(cluster.workers(0).indexed_blocks(), 1u);
  EXPECT_NEAR(cluster.workers(0).seconds_since_report(), 2, 1e-6);
}

TEST_F(SchedulerServerTest, EveryCallNeedsTheClusterToken) {
  Start();
  for (const char* token : {"", "wrong"}) {
    v1::ReportReply report;
    v1::PlaceReply place;
    v1::ExplainReply explain;
    v1::FinishReply finish;
    v1::ClusterReply cluster;
    using Stub = v1::Scheduler::Stub;
    const auto denied = grpc::StatusCode::UNAUTHENTICATED;
    EXPECT_EQ(Call(&Stub::Report, Report("w", v1::ROLE_BOTH), &report, token).error_code(), denied);
    EXPECT_EQ(Call(&Stub::Place, Request("r", 1), &place, token).error_code(), denied);
    EXPECT_EQ(Call(&Stub::Explain, Request("r", 1), &explain, token).error_code(), denied);
    EXPECT_EQ(Call(&Stub::Finish, v1::FinishRequest(), &finish, token).error_code(), denied);
    EXPECT_EQ(Call(&Stub::Cluster, v1::ClusterRequest(), &cluster, token).error_code(), denied);
  }
  EXPECT_EQ(Cluster().workers_size(), 0) << "a refused report had an effect";
}

TEST_F(SchedulerServerTest, WorkerWithAnotherModelIsRefusedAndToldWhy) {
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  auto other = Report("w2", v1::ROLE_BOTH);
  other.mutable_model()->set_block_tokens(64);
  const auto status = Send(other);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("kv.block_tokens is '64', the cluster's is '32'"));
  EXPECT_EQ(metrics_.AddCounter("tidepool_scheduler_reports_total", "", {{"result", "refused"}}).value(), 1u);
}

TEST_F(SchedulerServerTest, MalformedMessagesAreInvalidArguments) {
  Start();
  auto report = Report("w1", v1::ROLE_UNSPECIFIED);
  EXPECT_EQ(Send(report).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  report = Report("w1", v1::ROLE_BOTH);
  report.mutable_model()->set_kv_dtype(9);
  EXPECT_THAT(Send(report).error_message(), HasSubstr("kv_dtype"));
  report = Report("w1", v1::ROLE_BOTH);
  report.add_events()->set_key("short");
  EXPECT_THAT(Send(report).error_message(), HasSubstr("32 bytes, not 5"));
  EXPECT_EQ(Send(v1::WorkerReport()).error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  auto request = Request("r", 64);
  request.add_keys(std::string(33, 'x'));
  EXPECT_EQ(Place(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request = Request("r", 64);
  request.set_slo_ttft_seconds(std::numeric_limits<double>::quiet_NaN());
  EXPECT_THAT(Place(request).error_message(), HasSubstr("slo_ttft_seconds"));
  request.set_slo_ttft_seconds(-1);
  EXPECT_EQ(Place(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Place(Request("r", 5000)).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Place(v1::PlaceRequest()).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(SchedulerServerTest, RejectionCarriesItsDetails) {
  config_.slo.ttft = absl::Milliseconds(1);
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  const auto status = Place(Request("r", 1000));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  v1::PlaceRejection details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.reason(), status.error_message());
  EXPECT_THAT(details.reason(), HasSubstr("first token"));
  EXPECT_GT(details.predicted_ttft_seconds(), 0.001);
  EXPECT_GE(details.retry_after_seconds(), 1u);
  EXPECT_EQ(Decisions("rejected"), 1u);
  EXPECT_EQ(metrics_.AddCounter("tidepool_requests_rejected_total", "", {{"reason", "ttft"}}).value(), 1u);
}

TEST_F(SchedulerServerTest, OtherObjectivesAndLimitsHoldAtOnceAndForgetNoWorker) {
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  ASSERT_TRUE(Place(Request("r1", 1000)).ok());
  config_.slo.ttft = absl::Milliseconds(1);
  server_->Apply(config_);
  EXPECT_EQ(Place(Request("r2", 1000)).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  config_.slo.ttft = absl::ZeroDuration();
  config_.max_inflight = 1;
  server_->Apply(config_);
  EXPECT_THAT(Place(Request("r3", 1000)).error_message(), HasSubstr("1"));
  config_.max_inflight = 2;
  server_->Apply(config_);
  EXPECT_TRUE(Place(Request("r3", 1000)).ok());
}

TEST_F(SchedulerServerTest, ExplainAnswersAlsoWhereItWouldReject) {
  config_.slo.ttft = absl::Milliseconds(1);
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  v1::ExplainReply reply;
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Explain, Request("r", 1000), &reply).ok());
  EXPECT_FALSE(reply.has_placement());
  EXPECT_THAT(reply.rejection().reason(), HasSubstr("first token"));
  auto patient = Request("r", 1000);
  patient.set_slo_ttft_seconds(1000);
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Explain, patient, &reply).ok());
  EXPECT_EQ(reply.placement().decode().worker_id(), "w1");
  ASSERT_GE(reply.candidates_size(), 1);
  EXPECT_EQ(Decisions("local"), 0u) << "nothing was decided";
}

TEST_F(SchedulerServerTest, FinishFreesThePlaceOfARequest) {
  config_.max_inflight = 1;
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  ASSERT_TRUE(Place(Request("r1", 100)).ok());
  EXPECT_EQ(Place(Request("r2", 100)).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  v1::FinishRequest finish;
  finish.set_request_id("r1");
  v1::FinishReply reply;
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(Call(&v1::Scheduler::Stub::Finish, finish, &reply).ok());
  EXPECT_TRUE(Place(Request("r2", 100)).ok());
}

TEST_F(SchedulerServerTest, DecisionsShowWhatWasPredictedAndWhatCameOfIt) {
  config_.classes.batch.ttft = absl::Milliseconds(1);
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  auto chat = Request("chat-1", 1000);
  chat.set_tenant("acme");
  chat.set_route("chat");
  ASSERT_TRUE(Place(chat).ok());
  auto line = Request("line", 1000);
  line.set_request_class(v1::REQUEST_CLASS_BATCH);
  EXPECT_EQ(Place(line).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
      << "its class has its own objective";
  v1::FinishRequest finish;
  finish.set_request_id("chat-1");
  finish.set_completed(true);
  finish.set_output_tokens(7);
  finish.set_ttft_seconds(0.25);
  finish.set_itl_seconds(std::numeric_limits<double>::quiet_NaN());
  finish.mutable_path()->set_cached_tokens(100);
  finish.mutable_path()->set_cached_remote_tokens(30);
  finish.mutable_path()->set_fetched_bytes(4096);
  v1::FinishReply finished;
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Finish, finish, &finished).ok());

  v1::DecisionsRequest ask;
  v1::DecisionsReply reply;
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Decisions, ask, &reply).ok());
  ASSERT_EQ(reply.decisions_size(), 2);
  EXPECT_EQ(reply.decisions(0).request_id(), "line");
  EXPECT_EQ(reply.decisions(0).outcome(), "rejected");
  EXPECT_EQ(reply.decisions(0).rejection(), "ttft");
  EXPECT_EQ(reply.decisions(0).request_class(), "batch");
  ask.set_request_id("chat-1");
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Decisions, ask, &reply).ok());
  ASSERT_EQ(reply.decisions_size(), 1);
  const v1::Decision& d = reply.decisions(0);
  EXPECT_EQ(d.outcome(), "done");
  EXPECT_EQ(d.tenant(), "acme");
  EXPECT_EQ(d.decode_worker(), "w1");
  EXPECT_GT(d.predicted_ttft_seconds(), 0);
  EXPECT_EQ(d.ttft_seconds(), 0.25);
  EXPECT_EQ(d.itl_seconds(), 0) << "no number is not known";
  EXPECT_EQ(d.cached_host_tokens(), 70u);
  EXPECT_EQ(d.fetched_bytes(), 4096u);
  ask.set_request_id("never");
  EXPECT_EQ(Call(&v1::Scheduler::Stub::Decisions, ask, &reply).error_code(), grpc::StatusCode::NOT_FOUND);
  ask.Clear();
  ask.set_max(100'000);
  EXPECT_EQ(Call(&v1::Scheduler::Stub::Decisions, ask, &reply).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(SchedulerServerTest, BadClassAndEndlessNamesAreRefused) {
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  auto r = Request("r", 100);
  r.set_request_class(static_cast<v1::RequestClass>(9));
  EXPECT_EQ(Place(r).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  r = Request("r", 100);
  r.set_tenant(std::string(300, 'x'));
  const grpc::Status refused = Place(r);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("tenant"));
}

TEST_F(SchedulerServerTest, SilentWorkerIsLostAndCounted) {
  config_.worker_timeout = absl::Seconds(3);
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  EXPECT_EQ(Workers("both", "ready"), 1);
  clock_.Advance(absl::Seconds(4));
  // The timer runs in real time, the worker's age does not.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (Cluster().workers(0).state() != "lost" && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(Cluster().workers(0).state(), "lost");
  EXPECT_EQ(Place(Request("r", 100)).error_code(), grpc::StatusCode::UNAVAILABLE);
  while (Workers("both", "lost") != 1 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  EXPECT_EQ(Workers("both", "lost"), 1);
  EXPECT_EQ(Workers("both", "ready"), 0);
}

TEST_F(SchedulerServerTest, ManyCallersAreServedAtOnce) {
  Start();
  ASSERT_TRUE(Send(Report("w1", v1::ROLE_BOTH)).ok());
  std::atomic<int> placed{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 25; ++i) {
        v1::PlaceReply reply;
        const std::string id = "r" + std::to_string(t * 100 + i);
        if (Call(&v1::Scheduler::Stub::Place, Request(id, 100), &reply).ok()) ++placed;
      }
    });
  }
  for (auto& c : callers) c.join();
  EXPECT_EQ(placed, 100);
  EXPECT_EQ(Decisions("local"), 100u);
  EXPECT_EQ(
      metrics_.AddHistogram("tidepool_scheduler_decision_seconds", "", LatencyBuckets()).counts().size(),
      LatencyBuckets().size() + 1);
}

TEST_F(SchedulerServerTest, LabelSetsExistFromTheStart) {
  Start();
  const std::string text = metrics_.Render();
  for (const char* line : {"tidepool_scheduler_decisions_total{kind=\"remote\"} 0",
                           "tidepool_requests_rejected_total{reason=\"memory\"} 0",
                           "tidepool_workers{role=\"decode\",state=\"ready\"} 0",
                           "tidepool_scheduler_latency_error_ratio{stage=\"prefill\"} 0",
                           "tidepool_scheduler_inflight_requests 0"})
    EXPECT_THAT(text, HasSubstr(line));
}

TEST_F(SchedulerServerTest, ShutdownRefusesCallsAndMayBeRepeated) {
  Start();
  EXPECT_TRUE(server_->ready());
  server_->Shutdown(absl::Seconds(1));
  EXPECT_FALSE(server_->ready());
  server_->Shutdown(absl::Seconds(1));
  v1::ClusterReply out;
  EXPECT_EQ(Call(&v1::Scheduler::Stub::Cluster, v1::ClusterRequest(), &out).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

TEST_F(SchedulerServerTest, TakenAddressIsAnError) {
  Start();
  config_.listen = "127.0.0.1:" + std::to_string(server_->port());
  const auto second = SchedulerServer::Start(config_, kToken, metrics_, clock_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(config_.listen));
}

// KvPeer: a worker's control API that copies everything at once and remembers what it was asked.
class KvPeer final : public v1::Kv::CallbackService {
 public:
  grpc::ServerWriteReactor<v1::KvProgress>* Copy(grpc::CallbackServerContext*,
                                                 const v1::KvCopyRequest* request) override {
    {
      std::lock_guard lock(mu_);
      copies_.push_back(*request);
    }
    asked_.notify_all();
    return calls_.Start<v1::KvProgress>(
        [n = static_cast<uint32_t>(request->keys_size())](const LongCalls::Handle<v1::KvProgress>& handle) {
          v1::KvProgress progress;
          progress.set_total(n);
          progress.set_done(n);
          progress.set_bytes(100 * n);
          progress.set_finished(true);
          handle.report(progress);
          return grpc::Status::OK;
        });
  }
  // False: nobody asked for a copy within 10 s.
  bool WaitForCopy() {
    std::unique_lock lock(mu_);
    return asked_.wait_for(lock, std::chrono::seconds(10), [&] { return !copies_.empty(); });
  }
  std::vector<v1::KvCopyRequest> copies() {
    std::lock_guard lock(mu_);
    return copies_;
  }

 private:
  LongCalls calls_{1, 16};
  std::mutex mu_;
  std::condition_variable asked_;
  std::vector<v1::KvCopyRequest> copies_;
};

class ReplicationServerTest : public SchedulerServerTest {
 protected:
  ReplicationServerTest() { peer_ = StartRpcServer("127.0.0.1:0", &kv_).value(); }
  ~ReplicationServerTest() override {
    server_.reset();
    peer_.server->Shutdown();
    peer_.server->Wait();
  }
  // p1 holds blocks a to d, the last of them on its disk; s1 is a store with an address that answers.
  void Workers() {
    auto prefill = Report("p1", v1::ROLE_PREFILL);
    for (char c : {'a', 'b', 'c'}) prefill.add_events()->set_key(Key(c));
    auto* disk = prefill.add_events();
    disk->set_key(Key('d'));
    disk->set_tier(v1::KV_TIER_DISK);
    ASSERT_TRUE(Send(prefill).ok());
    auto store = Report("s1", v1::ROLE_STORE);
    store.mutable_address()->set_grpc("127.0.0.1:" + std::to_string(peer_.port));
    ASSERT_TRUE(Send(store).ok());
  }
  template <typename Method, typename In>
  grpc::Status Watch(Method method, const In& in, v1::ReplicateProgress* last) {
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    SetTimeout(context, absl::Seconds(10));
    const auto stream = (stub_.get()->*method)(&context, in);
    v1::ReplicateProgress progress;
    while (stream->Read(&progress)) *last = progress;
    return stream->Finish();
  }

  KvPeer kv_;
  RpcServer peer_;
};

// Takes orders to change its role, and remembers them.
class RolePeer final : public v1::Worker::Service {
 public:
  grpc::Status SetRole(grpc::ServerContext* rpc, const v1::SetRoleRequest* request,
                       v1::SetRoleReply*) override {
    if (absl::Status s = CheckClusterToken(*rpc, kToken); !s.ok()) return ToGrpc(s);
    std::lock_guard lock(mu_);
    orders_.push_back(request->role());
    return refuses_ ? grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "it drains") : grpc::Status::OK;
  }
  std::vector<v1::Role> orders() {
    std::lock_guard lock(mu_);
    return orders_;
  }
  void Refuse() { refuses_ = true; }

 private:
  std::mutex mu_;
  std::vector<v1::Role> orders_;
  std::atomic<bool> refuses_{false};
};

class ElasticityServerTest : public SchedulerServerTest {
 protected:
  ElasticityServerTest() {
    peer_ = StartRpcServer("127.0.0.1:0", &worker_).value();
    config_.worker_timeout = absl::Hours(1);
    config_.elasticity_dwell = absl::Milliseconds(200);
    config_.slo.ttft = absl::Seconds(1);
  }
  ~ElasticityServerTest() override {
    server_.reset();
    peer_.server->Shutdown();
    peer_.server->Wait();
  }
  // One prefill worker with so much queued that it is short, and two decode workers with nothing to do, one
  // of which may be about to prefill.
  void ReportAll(bool changing = false) {
    clock_.Advance(absl::Milliseconds(50));
    ++seq_;
    auto prefill = Report("p1", v1::ROLE_PREFILL, seq_);
    prefill.set_queued_prefill_tokens(10'000'000);
    prefill.set_waiting(10);
    ASSERT_TRUE(Send(prefill).ok());
    for (const char* id : {"d1", "d2"}) {
      auto decode = Report(id, v1::ROLE_DECODE, seq_);
      decode.mutable_address()->set_grpc("127.0.0.1:" + std::to_string(peer_.port));
      if (changing && std::string(id) == "d1") {
        decode.set_next_role(v1::ROLE_PREFILL);
        decode.set_draining(true);
      }
      ASSERT_TRUE(Send(decode).ok());
    }
  }
  bool Until(const std::function<bool()>& holds, bool changing = false) {
    for (int i = 0; i < 3000; ++i) {
      if (holds()) return true;
      ReportAll(changing);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  uint64_t Changes(const std::string& result) {
    return metrics_.AddCounter("tidepool_scheduler_role_changes_total", "", {{"result", result}}).value();
  }

  RolePeer worker_;
  RpcServer peer_;
  uint64_t seq_ = 0;
};

TEST_F(ElasticityServerTest, AWorkerIsToldToChangeWhereOneKindIsShort) {
  config_.elasticity = "act";
  Start();
  ASSERT_TRUE(Until([&] { return Cluster().elasticity().flips() == 1; }));
  EXPECT_EQ(worker_.orders(), std::vector<v1::Role>{v1::ROLE_PREFILL});
  EXPECT_EQ(Changes("taken"), 1u);
  // While it changes nobody else is told, however short prefill is.
  ASSERT_TRUE(Until([&] { return Cluster().elasticity().prefill() == 2; }, /*changing=*/true));
  EXPECT_THAT(Cluster().elasticity().reason(), HasSubstr("changing already"));
  for (int i = 0; i < 100; ++i) ReportAll(/*changing=*/true);
  EXPECT_EQ(worker_.orders().size(), 1u);
  const v1::ClusterReply cluster = Cluster();
  EXPECT_EQ(cluster.workers(0).next_role(), v1::ROLE_PREFILL);
  EXPECT_EQ(cluster.workers(0).state(), "draining");
  EXPECT_EQ(cluster.elasticity().prefill(), 2u);
  EXPECT_EQ(cluster.elasticity().decode(), 1u);
  EXPECT_EQ(cluster.elasticity().mode(), "act");
}

TEST_F(ElasticityServerTest, AdviceIsGivenAndNotActedOn) {
  Start();
  ASSERT_TRUE(Until([&] { return !Cluster().elasticity().worker().empty(); }));
  const v1::Elasticity e = Cluster().elasticity();
  EXPECT_EQ(e.mode(), "advise");
  EXPECT_EQ(e.worker(), "d1");
  EXPECT_EQ(e.role(), v1::ROLE_PREFILL);
  EXPECT_GT(e.prefill_pressure(), 1);
  EXPECT_EQ(e.wanted_prefill(), 2u);
  EXPECT_THAT(e.reason(), HasSubstr("d1 should become a prefill worker"));
  EXPECT_TRUE(worker_.orders().empty());
  EXPECT_GT(metrics_.AddGauge("tidepool_scheduler_pressure_ratio", "", {{"role", "prefill"}}).value(), 1);
}

TEST_F(ElasticityServerTest, ARefusalIsCountedAndAnotherIsAsked) {
  config_.elasticity = "act";
  worker_.Refuse();
  Start();
  ASSERT_TRUE(Until([&] { return Cluster().elasticity().refused() >= 2; }));
  EXPECT_GE(Changes("refused"), 2u);
  EXPECT_EQ(Cluster().elasticity().flips(), 0u);
}

TEST_F(ElasticityServerTest, TurnedOffItSaysNothingAnyMore) {
  Start();
  ASSERT_TRUE(Until([&] { return !Cluster().elasticity().worker().empty(); }));
  config_.elasticity = "off";
  server_->Apply(config_);
  const v1::Elasticity e = Cluster().elasticity();
  EXPECT_EQ(e.mode(), "off");
  EXPECT_EQ(e.reason() + e.worker(), "");
  EXPECT_EQ(e.wanted_prefill(), 0u);
  EXPECT_EQ(metrics_.AddGauge("tidepool_scheduler_pressure_ratio", "", {{"role", "prefill"}}).value(), 0);
}

TEST_F(ElasticityServerTest, OffSaysNothing) {
  config_.elasticity = "off";
  Start();
  for (int i = 0; i < 50; ++i) ReportAll();
  const v1::Elasticity e = Cluster().elasticity();
  EXPECT_EQ(e.mode(), "off");
  EXPECT_EQ(e.reason(), "");
  EXPECT_TRUE(worker_.orders().empty());
}

TEST_F(ReplicationServerTest, WhereNamesHoldersWithTheirTiers) {
  Start();
  Workers();
  v1::WhereRequest request;
  for (char c : {'a', 'd', 'z'}) request.add_keys(Key(c));
  v1::WhereReply reply;
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Where, request, &reply).ok());
  ASSERT_EQ(reply.blocks_size(), 3);
  ASSERT_EQ(reply.blocks(0).holders_size(), 1);
  EXPECT_EQ(reply.blocks(0).holders(0).worker_id(), "p1");
  EXPECT_EQ(reply.blocks(0).holders(0).tiers(0), v1::KV_TIER_HOST);
  EXPECT_EQ(reply.blocks(1).holders(0).tiers(0), v1::KV_TIER_DISK);
  EXPECT_EQ(reply.blocks(2).holders_size(), 0);

  v1::WhereRequest chain;
  chain.set_chain(true);
  for (char c : {'a', 'b', 'c', 'd', 'z'}) chain.add_keys(Key(c));
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Where, chain, &reply).ok());
  ASSERT_EQ(reply.prefixes_size(), 1);
  EXPECT_EQ(reply.prefixes(0).blocks(), 4u);
  EXPECT_EQ(reply.prefixes(0).host_blocks(), 3u);
  chain.add_keys("short");
  EXPECT_EQ(Call(&v1::Scheduler::Stub::Where, chain, &reply).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ReplicationServerTest, ReplicateHasTheReceiverPull) {
  Start();
  Workers();
  v1::ReplicateRequest request;
  for (char c : {'a', 'b', 'z'}) request.add_keys(Key(c));
  request.set_copies(2);
  v1::ReplicateProgress progress;
  const auto status = Watch(&v1::Scheduler::Stub::Replicate, request, &progress);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(progress.finished());
  EXPECT_EQ(progress.copied(), 2u);
  ASSERT_EQ(kv_.copies().size(), 1u);
  EXPECT_EQ(kv_.copies()[0].from().worker_id(), "p1");
  EXPECT_EQ(kv_.copies()[0].keys_size(), 2);
  EXPECT_GT(kv_.copies()[0].bytes_per_second(), 0u);
  request.set_copies(1);
  EXPECT_EQ(Watch(&v1::Scheduler::Stub::Replicate, request, &progress).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ReplicationServerTest, EvacuateCopiesWhatIsInMemoryThereAlone) {
  Start();
  Workers();
  v1::EvacuateRequest request;
  request.set_worker_id("p1");
  v1::ReplicateProgress progress;
  const auto status = Watch(&v1::Scheduler::Stub::Evacuate, request, &progress);
  ASSERT_TRUE(status.ok()) << status.error_message();
  // Nothing is known of the store's unused slots, and nobody has used these blocks: they are not worth
  // others'.
  EXPECT_EQ(progress.total(), 0u);
  auto store = Report("s1", v1::ROLE_STORE, 2);
  store.mutable_address()->set_grpc("127.0.0.1:" + std::to_string(peer_.port));
  store.add_tiers()->set_tier(v1::KV_TIER_HOST);
  ASSERT_TRUE(Send(store).ok());
  ASSERT_TRUE(Watch(&v1::Scheduler::Stub::Evacuate, request, &progress).ok());
  EXPECT_EQ(progress.total(), 3u);
  EXPECT_EQ(progress.copied(), 3u);
  request.set_worker_id("nobody");
  EXPECT_EQ(Watch(&v1::Scheduler::Stub::Evacuate, request, &progress).error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(ReplicationServerTest, PeerThatDoesNotAnswerIsSkippedWithAReason) {
  Start();
  Workers();
  peer_.server->Shutdown();
  v1::ReplicateRequest request;
  request.add_keys(Key('a'));
  request.set_to("s1");
  v1::ReplicateProgress progress;
  ASSERT_TRUE(Watch(&v1::Scheduler::Stub::Replicate, request, &progress).ok());
  EXPECT_EQ(progress.copied(), 0u);
  EXPECT_EQ(progress.skipped(), 1u);
  EXPECT_THAT(progress.note(), HasSubstr("s1"));
}

TEST_F(ReplicationServerTest, HotBlocksAreCopiedWithoutBeingAskedFor) {
  Start();
  auto prefill = Report("p1", v1::ROLE_PREFILL);
  for (char c = 'a'; c < 'a' + 8; ++c) prefill.add_events()->set_key(Key(c));
  ASSERT_TRUE(Send(prefill).ok());
  ASSERT_TRUE(Send(Report("d1", v1::ROLE_DECODE)).ok());
  auto store = Report("s1", v1::ROLE_STORE);
  store.mutable_address()->set_grpc("127.0.0.1:" + std::to_string(peer_.port));
  ASSERT_TRUE(Send(store).ok());
  for (int i = 0; i < 6; ++i) {
    auto request = Request("r" + std::to_string(i), 8 * 32 + 1);
    for (char c = 'a'; c < 'a' + 8; ++c) request.add_keys(Key(c));
    ASSERT_TRUE(Place(request).ok());
  }
  ASSERT_TRUE(kv_.WaitForCopy());
  EXPECT_EQ(kv_.copies()[0].keys_size(), 8);
}

// What a test says of the election.
class FakeLeadership final : public Leadership {
 public:
  std::optional<uint64_t> Term(uint64_t callers_term) override {
    std::lock_guard lock(mu_);
    if (callers_term > term_) leads_ = false;
    return leads_ ? std::optional(term_) : std::nullopt;
  }
  std::string LeaderAddress() const override { return "other.test:8002"; }
  std::vector<v1::Member> Members() const override {
    std::lock_guard lock(mu_);
    return members_;
  }
  bool EtcdReachable() const override { return true; }

  void Lead(uint64_t term) {
    std::lock_guard lock(mu_);
    term_ = term;
    leads_ = true;
  }
  void AddMember(const std::string& id, const std::string& fingerprint, const std::string& role = "both",
                 const std::string& identity = "") {
    std::lock_guard lock(mu_);
    v1::Member& member = members_.emplace_back();
    member.set_id(id);
    member.set_fingerprint(fingerprint);
    member.set_role(role);
    member.set_identity(identity);
  }

 private:
  mutable std::mutex mu_;
  bool leads_ = false;
  uint64_t term_ = 0;
  std::vector<v1::Member> members_;
};

class StandbyTest : public SchedulerServerTest {
 protected:
  StandbyTest() { leadership_ = &fake_; }
  grpc::Status ReportAtTerm(uint64_t term) {
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    AddSchedulerTerm(context, term);
    SetTimeout(context, absl::Seconds(10));
    return stub_->Report(&context, Report("a", v1::ROLE_BOTH), &reply_);
  }
  FakeLeadership fake_;
};

TEST_F(StandbyTest, StandsByAndSaysWhoLeads) {
  Start();
  const auto refused = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_THAT(status.error_message(), HasSubstr("other.test:8002"));
  };
  refused(Send(Report("a", v1::ROLE_BOTH)));
  refused(Place(Request("r", 100)));
  v1::ClusterReply cluster;
  refused(Call(&v1::Scheduler::Stub::Cluster, v1::ClusterRequest(), &cluster));
  v1::FinishReply finished;
  refused(Call(&v1::Scheduler::Stub::Finish, v1::FinishRequest(), &finished));
  fake_.Lead(5);
  EXPECT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  EXPECT_TRUE(Place(Request("r", 100)).ok());
  EXPECT_TRUE(Call(&v1::Scheduler::Stub::Cluster, v1::ClusterRequest(), &cluster).ok());
  EXPECT_EQ(cluster.term(), 5u);
}

TEST_F(StandbyTest, KnowsNothingOfAnEarlierTerm) {
  fake_.Lead(5);
  Start();
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  ASSERT_TRUE(Place(Request("r", 100)).ok());
  fake_.Lead(9);
  v1::ClusterReply cluster;
  ASSERT_TRUE(Call(&v1::Scheduler::Stub::Cluster, v1::ClusterRequest(), &cluster).ok());
  EXPECT_EQ(cluster.workers_size(), 0);
  // A worker that goes on counting, as it does where it did not notice, is asked for everything.
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH, 7)).ok());
  EXPECT_TRUE(reply_.resync());
}

TEST_F(StandbyTest, ACallerThatKnowsAHigherTermIsNotAnswered) {
  fake_.Lead(5);
  Start();
  EXPECT_TRUE(ReportAtTerm(4).ok());
  EXPECT_TRUE(ReportAtTerm(5).ok());
  EXPECT_EQ(ReportAtTerm(6).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReportAtTerm(5).error_code(), grpc::StatusCode::UNAVAILABLE) << "it leads no more";
}

TEST_F(StandbyTest, TheFirstToReportDoesNotChooseTheModelWhereOthersWereAccepted) {
  fake_.Lead(5);
  fake_.AddMember("gateway", "");
  fake_.AddMember("b", "f1");
  Start();
  v1::WorkerReport stranger = Report("a", v1::ROLE_BOTH);
  stranger.mutable_model()->set_fingerprint("f2");
  const grpc::Status refused = Send(stranger);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.error_message(), HasSubstr("f1"));
  EXPECT_THAT(refused.error_message(), HasSubstr("f2"));
  EXPECT_TRUE(Send(Report("b", v1::ROLE_BOTH)).ok());
}

TEST_F(StandbyTest, TheFirstToReportDoesNotChooseTheLayoutNorTheCodecEither) {
  fake_.Lead(5);
  const v1::WorkerReport accepted = Report("b", v1::ROLE_BOTH);
  fake_.AddMember("b", "f1", "both", ModelIdentityDigest(accepted.model()));
  Start();
  for (const auto& change : std::vector<std::function<void(v1::ModelIdentity&)>>{
           [](auto& m) { m.set_kv_codec("int8"); }, [](auto& m) { m.set_block_tokens(2 * m.block_tokens()); },
           [](auto& m) { m.set_max_model_len(m.max_model_len() + 1); },
           [](auto& m) { m.set_vocab_size(m.vocab_size() + 1); }}) {
    v1::WorkerReport stranger = Report("a", v1::ROLE_BOTH);
    change(*stranger.mutable_model());
    const grpc::Status refused = Send(stranger);
    EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_THAT(refused.error_message(), HasSubstr("kv.block_tokens"));
  }
  EXPECT_TRUE(Send(accepted).ok());
}

TEST_F(StandbyTest, AStoreThatWasAcceptedKeepsOtherStoresOutAndNoWorker) {
  fake_.Lead(5);
  fake_.AddMember("s", "f2", "store");
  Start();
  const grpc::Status refused = Send(Report("other", v1::ROLE_STORE));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.error_message(), HasSubstr("that of s"));
  EXPECT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
}

TEST_F(StandbyTest, AStoreThatReportsFirstAfterATakeoverDoesNotSetTheModel) {
  fake_.Lead(5);
  fake_.AddMember("a", "f1");
  Start();
  const auto of_another_model = [](const std::string& id, v1::Role role) {
    v1::WorkerReport report = Report(id, role);
    report.mutable_model()->set_fingerprint("f2");
    return report;
  };
  EXPECT_EQ(Send(of_another_model("other", v1::ROLE_STORE)).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  ASSERT_TRUE(Send(Report("s", v1::ROLE_STORE)).ok());
  EXPECT_EQ(Cluster().model().fingerprint(), "") << "no worker has named one";
  // And whoever is not among the members is held to their model all the same.
  EXPECT_EQ(Send(of_another_model("stranger", v1::ROLE_BOTH)).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  EXPECT_EQ(Cluster().model().fingerprint(), "f1");
}

TEST_F(StandbyTest, WaitsAMomentForTheWorkersThatItsPredecessorHad) {
  fake_.Lead(5);
  fake_.AddMember("a", "f1");
  fake_.AddMember("b", "f1");
  Start();
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  EXPECT_EQ(Place(Request("r", 100)).error_code(), grpc::StatusCode::UNAVAILABLE);
  ASSERT_TRUE(Send(Report("b", v1::ROLE_BOTH)).ok());
  EXPECT_TRUE(Place(Request("r", 100)).ok());
}

TEST_F(StandbyTest, DoesNotWaitForLongForOneThatDoesNotReport) {
  fake_.Lead(5);
  fake_.AddMember("a", "f1");
  fake_.AddMember("dead", "f1");
  Start();
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  EXPECT_EQ(Place(Request("r", 100)).error_code(), grpc::StatusCode::UNAVAILABLE);
  clock_.Advance(absl::Seconds(2));
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH, 2)).ok());
  EXPECT_TRUE(Place(Request("r", 100)).ok());
}

TEST_F(SchedulerServerTest, AWorkerOfAnotherProtocolIsRefusedWithBothVersions) {
  Start();
  v1::WorkerReport report = Report("a", v1::ROLE_BOTH);
  report.set_protocol(kClusterProtocol + 1);
  report.set_version("9.9.9");
  const grpc::Status refused = Send(report);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.error_message(), HasSubstr("9.9.9"));
  report.set_protocol(kClusterProtocol);
  EXPECT_TRUE(Send(report).ok());
}

TEST_F(SchedulerServerTest, ARequestExcludesAProcessAndNotTheOneThatCameAfterIt) {
  Start();
  ASSERT_TRUE(Send(Report("a", v1::ROLE_BOTH)).ok());
  v1::PlaceRequest request = Request("r", 100);
  request.add_exclude_workers("boot-a");
  EXPECT_EQ(Place(request).error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::WorkerReport again = Report("a", v1::ROLE_BOTH);
  again.mutable_address()->set_boot_id("young");
  ASSERT_TRUE(Send(again).ok());
  EXPECT_TRUE(Place(request).ok());
}

}  // namespace
}  // namespace tidepool
