// gateway_load: what the gateway costs and adds, by itself. This process plays scheduler and worker (a worker
// that computes nothing: each step it sends every running stream its next digit) and the clients; the gateway
// between them is the real one, in its own process. So both ends of a token are on one clock:
//
//   lag      from the worker's handing a token to gRPC to the client's reading its bytes
//   added    the lag through the gateway less the lag of a gRPC client that reads the same worker directly,
//            measured in the same run, at the same number of streams and the same pace
//
// Prints "LISTENING host:port" (its scheduler), then reads commands from stdin, one a line, and answers each
// with one line of JSON:
//   run KEY=VALUE...   target=host:port of the gateway, or target=direct; pid=of the gateway (for its CPU);
//                      streams, tokens (of each), interval_us (between steps; 0: as fast as they go)
// See tools/bench/README.md.
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/clock.h"
#include "base/status.h"
#include "server/bench/answer_reader.h"
#include "server/bench/http_client.h"
#include "server/bench/sse_parser.h"
#include "server/bench/statistics.h"
#include "server/rpc/rpc.h"
#include "server/worker/stream_writer.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

using Json = nlohmann::json;

// Prompt ids stand for themselves: stream n is asked for as {kIdBase + n / kIdRange, kIdBase + n % kIdRange}.
constexpr int32_t kIdBase = 300, kIdRange = 500;
constexpr absl::Duration kRunTimeout = absl::Minutes(5);

// Token i of a stream is the digit i % 10, whose ids the model's tokenizer has in this order.
std::array<int32_t, 10> g_digits;

// When each token of each stream was sent by the worker and read by the client.
struct StreamTimes {
  std::vector<absl::Time> sent, read;
  std::string text;
  bool done = false;
};

struct RunState {
  size_t tokens = 0;
  absl::Duration interval;
  std::vector<StreamTimes> streams;
  std::mutex mu;
  std::condition_variable changed;
  size_t open = 0;
  size_t failed = 0;
  std::string first_error;

  void Ended(const std::string& error) {
    std::lock_guard lock(mu);
    --open;
    failed += !error.empty();
    if (first_error.empty()) first_error = error;
    changed.notify_all();
  }
};

// EchoWorker: scheduler and worker in one; places everything on itself. Its one thread steps all streams.
class EchoWorker final {
 public:
  using Event = v1::WorkerGenerateEvent;
  using Port = StreamPort<Event>;

  EchoWorker() : scheduler_(*this), worker_(*this) {
    auto worker = StartRpcServer("127.0.0.1:0", &worker_);
    auto scheduler = StartRpcServer("127.0.0.1:0", &scheduler_);
    TP_CHECK(worker.ok() && scheduler.ok());
    worker_server_ = *std::move(worker);
    scheduler_server_ = *std::move(scheduler);
    address_.set_worker_id("echo");
    address_.set_boot_id(std::string(32, 'e'));
    address_.set_grpc("127.0.0.1:" + std::to_string(worker_server_.port));
    address_.set_pid(static_cast<uint32_t>(getpid()));
    stepper_ = std::thread([this] { Step(); });
  }
  ~EchoWorker() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
    }
    changed_.notify_all();
    stepper_.join();
    worker_server_.server->Shutdown(std::chrono::system_clock::now());
    scheduler_server_.server->Shutdown(std::chrono::system_clock::now());
  }

  std::string scheduler_address() const { return "127.0.0.1:" + std::to_string(scheduler_server_.port); }
  const std::string& worker_address() const { return address_.grpc(); }

  // The streams that come from now on belong to `run`; it begins when all are there.
  void Begin(RunState* run) {
    std::lock_guard lock(mu_);
    run_ = run;
    active_.clear();
    waiting_for_ = run->streams.size();
  }
  void End() {
    std::lock_guard lock(mu_);
    run_ = nullptr;
    active_.clear();
  }

 private:
  class SchedulerService final : public v1::Scheduler::Service {
   public:
    explicit SchedulerService(EchoWorker& owner) : owner_(owner) {}
    grpc::Status Place(grpc::ServerContext*, const v1::PlaceRequest*, v1::PlaceReply* reply) override {
      *reply->mutable_decode() = owner_.address_;
      reply->set_reason("the only worker");
      return grpc::Status::OK;
    }
    grpc::Status Finish(grpc::ServerContext*, const v1::FinishRequest*, v1::FinishReply*) override {
      return grpc::Status::OK;
    }
    grpc::Status Cluster(grpc::ServerContext*, const v1::ClusterRequest*, v1::ClusterReply* reply) override {
      v1::ModelIdentity& model = *reply->mutable_model();
      model.set_name("echo");
      model.set_fingerprint(std::string(64, 'e'));
      model.set_layers(1);
      model.set_kv_heads(1);
      model.set_head_dim(64);
      model.set_block_tokens(32);
      model.set_max_model_len(1 << 20);
      model.set_vocab_size(1280);
      v1::WorkerView& view = *reply->add_workers();
      *view.mutable_address() = owner_.address_;
      view.set_role(v1::ROLE_BOTH);
      view.set_state("ready");
      return grpc::Status::OK;
    }

   private:
    EchoWorker& owner_;
  };

  class WorkerService final : public v1::Worker::CallbackService {
   public:
    explicit WorkerService(EchoWorker& owner) : owner_(owner) {}
    grpc::ServerWriteReactor<Event>* Generate(grpc::CallbackServerContext*,
                                              const v1::WorkerGenerateRequest* request) override {
      auto port = std::make_shared<Port>();
      auto* writer = new StreamWriter<Event>(
          Merge, [] {}, [port] { port->Detach(); });
      port->Attach(writer);
      owner_.Add(*request, std::move(port));
      return writer;
    }

   private:
    static void Merge(Event& pending, Event&& next) {
      for (auto& token : *next.mutable_tokens()) pending.add_tokens()->Swap(&token);
      if (!next.finish_reason().empty()) {
        pending.set_finish_reason(next.finish_reason());
        pending.set_stop_token(next.stop_token());
      }
    }
    EchoWorker& owner_;
  };

  struct Active {
    std::shared_ptr<Port> port;
    size_t stream = 0;
    size_t next = 0;  // token
  };

  void Add(const v1::WorkerGenerateRequest& request, std::shared_ptr<Port> port) {
    std::lock_guard lock(mu_);
    const size_t stream =
        request.prompt_size() < 2
            ? SIZE_MAX
            : static_cast<size_t>((request.prompt(request.prompt_size() - 2) - kIdBase) * kIdRange +
                                  request.prompt(request.prompt_size() - 1) - kIdBase);
    if (run_ == nullptr || stream >= run_->streams.size()) {
      port->Close(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "not a stream of this run"));
      return;
    }
    active_.push_back({std::move(port), stream, 0});
    if (active_.size() == waiting_for_) changed_.notify_all();
  }

  // One step of the "engine": every stream's next token.
  void Step() {
    std::unique_lock lock(mu_);
    while (!stop_) {
      if (run_ == nullptr || active_.empty() || active_.size() < waiting_for_) {
        changed_.wait(lock);
        continue;
      }
      waiting_for_ = 0;
      const auto begin = std::chrono::steady_clock::now();
      for (Active& active : active_) {
        Event event;
        auto& token = *event.add_tokens();
        token.set_id(g_digits[active.next % 10]);
        token.set_index(static_cast<uint32_t>(active.next));
        if (active.next == 0) event.mutable_path()->set_decode_worker("echo");
        run_->streams[active.stream].sent.push_back(Clock::Real().Now());
        const bool last = ++active.next == run_->tokens;
        if (last) {
          event.set_finish_reason("length");
          event.set_stop_token(-1);
        }
        active.port->Write(std::move(event));
        if (last) active.port->Close(grpc::Status::OK);
      }
      std::erase_if(active_, [&](const Active& active) { return active.next == run_->tokens; });
      const auto next = begin + absl::ToChronoNanoseconds(run_->interval);
      changed_.wait_until(lock, next, [&] { return stop_ || std::chrono::steady_clock::now() >= next; });
    }
  }

  SchedulerService scheduler_;
  WorkerService worker_;
  RpcServer worker_server_, scheduler_server_;
  v1::WorkerAddress address_;
  std::mutex mu_;
  std::condition_variable changed_;
  bool stop_ = false;
  RunState* run_ = nullptr;
  size_t waiting_for_ = 0;
  std::vector<Active> active_;
  std::thread stepper_;
};

// One stream through the gateway.
class HttpStream final : public HttpReplyHandler {
 public:
  HttpStream(RunState& run, StreamTimes& times) : run_(run), times_(times) {}

  void OnHead(int status, HttpHeaders, absl::Time) override { status_ = status; }
  void OnBody(std::string_view bytes, absl::Time at) override {
    if (status_ != 200) {
      body_ += bytes.substr(0, 500);
      return;
    }
    (void)sse_.Feed(bytes, [&](std::string_view, std::string_view data) { Event(data, at); });
  }
  void OnDone(absl::Status status, absl::Time) override {
    std::string error;
    if (!status.ok()) error = status.ToString();
    if (status_ != 200) error += " HTTP " + std::to_string(status_) + " " + ErrorMessageOf(body_);
    if (error.empty() && !times_.done) error = "no [DONE]";
    run_.Ended(error);
  }

 private:
  void Event(std::string_view data, absl::Time at) {
    if (data == "[DONE]") {
      times_.done = true;
      return;
    }
    // Digits only, so that they can be found without reading JSON: the clients share the machine.
    constexpr std::string_view kText = "\"text\":\"";
    const size_t found = data.find(kText);
    if (found == data.npos) return;
    const std::string_view rest = data.substr(found + kText.size());
    const std::string_view text = rest.substr(0, rest.find('"'));
    times_.text += text;
    times_.read.insert(times_.read.end(), text.size(), at);
  }

  RunState& run_;
  StreamTimes& times_;
  SseParser sse_;
  int status_ = 0;
  std::string body_;
};

// The same without a gateway.
class DirectStream final : public grpc::ClientReadReactor<v1::WorkerGenerateEvent> {
 public:
  DirectStream(RunState& run, StreamTimes& times, v1::Worker::Stub& stub, v1::WorkerGenerateRequest request)
      : run_(run), times_(times), request_(std::move(request)) {
    SetTimeout(context_, kRunTimeout);
    stub.async()->Generate(&context_, &request_, this);
    StartRead(&event_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    const absl::Time now = Clock::Real().Now();
    for (const auto& token : event_.tokens()) {
      times_.read.push_back(now);
      times_.text += static_cast<char>('0' + token.index() % 10);
    }
    StartRead(&event_);
  }
  void OnDone(const grpc::Status& status) override {
    times_.done = status.ok();
    run_.Ended(status.ok() ? "" : status.error_message());
    delete this;
  }

 private:
  RunState& run_;
  StreamTimes& times_;
  v1::WorkerGenerateRequest request_;
  grpc::ClientContext context_;
  v1::WorkerGenerateEvent event_;
};

// User and system time of a process, all threads.
double ProcessCpuSeconds(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  if (end == text.npos) return 0;
  std::istringstream rest(text.substr(end + 1));
  std::string skipped;
  for (int i = 0; i < 11; ++i) rest >> skipped;  // up to field 14, utime
  double user = 0, system = 0;
  rest >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

class Loader {
 public:
  explicit Loader(EchoWorker& worker) : worker_(worker) {
    grpc::ChannelArguments arguments;
    channel_ =
        grpc::CreateCustomChannel(worker.worker_address(), grpc::InsecureChannelCredentials(), arguments);
    stub_ = v1::Worker::NewStub(channel_);
  }

  Json Run(const std::map<std::string, std::string>& args) {
    const auto number = [&](const char* key, uint64_t otherwise) {
      uint64_t out = otherwise;
      if (const auto it = args.find(key); it != args.end()) (void)absl::SimpleAtoi(it->second, &out);
      return out;
    };
    const auto streams = static_cast<size_t>(number("streams", 100));
    const std::string target = args.contains("target") ? args.at("target") : "direct";
    const int pid = static_cast<int>(number("pid", 0));
    RunState run;
    run.tokens = static_cast<size_t>(number("tokens", 50));
    run.interval = absl::Microseconds(number("interval_us", 50'000));
    run.streams.resize(streams);
    run.open = streams;
    for (StreamTimes& times : run.streams) {
      times.sent.reserve(run.tokens);
      times.read.reserve(run.tokens);
      times.text.reserve(run.tokens);
    }
    worker_.Begin(&run);
    const double cpu_before = ProcessCpuSeconds(pid);
    const absl::Time begin = Clock::Real().Now();
    for (size_t i = 0; i < streams; ++i) Start(run, i, target);
    {
      std::unique_lock lock(run.mu);
      // Every stream has a deadline.
      run.changed.wait(lock, [&] { return run.open == 0; });
    }
    const absl::Duration wall = Clock::Real().Now() - begin;
    const double cpu = ProcessCpuSeconds(pid) - cpu_before;
    worker_.End();
    return Result(run, target, wall, cpu);
  }

 private:
  static int32_t High(size_t stream) { return kIdBase + static_cast<int32_t>(stream) / kIdRange; }
  static int32_t Low(size_t stream) { return kIdBase + static_cast<int32_t>(stream) % kIdRange; }

  void Start(RunState& run, size_t i, const std::string& target) {
    StreamTimes& times = run.streams[i];
    if (target == "direct") {
      v1::WorkerGenerateRequest request;
      request.set_request_id("direct-" + std::to_string(i));
      request.add_prompt(High(i));
      request.add_prompt(Low(i));
      request.set_max_tokens(static_cast<uint32_t>(run.tokens));
      new DirectStream(run, times, *stub_, std::move(request));
      return;
    }
    OutboundCall call;
    const auto url = ParseHttpUrl(target);
    TP_CHECK(url.ok());
    call.url = *url;
    call.method = "POST";
    call.target = "/v1/completions";
    call.headers = {{"Content-Type", "application/json"}};
    call.timeout = kRunTimeout;
    call.body = Json{
        {"model", "echo"},
        {"prompt", {High(i), Low(i)}},
        {"max_tokens", run.tokens},
        {"add_special_tokens", false},
        {"stream",
         true}}.dump();
    client_.Send(std::move(call), std::make_shared<HttpStream>(run, times));
  }

  static Json Result(const RunState& run, const std::string& target, absl::Duration wall, double cpu) {
    std::vector<double> lags, firsts;
    size_t complete = 0, events = 0;
    absl::Time first = absl::InfiniteFuture(), last = absl::InfinitePast();
    std::string expected;
    for (size_t i = 0; i < run.tokens; ++i) expected += static_cast<char>('0' + i % 10);
    for (const StreamTimes& times : run.streams) {
      complete += times.done && times.text == expected;
      const size_t count = std::min(times.sent.size(), times.read.size());
      for (size_t i = 0; i < count; ++i) {
        lags.push_back(absl::ToDoubleMicroseconds(times.read[i] - times.sent[i]));
        events += i == 0 || times.read[i] != times.read[i - 1];
      }
      if (count == 0) continue;
      first = std::min(first, times.sent.front());
      last = std::max(last, times.read.back());
    }
    const auto tokens = static_cast<double>(lags.size());
    std::sort(lags.begin(), lags.end());
    const double seconds = absl::ToDoubleSeconds(last - first);
    return {{"target", target},
            {"streams", run.streams.size()},
            {"complete", complete},
            {"failed", run.failed},
            {"error", run.first_error},
            {"tokens", lags.size()},
            {"reads", events},
            {"wall_s", absl::ToDoubleSeconds(wall)},
            {"stream_s", seconds},
            {"tokens_per_s", seconds > 0 ? tokens / seconds : 0},
            {"gateway_cpu_s", cpu},
            {"gateway_cpu_us_per_token", tokens > 0 ? cpu * 1e6 / tokens : 0},
            {"lag_us_p50", Percentile(lags, 50)},
            {"lag_us_p99", Percentile(lags, 99)},
            {"lag_us_mean", Mean(lags)}};
  }

  EchoWorker& worker_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Worker::Stub> stub_;
  HttpClient client_;
};

int Main(int argc, char** argv) {
  if (argc != 11) {
    std::fprintf(stderr, "usage: gateway_load ID0 ... ID9   (the token ids of the digits 0 to 9)\n");
    return 2;
  }
  for (int i = 0; i < 10; ++i) {
    if (!absl::SimpleAtoi(argv[i + 1], &g_digits[static_cast<size_t>(i)])) return 2;
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  EchoWorker worker;
  Loader loader(worker);
  std::printf("LISTENING %s\n", worker.scheduler_address().c_str());
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string word;
    words >> word;
    if (word != "run") {
      std::fprintf(stderr, "gateway_load: unknown command '%s'\n", word.c_str());
      return 2;
    }
    std::map<std::string, std::string> args;
    while (words >> word) args[word.substr(0, word.find('='))] = word.substr(word.find('=') + 1);
    std::printf("%s\n", loader.Run(args).dump().c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace tidepool

int main(int argc, char** argv) { return tidepool::Main(argc, argv); }
