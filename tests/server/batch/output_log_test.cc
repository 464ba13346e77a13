#include "server/batch/output_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "server/batch/batch_run.h"
#include "server/batch/journal.h"
#include "server/batch/ordered_output.h"
#include "tests/server/batch/temp_dir.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

std::string Line(const std::string& id) {
  return R"({"custom_id":")" + id + R"(","method":"POST","url":"/v1/completions","body":{"prompt":")" + id +
         "\"}}\n";
}

absl::StatusOr<InputIndex> Index(const std::string& path) { return InputIndex::Build(path, {}); }

TEST(InputIndex, FindsLinesWhateverTheirEnds) {
  TempDir dir;
  WriteText(dir / "in", Line("a") + "\n  \n" +
                            R"({"custom_id":"b","method":"POST","url":"/v1/completions","body":{}})" +
                            "\r\nnot json\n" + Line("c").substr(0, Line("c").size() - 1));
  const auto index = Index(dir / "in");
  ASSERT_TRUE(index.ok()) << index.status();
  ASSERT_EQ(index->lines().size(), 4u);
  EXPECT_EQ(index->lines()[0].number, 1u);
  EXPECT_EQ(index->lines()[1].number, 4u);
  EXPECT_EQ(index->Read(1)->custom_id, "b");
  EXPECT_EQ(index->Read(2)->error->line, 5u);
  EXPECT_EQ(index->Read(3)->custom_id, "c");
  EXPECT_EQ(index->Find(KeyOf("c", 0)), 3);
  EXPECT_EQ(index->Find(KeyOf("", 5)), 2);
  EXPECT_EQ(index->Find(KeyOf("d", 0)), -1);
}

TEST(InputIndex, LinesAcrossReadsAndTooLongOnes) {
  TempDir dir;
  const std::string big(3 << 20, 'x');
  WriteText(dir / "in", Line("a") + Line(big) + Line("b"));
  const auto whole = Index(dir / "in");
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(whole->lines().size(), 3u);
  EXPECT_EQ(whole->Read(2)->custom_id, "b");
  InputIndex::Options options;
  options.line_bytes_max = 1 << 20;
  const auto index = InputIndex::Build(dir / "in", options);
  ASSERT_TRUE(index.ok());
  EXPECT_EQ(index->Read(1)->error->code, "line_too_long");
  EXPECT_EQ(index->Read(2)->custom_id, "b");
  EXPECT_EQ(index->digest(), whole->digest());
}

TEST(InputIndex, NamesDuplicatesWithTheirLines) {
  TempDir dir;
  WriteText(dir / "in", Line("a") + Line("b") + "bad\nbad\n" + Line("a") + Line("b") + Line("a"));
  const auto duplicates = Index(dir / "in")->Duplicates(10);
  ASSERT_EQ(duplicates.size(), 3u);
  EXPECT_EQ(duplicates[0].number, 5u);
  EXPECT_EQ(duplicates[0].first, 1u);
  EXPECT_EQ(duplicates[1].number, 6u);
  EXPECT_EQ(duplicates[1].first, 2u);
  EXPECT_EQ(duplicates[2].number, 7u);
}

TEST(InputIndex, NoticesAFileThatChanges) {
  TempDir dir;
  WriteText(dir / "in", Line("a") + Line("b"));
  const auto index = Index(dir / "in");
  WriteText(dir / "in", Line("b") + Line("a"));
  EXPECT_TRUE(absl::IsDataLoss(index->Read(0).status()));
  WriteText(dir / "in", Line("a"));
  EXPECT_TRUE(absl::IsDataLoss(index->Read(1).status()));
}

TEST(InputIndex, RefusesWhatIsNoFile) {
  TempDir dir;
  EXPECT_TRUE(absl::IsNotFound(Index(dir / "in").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Index(dir / "").status()));
}

absl::Status Ignore(const DoneLine&, const FileLine&) { return absl::OkStatus(); }

TEST(OutputLog, CutsATornLineAndGoesOn) {
  TempDir dir;
  const std::string a = FormatAnswer("a", 200, "", "{}"), b = FormatAnswer("b", 200, "", "{}");
  for (size_t cut = 0; cut < b.size(); ++cut) {
    WriteText(dir / "out", a + b.substr(0, cut));
    std::vector<std::string> seen;
    {
      auto log = OutputLog::Open(dir / "out", [&](const DoneLine& line, const FileLine&) {
        seen.push_back(line.custom_id);
        return absl::OkStatus();
      });
      ASSERT_TRUE(log.ok()) << log.status();
      (*log)->Append(b);
      ASSERT_TRUE((*log)->Flush().ok());
    }
    EXPECT_EQ(seen, std::vector<std::string>{"a"}) << cut;
    EXPECT_EQ(ReadText(dir / "out"), a + b);
  }
}

TEST(OutputLog, RefusesASecondWriterAndForeignFiles) {
  TempDir dir;
  const auto log = OutputLog::Open(dir / "out", Ignore);
  ASSERT_TRUE(log.ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(OutputLog::Open(dir / "out", Ignore).status()));
  WriteText(dir / "other", "my precious notes\n");
  EXPECT_TRUE(absl::IsInvalidArgument(OutputLog::Open(dir / "other", Ignore).status()));
  EXPECT_EQ(ReadText(dir / "other"), "my precious notes\n");
}

TEST(OutputLog, SaysThatTheDiskIsFull) {
  if (access("/dev/full", W_OK) != 0) GTEST_SKIP() << "/dev/full is not there";
  // /dev/full is no regular file, which Open refuses; a limit on the file's size fails as well.
  EXPECT_TRUE(absl::IsInvalidArgument(OutputLog::Open("/dev/full", Ignore).status()));
}

TEST(OutputLog, IsForItsOwnerOnly) {
  TempDir dir;
  ASSERT_TRUE(OutputLog::Open(dir / "out", Ignore).ok());
  struct stat st {};
  ASSERT_EQ(stat((dir / "out").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
}

TEST(Journal, ClaimsAnOutputForOneInput) {
  TempDir dir;
  const RunIdentity mine{"aa11", 10, 2}, other{"bb22", 10, 2};
  EXPECT_FALSE(*ClaimOutput(dir / "j", mine, true));
  EXPECT_TRUE(*ClaimOutput(dir / "j", mine, false));
  const auto refused = ClaimOutput(dir / "j", other, false);
  ASSERT_TRUE(absl::IsFailedPrecondition(refused.status()));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("another input"));
  // Nothing was written yet: whoever comes may have it.
  EXPECT_FALSE(*ClaimOutput(dir / "j", other, true));
  EXPECT_TRUE(absl::IsFailedPrecondition(ClaimOutput(dir / "none", mine, false).status()));
  WriteText(dir / "bad", "{}");
  EXPECT_TRUE(absl::IsInvalidArgument(ClaimOutput(dir / "bad", mine, true).status()));
}

TEST(OpenOutput, RefusesLinesThatAreNotTheInputs) {
  TempDir dir;
  WriteText(dir / "in", Line("a") + Line("b"));
  const auto index = Index(dir / "in");
  DoneLines done;
  WriteText(dir / "out", FormatAnswer("a", 200, "", "{}"));
  ASSERT_TRUE(OpenOutput(dir / "out", *index, done).ok());
  EXPECT_EQ(done.done, (std::vector<bool>{true, false}));
  EXPECT_EQ(done.completed, 1u);
  WriteText(dir / "twice", FormatAnswer("b", 200, "", "{}") + FormatAnswer("b", 200, "", "{}"));
  DoneLines again;
  EXPECT_TRUE(absl::IsInvalidArgument(OpenOutput(dir / "twice", *index, again).status()));
  WriteText(dir / "foreign", FormatAnswer("z", 200, "", "{}"));
  DoneLines none;
  EXPECT_TRUE(absl::IsInvalidArgument(OpenOutput(dir / "foreign", *index, none).status()));
}

TEST(PutInOrder, SortsOnceEverythingIsThere) {
  TempDir dir;
  WriteText(dir / "in", Line("a") + "bad\n" + Line("c"));
  const auto index = Index(dir / "in");
  const std::string a = FormatAnswer("a", 200, "", "{}"), c = FormatAnswer("c", 500, "", "{}");
  const std::string b = FormatFailure("", {"invalid_json_line", "bad", "", 2});
  WriteText(dir / "tmp", c + a);
  ASSERT_TRUE(PutInOrder(*index, dir / "tmp", dir / "out").ok());
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  WriteText(dir / "tmp", c + a + b);
  ASSERT_TRUE(PutInOrder(*index, dir / "tmp", dir / "out").ok());
  EXPECT_EQ(ReadText(dir / "out"), a + b + c);
  EXPECT_FALSE(std::filesystem::exists(dir / "tmp"));
}

}  // namespace
}  // namespace tidepool
