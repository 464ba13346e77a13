#include "server/gateway/files_store.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "server/gateway/batches_front.h"
#include "server/gateway/batches_record.h"
#include "tests/server/batch/temp_dir.h"

namespace tidepool {
namespace {

constexpr FileLimits kLimits{1000, 2500, 3};
constexpr absl::Duration kDay = absl::Hours(24);

std::unique_ptr<FilesStore> Open(const std::string& dir, const FileLimits& limits = kLimits) {
  auto store = FilesStore::Open(dir, limits);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? *std::move(store) : nullptr;
}

absl::StatusOr<StoredFile> Put(FilesStore& store, const std::string& tenant, const std::string& text) {
  auto upload = store.Begin(tenant);
  if (!upload.ok()) return upload.status();
  if (auto status = (*upload)->Append(text); !status.ok()) return status;
  return (*upload)->Commit("a/../b.jsonl", "batch", kDay);
}

TEST(FilesStore, KeepsFilesAcrossRestarts) {
  TempDir dir;
  std::string id;
  {
    const auto store = Open(dir / "s");
    id = Put(*store, "a", "hello")->id;
  }
  const auto store = Open(dir / "s");
  const auto file = store->Get("a", id);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->bytes, 5u);
  EXPECT_EQ(file->filename, "a/../b.jsonl");
  EXPECT_EQ(ReadText(*store->PathOf("a", id)), "hello");
  EXPECT_EQ(store->bytes(), 5u);
}

TEST(FilesStore, AFileIsItsTenantsAlone) {
  TempDir dir;
  const auto store = Open(dir / "s");
  const std::string id = Put(*store, "a", "hello")->id;
  EXPECT_TRUE(absl::IsNotFound(store->Get("b", id).status()));
  EXPECT_TRUE(absl::IsNotFound(store->PathOf("b", id).status()));
  EXPECT_TRUE(absl::IsNotFound(store->Delete("b", id)));
  EXPECT_TRUE(absl::IsNotFound(store->Pin("b", id)));
  EXPECT_TRUE(store->List("b").empty());
  EXPECT_EQ(store->List("a").size(), 1u);
}

TEST(FilesStore, NothingOfARequestBecomesAPath) {
  TempDir dir;
  const auto store = Open(dir / "s");
  ASSERT_TRUE(Put(*store, "../../evil/../\n", "x").ok());
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir / "s")) {
    const std::string name = entry.path().filename().string();
    EXPECT_EQ(name.find("evil"), name.npos);
    EXPECT_EQ(name.find(".jsonl"), name.npos);
    struct stat st {};
    ASSERT_EQ(stat(entry.path().c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 0777, entry.is_directory() ? 0700u : 0600u) << entry.path();
  }
}

TEST(FilesStore, LimitsHoldForEachTenant) {
  TempDir dir;
  const auto store = Open(dir / "s");
  EXPECT_TRUE(absl::IsOutOfRange(Put(*store, "a", std::string(1001, 'x')).status()));
  ASSERT_TRUE(Put(*store, "a", std::string(1000, 'x')).ok());
  ASSERT_TRUE(Put(*store, "a", std::string(1000, 'x')).ok());
  EXPECT_TRUE(absl::IsAborted(Put(*store, "a", std::string(501, 'x')).status()));
  ASSERT_TRUE(Put(*store, "a", std::string(500, 'x')).ok());
  EXPECT_TRUE(absl::IsAborted(Put(*store, "a", "").status()));  // three files
  EXPECT_TRUE(Put(*store, "b", std::string(1000, 'x')).ok());
  // What was refused left nothing, and what is deleted makes room.
  EXPECT_EQ(store->bytes(), 3500u);
  EXPECT_EQ(store->BytesOf("a"), 2500u);
  EXPECT_EQ(store->BytesOf("nobody"), 0u);
  ASSERT_TRUE(store->Delete("a", store->List("a")[0].id).ok());
  EXPECT_TRUE(Put(*store, "a", "y").ok());
}

TEST(FilesStore, AnUploadThatIsDroppedLeavesNothing) {
  TempDir dir;
  const auto store = Open(dir / "s");
  {
    auto upload = store->Begin("a");
    ASSERT_TRUE((*upload)->Append("half").ok());
    EXPECT_EQ(store->bytes(), 4u);
  }
  EXPECT_EQ(store->bytes(), 0u);
  size_t data = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir / "s")) {
    data += entry.path().extension() == ".data";
  }
  EXPECT_EQ(data, 0u);
}

TEST(FilesStore, WhatACrashLeftIsRemovedButOutputsUnderWay) {
  TempDir dir;
  std::string kept, lost;
  {
    const auto store = Open(dir / "s");
    ASSERT_TRUE(Put(*store, "a", "x").ok());
    kept = store->PendingPath("a", FilesStore::NewId());
    lost = store->PendingPath("a", FilesStore::NewId());
    WriteText(kept, "line\n");
    WriteText(lost, "half an upl");
  }
  const auto store = Open(dir / "s");
  store->RemoveOrphans({kept});
  EXPECT_TRUE(std::filesystem::exists(kept));
  EXPECT_FALSE(std::filesystem::exists(lost));
  EXPECT_EQ(store->List("a").size(), 1u);
}

TEST(FilesStore, OutputsBecomeFilesOnce) {
  TempDir dir;
  const auto store = Open(dir / "s");
  ASSERT_TRUE(store->TenantDirectory("a").ok());
  const std::string id = FilesStore::NewId();
  WriteText(store->PendingPath("a", id), "line\n");
  ASSERT_TRUE(store->Adopt("a", id, "out.jsonl", kDay).ok());
  const auto again = store->Adopt("a", id, "out.jsonl", kDay);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->purpose, "batch_output");
  EXPECT_EQ(store->bytes(), 5u);
}

TEST(FilesStore, PinnedFilesStayAndExpiredOnesGo) {
  TempDir dir;
  const auto store = Open(dir / "s");
  const std::string a = Put(*store, "t", "x")->id, b = Put(*store, "t", "y")->id;
  ASSERT_TRUE(store->Pin("t", a).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(store->Delete("t", a)));
  store->Sweep(absl::Now() + kDay - absl::Minutes(1));
  EXPECT_EQ(store->List("t").size(), 2u);
  store->Sweep(absl::Now() + kDay + absl::Minutes(1));
  ASSERT_EQ(store->List("t").size(), 1u);
  EXPECT_EQ(store->List("t")[0].id, a);
  store->Unpin("t", a);
  EXPECT_TRUE(store->Delete("t", a).ok());
}

TEST(FilesStore, OneProcessAtATime) {
  TempDir dir;
  const auto store = Open(dir / "s");
  EXPECT_TRUE(absl::IsFailedPrecondition(FilesStore::Open(dir / "s", kLimits).status()));
}

TEST(FilesStore, RefusesADirectoryThatOthersCanEnter) {
  TempDir dir;
  std::filesystem::create_directory(dir / "s");
  chmod((dir / "s").c_str(), 0755);
  EXPECT_TRUE(absl::IsFailedPrecondition(FilesStore::Open(dir / "s", kLimits).status()));
}

TEST(FilesStore, OneDamagedRecordDoesNotHideTheOthers) {
  TempDir dir;
  std::string path;
  {
    const auto store = Open(dir / "s");
    ASSERT_TRUE(Put(*store, "a", "x").ok());
    ASSERT_TRUE(Put(*store, "b", "y").ok());
    path = *store->PathOf("a", store->List("a")[0].id);
  }
  WriteText(path.substr(0, path.size() - 5) + ".json", "{\"id\":");
  const auto store = Open(dir / "s");
  EXPECT_TRUE(store->List("a").empty());
  EXPECT_EQ(store->List("b").size(), 1u);
}

BatchRecord Full() {
  BatchRecord r;
  r.id = "batch_1";
  r.endpoint = "/v1/completions";
  r.input_file_id = "file-1";
  r.status = BatchStatus::kFinalizing;
  r.metadata = {{"a", "b"}};
  r.errors = {{"code", "what", "custom_id", 3}, {"other", "why", "", 0}};
  r.created_at = 10;
  r.expires_at = 20;
  r.in_progress_at = 11;
  r.total = 5;
  r.completed = 3;
  r.failed = 1;
  r.output_id = "file-o";
  r.error_id = "file-e";
  r.output_shown = true;
  r.output_ttl_seconds = 3600;
  return r;
}

TEST(BatchRecord, ReadsBackAsItWasWritten) {
  const auto read = ParseBatch(SerialiseBatch(Full()));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(SerialiseBatch(*read), SerialiseBatch(Full()));
  EXPECT_EQ(read->errors[0].line, 3u);
  EXPECT_TRUE(read->output_shown);
  EXPECT_FALSE(read->error_shown);
}

TEST(BatchRecord, HasTheFieldsOfOpenAi) {
  const OrderedJson json = BatchJson(Full());
  EXPECT_EQ(json["object"], "batch");
  EXPECT_EQ(json["status"], "finalizing");
  EXPECT_EQ(json["output_file_id"], "file-o");
  EXPECT_TRUE(json["error_file_id"].is_null());
  EXPECT_TRUE(json["completed_at"].is_null());
  EXPECT_EQ(json["errors"]["data"][0]["line"], 3);
  EXPECT_TRUE(json["errors"]["data"][1]["line"].is_null());
  EXPECT_EQ(json["request_counts"]["total"], 5);
}

TEST(BatchRecord, DamageIsAnError) {
  const std::string text = SerialiseBatch(Full());
  for (size_t cut = 0; cut + 2 < text.size(); cut += 5) EXPECT_FALSE(ParseBatch(text.substr(0, cut)).ok());
  EXPECT_FALSE(ParseBatch("{\"version\":2}").ok());
  EXPECT_FALSE(ParseBatch("{\"version\":1,\"id\":\"b\",\"endpoint\":\"/\",\"status\":\"lost\"}").ok());
}

}  // namespace
}  // namespace tidepool
