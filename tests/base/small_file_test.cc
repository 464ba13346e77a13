#include "base/small_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace tidepool {
namespace {

class SmallFile : public ::testing::Test {
 protected:
  SmallFile() {
    std::string pattern = ::testing::TempDir() + "small_file_XXXXXX";
    dir_ = mkdtemp(pattern.data());
  }
  ~SmallFile() override { std::filesystem::remove_all(dir_); }
  std::string Path(const std::string& name) const { return dir_ + "/" + name; }
  void Write(const std::string& name, std::string_view text) const { std::ofstream(Path(name)) << text; }

  std::string dir_;
};

TEST_F(SmallFile, GivesTheWholeFileUpToTheLimit) {
  Write("a", std::string("x\0y", 3));
  EXPECT_EQ(ReadSmallFile(Path("a"), 3).value(), std::string("x\0y", 3));
  Write("empty", "");
  EXPECT_EQ(ReadSmallFile(Path("empty"), 0).value(), "");
}

TEST_F(SmallFile, MoreThanTheLimitIsRefusedByItsSizeAlone) {
  Write("a", "four");
  const absl::Status status = ReadSmallFile(Path("a"), 3).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), Path("a") + ": 4 bytes; at most 3 are read");
  std::filesystem::resize_file(Path("a"), uint64_t{1} << 40);  // sparse: reading it would take all memory
  EXPECT_EQ(ReadSmallFile(Path("a"), 1 << 20).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SmallFile, WhatIsNotThereIsNotFound) {
  EXPECT_EQ(ReadSmallFile(Path("nothing"), 9).status().code(), absl::StatusCode::kNotFound);
  Write("file", "");
  EXPECT_EQ(ReadSmallFile(Path("file/below"), 9).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::create_symlink("/nonexistent/x", Path("broken"));
  EXPECT_EQ(ReadSmallFile(Path("broken"), 9).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SmallFile, WhatIsNoFileIsRefusedWithoutWaiting) {
  EXPECT_EQ(ReadSmallFile(dir_, 9).status().message(), dir_ + ": a directory, not a file");
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_EQ(ReadSmallFile(Path("pipe"), 9).status().message(), Path("pipe") + ": not a regular file");
  std::filesystem::create_symlink("loop", Path("loop"));
  EXPECT_EQ(ReadSmallFile(Path("loop"), 9).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadSmallFile("/dev/zero", 9).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SmallFile, WhatMayNotBeReadIsPermissionDenied) {
  if (geteuid() == 0) GTEST_SKIP() << "root reads everything";
  Write("a", "x");
  chmod(Path("a").c_str(), 0);
  EXPECT_EQ(ReadSmallFile(Path("a"), 9).status().code(), absl::StatusCode::kPermissionDenied);
}

}  // namespace
}  // namespace tidepool
