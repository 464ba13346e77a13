#include "server/cli/runtime_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>

#include "config/cluster_document.h"

namespace tidepool {
namespace {

using ::testing::IsEmpty;

class RuntimeFileTest : public testing::Test {
 protected:
  RuntimeFileTest() : dir_(testing::TempDir() + "/tidepool_runtime_XXXXXX") {
    TP_CHECK(mkdtemp(dir_.data()) != nullptr);
    setenv("XDG_RUNTIME_DIR", dir_.c_str(), 1);
  }
  ~RuntimeFileTest() override { std::filesystem::remove_all(dir_); }

  static ServeRuntime Sample() {
    ServeRuntime runtime;
    runtime.pid = getpid();
    runtime.http = "127.0.0.1:8000";
    runtime.scheduler = "127.0.0.1:8002";
    runtime.token = "secret";
    runtime.children = {{"prefill", SupervisorCore::State::kReady, 7, 2, {{"http", "127.0.0.1:9"}}}};
    return runtime;
  }

  std::string dir_;
};

TEST_F(RuntimeFileTest, ListsWhatWasWritten) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  const auto list = ListRuntimes();
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0].scheduler, "127.0.0.1:8002");
  EXPECT_EQ(list[0].token, "secret");
  ASSERT_EQ(list[0].children.size(), 1u);
  EXPECT_EQ(list[0].children[0].state, SupervisorCore::State::kReady);
  EXPECT_EQ(list[0].children[0].ready.at("http"), "127.0.0.1:9");
}

TEST_F(RuntimeFileTest, TheTokenIsReadableByItsUserOnly) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  struct stat st;
  ASSERT_EQ(stat(RuntimePath(getpid()).c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  ASSERT_EQ(stat(RuntimeDirectory().c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0700u);
}

TEST_F(RuntimeFileTest, ADirectoryOpenToOthersIsRefusedAndIgnored) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  chmod(RuntimeDirectory().c_str(), 0777);
  EXPECT_EQ(WriteRuntime(Sample()).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(ListRuntimes(), IsEmpty());
}

TEST_F(RuntimeFileTest, DeadProcessesAndBrokenFilesAreIgnored) {
  ServeRuntime dead = Sample();
  dead.pid = 0x3fffffff;  // above any pid_max
  ASSERT_TRUE(WriteRuntime(dead).ok());
  std::ofstream(RuntimeDirectory() + "/serve-1.json") << "{\"pid\": \"one\"";
  std::ofstream(RuntimeDirectory() + "/serve-2.json") << "[]";
  EXPECT_THAT(ListRuntimes(), IsEmpty());
}

TEST_F(RuntimeFileTest, ANumberThatHasGoneToAnotherProcessIsIgnored) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  std::ifstream in(RuntimePath(getpid()));
  std::string text{std::istreambuf_iterator<char>(in), {}};
  const size_t at = text.find("\"started\": \"");
  ASSERT_NE(at, std::string::npos) << text;
  text.insert(at + 12, "9");
  std::ofstream(RuntimePath(getpid())) << text;
  EXPECT_THAT(ListRuntimes(), IsEmpty());
}

TEST_F(RuntimeFileTest, SaysWhoReadsItsConfigurationAgain) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  ASSERT_EQ(ListRuntimes().size(), 1u);
  EXPECT_TRUE(ListRuntimes()[0].reloads);
  // As an older version wrote it.
  std::ofstream(RuntimePath(getpid()))
      << "{\"pid\": " << getpid() << R"(, "http": "", "grpc": "", "scheduler": "s", "token": "", )"
      << R"("metrics": "", "children": []})";
  ASSERT_EQ(ListRuntimes().size(), 1u);
  EXPECT_FALSE(ListRuntimes()[0].reloads);
}

TEST_F(RuntimeFileTest, WhatNoChildWouldReadIsNotLeftForThem) {
  EXPECT_EQ(WriteReloaded(getpid(), std::string(kClusterDocumentBytesMax + 1, '#')).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(ReloadedPath(getpid())));
}

TEST_F(RuntimeFileTest, RemoveForgets) {
  ASSERT_TRUE(WriteRuntime(Sample()).ok());
  RemoveRuntime(getpid());
  EXPECT_THAT(ListRuntimes(), IsEmpty());
}

}  // namespace
}  // namespace tidepool
