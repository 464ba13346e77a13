#include "server/batch/batch_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>
#include <thread>

#include "base/bounded_queue.h"
#include "base/status.h"
#include "tests/server/batch/temp_dir.h"

namespace tidepool {
namespace {

// FakeTransport: answers from threads of its own, as `answer` says.
class FakeTransport final : public BatchTransport {
 public:
  using Answer = std::function<BatchReply(const BatchCall&, int attempt)>;
  explicit FakeTransport(Answer answer, int threads = 4) : answer_(std::move(answer)), queue_(100'000) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] {
        while (auto work = queue_.Pop(absl::InfiniteDuration())) (*work)();
      });
    }
  }
  ~FakeTransport() override {
    queue_.Close();
    for (std::thread& thread : threads_) thread.join();
  }

  std::shared_ptr<InFlight> Send(BatchCall call, Callbacks callbacks) override {
    auto flight = std::make_shared<Flight>();
    flight->callbacks = std::move(callbacks);
    int attempt = 0;
    {
      std::lock_guard lock(mu_);
      attempt = ++attempts_[call.body];
      order_.push_back(call.body);
      most_ = std::max(most_, ++inflight_);
    }
    TP_CHECK(queue_.TryPush([this, flight, call, attempt] {
      BatchReply reply = answer_(call, attempt);
      {
        std::lock_guard lock(mu_);
        --inflight_;
      }
      flight->End(std::move(reply));
    }));
    return flight;
  }

  std::map<std::string, int> attempts() {
    std::lock_guard lock(mu_);
    return attempts_;
  }
  std::vector<std::string> order() {
    std::lock_guard lock(mu_);
    return order_;
  }
  size_t most() {
    std::lock_guard lock(mu_);
    return most_;
  }

 private:
  struct Flight final : InFlight {
    std::mutex mu;
    Callbacks callbacks;
    bool ended = false;
    void End(BatchReply reply) {
      {
        std::lock_guard lock(mu);
        if (std::exchange(ended, true)) return;
      }
      callbacks.done(std::move(reply));
    }
    void Cancel() override {
      BatchReply reply;
      reply.status = absl::CancelledError("cancelled");
      End(std::move(reply));
    }
  };

  const Answer answer_;
  std::mutex mu_;
  std::map<std::string, int> attempts_;
  std::vector<std::string> order_;
  size_t inflight_ = 0, most_ = 0;
  BoundedQueue<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
};

BatchReply Http(int status, std::string body = R"({"ok":true})") {
  BatchReply reply;
  reply.http_status = status;
  reply.body = std::move(body);
  return reply;
}

std::string Line(const std::string& id, const std::string& prompt) {
  return R"({"custom_id":")" + id + R"(","method":"POST","url":"/v1/completions","body":{"prompt":")" +
         prompt + "\"}}\n";
}

// A batch in files of its own.
struct Fixture {
  TempDir dir;
  std::unique_ptr<InputIndex> index;
  AdmissionCore::Options admission{.inflight_max = 8};

  explicit Fixture(const std::string& input) {
    WriteText(dir / "in", input);
    auto built = InputIndex::Build(dir / "in", {});
    TP_CHECK(built.ok());
    index = std::make_unique<InputIndex>(*std::move(built));
  }

  struct Result {
    absl::StatusOr<BatchRun::End> end;
    BatchCounts counts;
  };
  Result Run(BatchTransport& transport,
             const std::function<void(BatchRun&, const BatchCounts&)>& on_tick = nullptr,
             const std::function<void(BatchRun::Options&)>& adjust = nullptr) {
    BatchRun::Options options;
    auto log = OpenOutput(dir / "out", *index, options.done);
    TP_CHECK(log.ok());
    BatchGate gate(admission, load, Clock::Real());
    options.index = index.get();
    options.answers = options.failures = log->get();
    options.transport = &transport;
    options.gate = &gate;
    options.retry.backoff_min = absl::Milliseconds(1);
    options.tick = absl::Milliseconds(2);
    BatchRun* running = nullptr;
    options.on_tick = [&](const BatchCounts& counts) {
      if (on_tick && running != nullptr) on_tick(*running, counts);
    };
    if (adjust) adjust(options);
    BatchRun run(options);
    running = &run;
    auto end = run.Run();
    return {std::move(end), run.counts()};
  }

  // custom_id to status; fails the test where one is there twice.
  std::map<std::string, int> Output() const {
    std::map<std::string, int> out;
    for (const std::string& line : LinesOf(ReadText(dir / "out"))) {
      const auto json = ParseJson(line);
      EXPECT_TRUE(json.ok()) << line;
      const OrderedJson& id = (*json)["custom_id"];
      const std::string name = id.is_null() ? "line " + std::to_string((*json)["error"]["line"].get<int>())
                                            : id.get<std::string>();
      const int status = (*json)["response"].is_null() ? 0 : (*json)["response"]["status_code"].get<int>();
      EXPECT_TRUE(out.emplace(name, status).second) << name << " twice";
    }
    return out;
  }

  std::function<OnlineLoad()> load;
};

std::string ManyLines(int n) {
  std::string out;
  for (int i = 0; i < n; ++i) out += Line("id-" + std::to_string(i), "prompt " + std::to_string(i));
  return out;
}

TEST(BatchRun, AnswersEveryLineOnce) {
  Fixture batch(ManyLines(300));
  FakeTransport transport([](const BatchCall&, int) { return Http(200); });
  const auto result = batch.Run(transport);
  ASSERT_TRUE(result.end.ok()) << result.end.status();
  EXPECT_EQ(*result.end, BatchRun::End::kComplete);
  EXPECT_EQ(result.counts.completed, 300u);
  EXPECT_EQ(batch.Output().size(), 300u);
  EXPECT_LE(transport.most(), 8u);
}

TEST(BatchRun, ErrorsAreLinesAndStopNothing) {
  Fixture batch(Line("a", "1") + "rubbish\n" + Line("b", "2") +
                R"({"custom_id":"c","method":"POST","url":"/nowhere","body":{}})" + "\n" + Line("d", "3"));
  FakeTransport transport([](const BatchCall& call, int) {
    if (call.body.find('2') != std::string::npos) return Http(400, R"({"error":{"code":"invalid_request"}})");
    if (call.body.find('3') != std::string::npos) {
      BatchReply reply;
      reply.status = absl::DataLossError("cut");
      return reply;
    }
    return Http(200);
  });
  const auto result = batch.Run(transport);
  EXPECT_EQ(*result.end, BatchRun::End::kComplete);
  EXPECT_EQ(result.counts.completed, 1u);
  EXPECT_EQ(result.counts.failed, 4u);
  EXPECT_EQ(batch.Output(),
            (std::map<std::string, int>{{"a", 200}, {"b", 400}, {"line 2", 0}, {"c", 0}, {"d", 0}}));
}

TEST(BatchRun, RefusalsAreWaitedOut) {
  Fixture batch(ManyLines(40));
  FakeTransport transport([](const BatchCall&, int attempt) { return Http(attempt <= 2 ? 429 : 200); });
  batch.admission.inflight_max = 64;
  const auto result = batch.Run(transport);
  EXPECT_EQ(result.counts.completed, 40u);
  EXPECT_EQ(result.counts.retries, 80u);
  for (const auto& [body, attempts] : transport.attempts()) EXPECT_EQ(attempts, 3) << body;
}

// The file as a SIGKILL may leave it: cut after any byte.
TEST(BatchRun, GoesOnAfterACrashAtAnyByte) {
  const std::string input = ManyLines(6) + "rubbish\n";
  std::string whole;
  {
    Fixture batch(input);
    FakeTransport transport([](const BatchCall&, int) { return Http(200); });
    ASSERT_TRUE(batch.Run(transport).end.ok());
    whole = ReadText(batch.dir / "out");
  }
  for (size_t cut = 0; cut <= whole.size(); cut += 13) {
    Fixture batch(input);
    WriteText(batch.dir / "out", whole.substr(0, cut));
    const auto before =
        static_cast<size_t>(std::count(whole.begin(), whole.begin() + static_cast<long>(cut), '\n'));
    FakeTransport transport([](const BatchCall&, int) { return Http(200); });
    const auto result = batch.Run(transport);
    ASSERT_TRUE(result.end.ok()) << result.end.status();
    EXPECT_EQ(batch.Output().size(), 7u);
    EXPECT_EQ(result.counts.completed + result.counts.failed, 7u);
    EXPECT_LE(transport.attempts().size(), 7 - before);
    EXPECT_TRUE(
        ReadText(batch.dir / "out").starts_with(whole.substr(0, whole.rfind('\n', cut) + 1).substr(0, 0)));
  }
}

TEST(BatchRun, PausesAndGoesOnWithoutLosingOrRepeating) {
  Fixture batch(ManyLines(200));
  std::atomic<int> answered{0};
  FakeTransport transport([&](const BatchCall&, int) {
    ++answered;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return Http(200);
  });
  int pauses = 0;
  for (;;) {
    const auto result = batch.Run(transport, [&](BatchRun& run, const BatchCounts& counts) {
      if (counts.completed >= static_cast<uint64_t>(40 * (pauses + 1))) run.Stop(BatchRun::StopKind::kPause);
    });
    ASSERT_TRUE(result.end.ok());
    if (*result.end == BatchRun::End::kComplete) break;
    EXPECT_EQ(*result.end, BatchRun::End::kPaused);
    ASSERT_LT(++pauses, 20);
  }
  EXPECT_GE(pauses, 1);
  EXPECT_EQ(batch.Output().size(), 200u);
}

TEST(BatchRun, ExpiryGivesEveryLineItsEnd) {
  Fixture batch(ManyLines(50) + "rubbish\n");
  std::atomic<bool> stuck{true};
  FakeTransport transport(
      [&](const BatchCall& call, int) {
        while (stuck && call.body.find("prompt 7") != std::string::npos) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return Http(200);
      },
      16);
  const auto result = batch.Run(transport, [&](BatchRun& run, const BatchCounts& counts) {
    if (counts.completed >= 30) run.Stop(BatchRun::StopKind::kExpire);
  });
  stuck = false;
  EXPECT_EQ(*result.end, BatchRun::End::kExpired);
  const auto output = batch.Output();
  EXPECT_EQ(output.size(), 51u);
  EXPECT_EQ(output.at("id-7"), 0);
  EXPECT_EQ(result.counts.left(), 0u);
}

// LateTransport: its answers come when they are given up.
class LateTransport final : public BatchTransport {
 public:
  std::shared_ptr<InFlight> Send(BatchCall, Callbacks callbacks) override {
    auto flight = std::make_shared<Flight>();
    flight->done = std::move(callbacks.done);
    return flight;
  }

 private:
  struct Flight final : InFlight {
    std::function<void(BatchReply)> done;
    void Cancel() override { done(Http(200)); }
  };
};

TEST(BatchRun, IsCompleteWhereTheLastAnswerCameBeforeItExpired) {
  Fixture batch(ManyLines(3));
  LateTransport transport;
  const auto expire = [](BatchRun& run, const BatchCounts& counts) {
    if (counts.running == 3) run.Stop(BatchRun::StopKind::kExpire);
  };
  const auto result = batch.Run(transport, expire);
  ASSERT_TRUE(result.end.ok()) << result.end.status();
  EXPECT_EQ(*result.end, BatchRun::End::kComplete);
  EXPECT_EQ(result.counts.completed, 3u);
  EXPECT_EQ(result.counts.expired, 0u);
}

TEST(BatchRun, SiblingsStartOnceTheirPrefixIsThere) {
  const std::string prefix(1000, 'p');
  std::string input;
  for (int i = 0; i < 12; ++i) {
    input += Line("a" + std::to_string(i), prefix + "a" + std::to_string(i));
    input += Line("b" + std::to_string(i), "other " + prefix + "b" + std::to_string(i));
  }
  Fixture batch(input);
  std::mutex mu;
  std::set<char> ready;
  int early = 0;
  FakeTransport transport(
      [&](const BatchCall& call, int) {
        const char family = call.body.find("other") == std::string::npos ? 'a' : 'b';
        static std::map<char, int> started;
        bool leader = false;
        {
          std::lock_guard lock(mu);
          leader = ++started[family] == 1;
          if (!leader && !ready.contains(family)) ++early;
        }
        if (leader) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        std::lock_guard lock(mu);
        ready.insert(family);
        return Http(200);
      },
      16);
  batch.admission.inflight_max = 16;
  const auto result = batch.Run(transport);
  EXPECT_EQ(result.counts.completed, 24u);
  EXPECT_EQ(early, 0);
  EXPECT_GT(result.counts.prompt_units_shared, result.counts.prompt_units * 8 / 10);
}

TEST(BatchRun, LeavesRoomToOnlineTraffic) {
  Fixture batch(ManyLines(400));
  std::atomic<size_t> online{0};
  std::atomic<bool> waiting{false};
  batch.load = [&] {
    return OnlineLoad{online, waiting ? size_t{1} : 0, waiting ? absl::Seconds(3) : absl::ZeroDuration(),
                      false};
  };
  FakeTransport transport(
      [&](const BatchCall&, int) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        return Http(200);
      },
      8);
  size_t running_while_waiting = 99;
  const auto result = batch.Run(transport, [&](BatchRun&, const BatchCounts& counts) {
    if (counts.completed > 50 && counts.completed < 400 && running_while_waiting == 99) waiting = true;
    if (waiting && counts.running == 0) {
      running_while_waiting = 0;
      waiting = false;
    }
  });
  EXPECT_EQ(running_while_waiting, 0u);
  EXPECT_EQ(result.counts.completed, 400u);
  EXPECT_EQ(batch.Output().size(), 400u);
}

TEST(BatchRun, WindowsBoundWhatIsPlanned) {
  Fixture batch(ManyLines(100));
  FakeTransport transport([](const BatchCall&, int) { return Http(200); });
  const auto result = batch.Run(transport, nullptr, [](BatchRun::Options& options) {
    options.window_lines = 7;
    options.lookahead = 3;
  });
  EXPECT_EQ(result.counts.completed, 100u);
  EXPECT_EQ(batch.Output().size(), 100u);
}

TEST(BatchRun, TwoRunsShareTheRoom) {
  Fixture one(ManyLines(150)), two(ManyLines(150));
  BatchGate gate({.inflight_max = 6}, nullptr, Clock::Real());
  FakeTransport transport(
      [](const BatchCall&, int) {
        std::this_thread::sleep_for(std::chrono::microseconds(300));
        return Http(200);
      },
      8);
  const auto run = [&](Fixture& batch) {
    return std::thread([&] {
      const auto result =
          batch.Run(transport, nullptr, [&](BatchRun::Options& options) { options.gate = &gate; });
      EXPECT_EQ(result.counts.completed, 150u);
    });
  };
  std::thread first = run(one), second = run(two);
  first.join();
  second.join();
  EXPECT_LE(transport.most(), 6u);
  EXPECT_EQ(gate.running(), 0u);
}

TEST(BatchRun, AnInputThatChangesEndsTheRun) {
  Fixture batch(ManyLines(20));
  WriteText(batch.dir / "in", ManyLines(10) + "oops\n");
  FakeTransport transport([](const BatchCall&, int) { return Http(200); });
  EXPECT_TRUE(absl::IsDataLoss(batch.Run(transport).end.status()));
}

}  // namespace
}  // namespace tidepool
