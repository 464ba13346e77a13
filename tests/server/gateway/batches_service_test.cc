#include "server/gateway/batches_service.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <future>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/server/batch/temp_dir.h"

namespace tidepool {
namespace {

// FakeTransport: answers at once, from a thread of its own, as long as it is let; the rest hangs until it is
// cancelled.
class FakeTransport final : public BatchTransport {
 public:
  explicit FakeTransport(std::shared_ptr<std::atomic<int>> left) : left_(std::move(left)) {}

  std::shared_ptr<InFlight> Send(BatchCall, Callbacks callbacks) override {
    auto flight = std::make_shared<Flight>();
    flight->callbacks = std::move(callbacks);
    if (left_->fetch_sub(1) > 0) {
      std::thread([flight] {
        BatchReply reply;
        reply.http_status = 200;
        reply.body = "{}";
        flight->End(std::move(reply));
      }).detach();
    }
    return flight;
  }

 private:
  struct Flight final : InFlight {
    std::mutex mu;
    bool ended = false;
    Callbacks callbacks;
    void End(BatchReply reply) {
      {
        std::lock_guard lock(mu);
        if (std::exchange(ended, true)) return;
      }
      callbacks.done(std::move(reply));
    }
    void Cancel() override {
      BatchReply reply;
      reply.status = absl::CancelledError("");
      End(std::move(reply));
    }
  };
  const std::shared_ptr<std::atomic<int>> left_;
};

struct Fixture {
  TempDir dir;
  GatewayConfig config;
  MetricRegistry metrics;
  std::shared_ptr<std::atomic<int>> left = std::make_shared<std::atomic<int>>(1 << 30);
  absl::Duration window = absl::Hours(24);
  std::unique_ptr<BatchesService> service;

  Fixture() { config.batch_dir = dir / "batch"; }
  ~Fixture() { service.reset(); }

  std::unique_ptr<BatchesService> Make() {
    BatchesService::Dependencies deps;
    deps.config = &config;
    deps.metrics = &metrics;
    deps.completion_window = window;
    deps.transport = [this](const std::string&) { return std::make_unique<FakeTransport>(left); };
    auto made = std::make_unique<BatchesService>(deps);
    made->Start();
    return made;
  }
  void Start() {
    service = Make();
    ASSERT_TRUE(Open(*service));
  }
  static bool Open(const BatchesService& service, absl::Duration within = absl::Seconds(20)) {
    bool ever = false;
    return Until([&] { return service.WhyNot(ever).empty(); }, within);
  }
  template <typename Done>
  static bool Until(Done done, absl::Duration within = absl::Seconds(20)) {
    const absl::Time deadline = absl::Now() + within;
    while (!done()) {
      if (absl::Now() > deadline) return false;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return true;
  }
  std::string Upload(int lines, const std::string& more = "") {
    auto upload = service->files().Begin("t");
    EXPECT_TRUE(upload.ok()) << upload.status();
    for (int i = 0; i < lines; ++i) {
      EXPECT_TRUE((*upload)
                      ->Append(absl::StrCat(R"({"custom_id":"id-)", i,
                                            R"(","method":"POST","url":"/v1/completions","body":{"prompt":")",
                                            i, "\"}}\n"))
                      .ok());
    }
    EXPECT_TRUE((*upload)->Append(more).ok());
    return (*upload)->Commit("in", "batch", absl::Hours(1))->id;
  }
  std::string Create(const std::string& file) {
    const auto record = service->Create("t", {"/v1/completions", file, {}, 0});
    EXPECT_TRUE(record.ok()) << record.status();
    return record->id;
  }
  bool Reaches(const std::string& id, BatchStatus status) {
    return Until([&] { return service->Get("t", id)->status == status; });
  }
  // custom_ids of a file of lines, none twice.
  std::set<std::string> Ids(const std::string& file_id) {
    std::set<std::string> ids;
    for (const std::string& line : LinesOf(ReadText(*service->files().PathOf("t", file_id)))) {
      EXPECT_TRUE(ids.insert((*ParseJson(line))["custom_id"].get<std::string>()).second) << line;
    }
    return ids;
  }
};

TEST(BatchesService, TakesABatchToItsEnd) {
  Fixture f;
  f.Start();
  const std::string id = f.Create(f.Upload(50));
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kCompleted));
  const BatchRecord record = *f.service->Get("t", id);
  EXPECT_EQ(record.completed, 50u);
  EXPECT_TRUE(record.output_shown);
  EXPECT_FALSE(record.error_shown);
  EXPECT_EQ(f.Ids(record.output_id).size(), 50u);
  EXPECT_TRUE(absl::IsNotFound(f.service->Get("other", id).status()));
}

TEST(BatchesService, GoesOnAfterARestartWithoutRepeating) {
  Fixture f;
  f.Start();
  *f.left = 30;
  const std::string id = f.Create(f.Upload(100));
  ASSERT_TRUE(Fixture::Until([&] { return f.service->Get("t", id)->completed == 30; }));
  f.service.reset();
  *f.left = 20;
  f.Start();
  ASSERT_TRUE(Fixture::Until([&] { return f.service->Get("t", id)->completed == 50; }));
  f.service.reset();
  *f.left = 1 << 30;
  f.Start();
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kCompleted));
  EXPECT_EQ(f.Ids(f.service->Get("t", id)->output_id).size(), 100u);
  // And what has ended stays as it is.
  const std::string before = SerialiseBatch(*f.service->Get("t", id));
  f.service.reset();
  f.Start();
  EXPECT_EQ(SerialiseBatch(*f.service->Get("t", id)), before);
}

TEST(BatchesService, ExpiresWithALineForEveryRequest) {
  Fixture f;
  f.window = absl::Seconds(5);
  f.Start();
  *f.left = 10;
  const std::string id = f.Create(f.Upload(40));
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kExpired));
  const BatchRecord record = *f.service->Get("t", id);
  EXPECT_EQ(record.completed, 10u);
  EXPECT_EQ(record.failed, 30u);
  EXPECT_GT(record.expired_at, 0);
  EXPECT_EQ(f.Ids(record.output_id).size(), 10u);
  EXPECT_EQ(f.Ids(record.error_id).size(), 30u);
  EXPECT_NE(ReadText(*f.service->files().PathOf("t", record.error_id)).find("batch_expired"),
            std::string::npos);
}

TEST(BatchesService, CancelsWhatRunsAndWhatWaits) {
  Fixture f;
  f.Start();
  *f.left = 5;
  const std::string file = f.Upload(40), running = f.Create(file), waiting = f.Create(file);
  ASSERT_TRUE(Fixture::Until([&] { return f.service->Get("t", running)->completed == 5; }));
  ASSERT_TRUE(f.service->Cancel("t", waiting).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(f.service->files().Delete("t", file)));
  ASSERT_TRUE(f.service->Cancel("t", running).ok());
  ASSERT_TRUE(f.Reaches(running, BatchStatus::kCancelled));
  ASSERT_TRUE(f.Reaches(waiting, BatchStatus::kCancelled));
  EXPECT_EQ(f.Ids(f.service->Get("t", running)->output_id).size(), 5u);
  EXPECT_TRUE(absl::IsFailedPrecondition(f.service->Cancel("t", running).status()));
  EXPECT_TRUE(f.service->files().Delete("t", file).ok());
}

TEST(BatchesService, ACancelledBatchNeedNotWaitForTheOneThatRuns) {
  Fixture f;
  f.Start();
  *f.left = 0;
  const std::string file = f.Upload(4), running = f.Create(file), waiting = f.Create(file);
  ASSERT_TRUE(f.Reaches(running, BatchStatus::kInProgress));
  ASSERT_TRUE(f.service->Cancel("t", waiting).ok());
  EXPECT_TRUE(f.Reaches(waiting, BatchStatus::kCancelled));
  EXPECT_EQ(f.service->Get("t", running)->status, BatchStatus::kInProgress);
  EXPECT_TRUE(absl::IsNotFound(f.service->Cancel("t", "batch_none").status()));
  EXPECT_TRUE(absl::IsNotFound(f.service->Cancel("other", running).status()));
}

TEST(BatchesService, ACancelledBatchShowsNoTornLine) {
  Fixture f;
  f.Start();
  *f.left = 10;
  const std::string id = f.Create(f.Upload(40));
  ASSERT_TRUE(Fixture::Until([&] { return f.service->Get("t", id)->completed == 10; }));
  const std::string output_id = f.service->Get("t", id)->output_id;
  const std::string output = f.service->files().PendingPath("t", output_id);
  f.service.reset();
  // A crash in the middle of a line, and of the cancelling.
  WriteText(output, ReadText(output) + R"({"id":"batch_req_1","custom_id":"id-1)");
  const std::string path = output.substr(0, output.rfind('/') + 1) + id + ".json";
  BatchRecord record = *ParseBatch(ReadText(path));
  record.status = BatchStatus::kCancelling;
  WriteText(path, SerialiseBatch(record));
  f.Start();
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kCancelled));
  EXPECT_TRUE(f.service->Get("t", id)->output_shown);
  EXPECT_EQ(f.Ids(output_id).size(), 10u);
  EXPECT_TRUE(ReadText(output).ends_with("\n"));
  EXPECT_EQ(f.service->files().Get("t", output_id)->bytes, ReadText(output).size());
}

TEST(BatchesService, RecordsOfBadInputsStaySmallAndAreReadBack) {
  Fixture f;
  f.Start();
  const std::string key(100'000, 'k');
  std::string bad;
  for (int i = 0; i < 60; ++i) bad += absl::StrCat("{\"", key, "\":1,\"", key, "\":2}\n");
  const std::string id = f.Create(f.Upload(1, bad));
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kFailed));
  const BatchRecord record = *f.service->Get("t", id);
  EXPECT_EQ(record.errors.size(), 50u);
  EXPECT_LT(SerialiseBatch(record).size(), 64u << 10);
  for (const BatchError& error : record.errors) EXPECT_LE(error.message.size(), 512u);
  f.service.reset();
  f.Start();
  EXPECT_EQ(f.service->Get("t", id)->status, BatchStatus::kFailed);
}

TEST(BatchesService, TheOneThatEndedLongestAgoMakesRoom) {
  Fixture f;
  f.Start();
  *f.left = 0;
  const std::string file = f.Upload(2);
  const std::string data = *f.service->files().PathOf("t", file), dir = data.substr(0, data.rfind('/') + 1);
  f.service.reset();
  const int64_t now = absl::ToUnixSeconds(absl::Now());
  for (int i = 0; i < 1000; ++i) {
    BatchRecord record;
    record.id = absl::StrCat("batch_", i);
    record.endpoint = "/v1/completions";
    record.input_file_id = file;
    record.status = BatchStatus::kCompleted;
    record.created_at = now - 5000 + i;
    record.completed_at = i == 700 ? now - 2000 : now - i;
    WriteText(absl::StrCat(dir, record.id, ".json"), SerialiseBatch(record));
  }
  f.Start();
  ASSERT_EQ(f.service->List("t").size(), 1000u);
  f.Create(file);
  EXPECT_EQ(f.service->List("t").size(), 1000u);
  EXPECT_TRUE(absl::IsNotFound(f.service->Get("t", "batch_700").status()));
  EXPECT_FALSE(std::filesystem::exists(dir + "batch_700.json"));
  EXPECT_TRUE(f.service->Get("t", "batch_0").ok());
}

TEST(BatchesService, ResultsCountAgainstTheTenantsBytes) {
  Fixture f;
  const std::string file = [&] {
    f.Start();
    const std::string id = f.Upload(200);
    // Room for the input, and for few answers.
    f.config.batch_max_tenant_bytes = f.service->files().BytesOf("t") + 4000;
    f.service.reset();
    return id;
  }();
  f.Start();
  *f.left = 100;  // the others hang
  const std::string id = f.Create(file);
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kFailed));
  const BatchRecord record = *f.service->Get("t", id);
  ASSERT_EQ(record.errors.size(), 1u);
  EXPECT_EQ(record.errors[0].code, "storage_limit_reached");
  EXPECT_NE(record.errors[0].message.find("delete some"), std::string::npos);
  // What it has is shown, and then nothing new begins.
  EXPECT_EQ(f.Ids(record.output_id).size(), record.completed);
  EXPECT_TRUE(absl::IsFailedPrecondition(f.service->Create("t", {"/v1/completions", file, {}, 0}).status()));
  ASSERT_TRUE(f.service->files().Delete("t", record.output_id).ok());
  EXPECT_TRUE(f.service->Create("t", {"/v1/completions", file, {}, 0}).ok());
}

TEST(BatchesService, NothingRunsForATenantWithoutAKey) {
  Fixture f;
  f.Start();
  *f.left = 5;
  const std::string id = f.Create(f.Upload(40));
  ASSERT_TRUE(Fixture::Until([&] { return f.service->Get("t", id)->completed == 5; }));
  TenantTable table;
  table.keys.push_back({std::string(64, 'a'), "other"});
  f.service->Replace(table);
  *f.left = 1 << 30;
  EXPECT_FALSE(
      Fixture::Until([&] { return f.service->Get("t", id)->completed > 5; }, absl::Milliseconds(800)));
  // The lines that hung were given up, else they would hang now.
  table.keys.push_back({std::string(64, 'b'), "t"});
  f.service->Replace(table);
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kCompleted));
  EXPECT_EQ(f.Ids(f.service->Get("t", id)->output_id).size(), 40u);
}

TEST(BatchesService, AFullQueueDoesNotEndWhatWasBegun) {
  Fixture f;
  f.Start();
  std::promise<void> go;
  const std::shared_future<void> gone = go.get_future().share();
  std::atomic<int> ran{0};
  int taken = 0;
  while (taken < 10'000 && f.service->Submit([&] {
    gone.wait();
    ++ran;
  })) {
    ++taken;
  }
  EXPECT_LT(taken, 10'000);
  EXPECT_TRUE(f.service->Continue([&] { ++ran; }));
  go.set_value();
  EXPECT_TRUE(Fixture::Until([&] { return ran == taken + 1; }));
  EXPECT_TRUE(f.service->Submit([] {}));
}

TEST(BatchesService, AnInputWithAnErrorRunsNothing) {
  Fixture f;
  f.Start();
  const std::string id = f.Create(f.Upload(3, "oops\n"));
  ASSERT_TRUE(f.Reaches(id, BatchStatus::kFailed));
  const BatchRecord record = *f.service->Get("t", id);
  ASSERT_EQ(record.errors.size(), 1u);
  EXPECT_EQ(record.errors[0].line, 4u);
  EXPECT_EQ(*f.left, 1 << 30);
}

TEST(BatchesService, WaitsForADirectoryThatAnotherHolds) {
  Fixture f;
  f.Start();
  auto second = f.Make();
  EXPECT_FALSE(Fixture::Open(*second, absl::Milliseconds(300)));
  bool ever = false;
  EXPECT_FALSE(second->WhyNot(ever).empty());
  EXPECT_TRUE(ever);
  f.service.reset();
  EXPECT_TRUE(Fixture::Open(*second));
}

TEST(BatchesService, IsOffWithoutADirectory) {
  Fixture f;
  for (const char* dir : {"", "off"}) {
    f.config.batch_dir = dir;
    const auto service = f.Make();
    bool ever = true;
    EXPECT_NE(service->WhyNot(ever).find("gateway.batch_dir"), std::string::npos);
    EXPECT_FALSE(ever);
  }
}

TEST(BatchesService, UnfinishedBatchesHaveALimit) {
  Fixture f;
  f.config.batch_max_batches = 2;
  f.Start();
  *f.left = 0;
  const std::string file = f.Upload(2);
  f.Create(file);
  f.Create(file);
  EXPECT_TRUE(absl::IsAborted(f.service->Create("t", {"/v1/completions", file, {}, 0}).status()));
}

}  // namespace
}  // namespace tidepool
