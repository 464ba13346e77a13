#include "server/bench/load_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <set>

#include "server/bench/workload.h"

namespace tidepool {
namespace {

// A server of the completions API whose answers are released by the test, or at once.
class LoadRunnerTest : public testing::Test {
 protected:
  void SetUp() override {
    server_.Handle("POST", "/v1/completions",
                   [this](HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
                     const auto body = nlohmann::json::parse(request.body);
                     std::unique_lock lock(mu_);
                     prompts_.push_back(body["prompt"]);
                     ++under_way_;
                     peak_ = std::max(peak_, under_way_);
                     const int number = answered_++;
                     if (hold_) {
                       held_.push_back(std::move(writer));
                       changed_.notify_all();
                       return;
                     }
                     lock.unlock();
                     Answer(*writer, number);
                   });
    ASSERT_TRUE(server_.Start().ok());
    auto url = ParseHttpUrl("http://127.0.0.1:" + std::to_string(server_.port()));
    ASSERT_TRUE(url.ok());
    shape_.url = *url;
    shape_.target = "/v1/completions";
    shape_.timeout = absl::Seconds(60);
  }
  void TearDown() override { held_.clear(); }

  void Answer(ResponseWriter& writer, int number) {
    {
      std::lock_guard lock(mu_);
      --under_way_;
    }
    if (number % 10 == fail_each_tenth_)
      return writer.Send(429, {{"Content-Type", "application/json"}}, "{}");
    writer.StartStream(200, {{"Content-Type", "text/event-stream"}});
    writer.Write("data: {\"choices\":[{\"text\":\"a\"}]}\n\n");
    writer.Write("data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\n");
    writer.Write(
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n");
    writer.End();
  }

  LoadResult Run(SessionSource& source, const LoadOptions& options) {
    return LoadRunner(client_, shape_).Run(source, options, nullptr, stop_);
  }
  static std::unique_ptr<SessionSource> Source() {
    return MakeSource(RandomWorkload{LengthSpec::Fixed(8), LengthSpec::Fixed(2)}, 1);
  }

  std::mutex mu_;
  std::condition_variable changed_;
  std::vector<std::string> prompts_;
  std::vector<std::shared_ptr<ResponseWriter>> held_;
  int under_way_ = 0, peak_ = 0, answered_ = 0, fail_each_tenth_ = -1;
  bool hold_ = false;
  HttpServer server_{{}};
  HttpClient client_;
  RequestShape shape_;
  std::atomic<bool> stop_{false};
};

TEST_F(LoadRunnerTest, SendsEachRequestOnceAndRecordsIt) {
  LoadOptions options;
  options.requests_max = 200;
  options.arrivals = {.rate = 5000};
  fail_each_tenth_ = 3;
  auto source = Source();
  const LoadResult result = Run(*source, options);
  ASSERT_EQ(result.records.size(), 200u);
  EXPECT_EQ(prompts_.size(), 200u);
  EXPECT_EQ(std::set<std::string>(prompts_.begin(), prompts_.end()).size(), 200u);
  size_t rejected = 0;
  for (size_t i = 0; i < 200; ++i) {
    const RequestRecord& r = result.records[i];
    EXPECT_EQ(r.index, i);
    EXPECT_LE(r.planned, r.released);
    EXPECT_LE(r.released, r.dispatched);
    EXPECT_LE(r.dispatched, r.sent);
    EXPECT_LE(r.sent, r.first);
    EXPECT_LE(r.first, r.end);
    rejected += r.rejected();
    if (r.ok()) {
      EXPECT_EQ(r.output_tokens, 2u);
      EXPECT_EQ(r.input_tokens, 5u);
      EXPECT_EQ(r.gaps_seconds.size(), 1u);
    }
  }
  EXPECT_EQ(rejected, 20u);
}

TEST_F(LoadRunnerTest, OpenLoopSendsWithoutWaitingForAnswers) {
  hold_ = true;
  LoadOptions options;
  options.requests_max = 50;
  options.arrivals = {.rate = 5000};
  std::thread releaser([this] {
    std::unique_lock lock(mu_);
    // All fifty arrive though not one was answered.
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30), [&] { return held_.size() == 50; }));
    auto held = std::move(held_);
    held_.clear();
    lock.unlock();
    for (size_t i = 0; i < held.size(); ++i) Answer(*held[i], static_cast<int>(i));
  });
  auto source = Source();
  const LoadResult result = Run(*source, options);
  releaser.join();
  EXPECT_EQ(peak_, 50);
  EXPECT_TRUE(
      std::all_of(result.records.begin(), result.records.end(), [](const auto& r) { return r.ok(); }));
}

TEST_F(LoadRunnerTest, KeepsTheConcurrencyCapAndCountsTheWait) {
  LoadOptions options;
  options.requests_max = 300;
  options.concurrency_max = 4;
  options.arrivals = {.kind = ArrivalSpec::Kind::kConstant, .rate = 1e6};  // all at once, in effect
  auto source = Source();
  const LoadResult result = Run(*source, options);
  EXPECT_LE(peak_, 4);
  // The last was planned right at the start and waited for its place: that is in its latency.
  const RequestRecord& last = result.records.back();
  EXPECT_LT(last.planned, absl::Milliseconds(1));
  EXPECT_GT(last.released, last.planned);
  EXPECT_GE(last.TtftSeconds(), absl::ToDoubleSeconds(last.released - last.planned));
}

TEST_F(LoadRunnerTest, ClosedLoopPlansWhenAPlaceIsFree) {
  LoadOptions options;
  options.requests_max = 100;
  options.concurrency_max = 3;
  auto source = Source();
  const LoadResult result = Run(*source, options);
  EXPECT_LE(peak_, 3);
  std::vector<absl::Duration> ends;
  for (const RequestRecord& r : result.records) {
    EXPECT_EQ(r.planned, r.released);
    ends.push_back(r.end);
  }
  std::sort(ends.begin(), ends.end());
  // The i-th took the place that the (i - 3)-th to end had left.
  for (size_t i = 3; i < 100; ++i) EXPECT_EQ(result.records[i].planned, ends[i - 3]) << i;
}

TEST_F(LoadRunnerTest, TurnsWaitForTheAnswerAndTheThinkTime) {
  // Ten conversations, and no more.
  class Ten final : public SessionSource {
   public:
    explicit Ten(std::unique_ptr<SessionSource> source) : source_(std::move(source)) {}
    std::optional<Session> Next() override { return count_++ < 10 ? source_->Next() : std::nullopt; }

   private:
    std::unique_ptr<SessionSource> source_;
    int count_ = 0;
  };
  LoadOptions options;
  options.concurrency_max = 5;
  const absl::Duration think = absl::Milliseconds(20);
  Ten source(MakeSource(
      MultiTurnWorkload{LengthSpec::Fixed(3), LengthSpec::Fixed(4), LengthSpec::Fixed(2), think}, 1));
  const LoadResult result = Run(source, options);
  std::map<uint64_t, std::vector<const RequestRecord*>> sessions;
  for (const RequestRecord& r : result.records) sessions[r.session].push_back(&r);
  size_t later = 0;
  for (const auto& [number, turns] : sessions) {
    for (size_t i = 0; i < turns.size(); ++i) {
      EXPECT_EQ(turns[i]->turn, i);
      if (i == 0) continue;
      ++later;
      EXPECT_EQ(turns[i]->planned, turns[i - 1]->end + think);
    }
  }
  // Five places are five conversations, thinking or not.
  EXPECT_EQ(sessions.size(), 10u);
  EXPECT_EQ(later, 20u);
  // A later prompt carries the turns before it and their answers.
  size_t carried = 0;
  for (const std::string& prompt : prompts_) carried += prompt.find("\nab\n") != prompt.npos;
  EXPECT_EQ(carried, later);
}

TEST_F(LoadRunnerTest, EndsWithItsDuration) {
  LoadOptions options;
  options.duration = absl::Milliseconds(100);
  options.arrivals = {.kind = ArrivalSpec::Kind::kConstant, .rate = 100};
  auto source = Source();
  const LoadResult result = Run(*source, options);
  EXPECT_EQ(result.records.size(), 11u);  // at 0, 10, ..., 100 ms
  EXPECT_FALSE(result.stopped);
}

TEST_F(LoadRunnerTest, StopsWhenToldAndEndsWhatIsUnderWay) {
  hold_ = true;
  LoadOptions options;
  options.requests_max = 10;
  options.concurrency_max = 2;
  std::thread stopper([this] {
    std::unique_lock lock(mu_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30), [&] { return held_.size() == 2; }));
    stop_ = true;
  });
  auto source = Source();
  const LoadResult result = Run(*source, options);
  stopper.join();
  EXPECT_TRUE(result.stopped);
  ASSERT_EQ(result.records.size(), 2u);
  for (const RequestRecord& r : result.records) EXPECT_THAT(r.error, testing::HasSubstr("CANCELLED"));
}

}  // namespace
}  // namespace tidepool
