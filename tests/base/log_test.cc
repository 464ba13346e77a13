#include "base/log.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(Printable, KeepsAStatusCode) {
  EXPECT_EQ(PrintableStatus(absl::DataLossError("key \"a\nb\"")), absl::DataLossError("key \"a\\x0ab\""));
  EXPECT_TRUE(PrintableStatus(absl::OkStatus()).ok());
}

TEST(Printable, LeavesTextInAnyLanguageAlone) {
  const std::string text = "weights \"α.β\" 你好 🌊 ~ \xC2\xA0\xF4\x8F\xBF\xBF";
  EXPECT_EQ(Printable(text), text);
  EXPECT_EQ(Printable(""), "");
}

TEST(Printable, EscapesWhatDrivesATerminalOrEndsALine) {
  EXPECT_EQ(Printable("a\nb\r\t\x1B[31m\x7F"), R"(a\x0ab\x0d\x09\x1b[31m\x7f)");
  EXPECT_EQ(Printable(std::string("\0", 1)), R"(\x00)");
  EXPECT_EQ(Printable("\xC2\x9B"), R"(\xc2\x9b)");          // C1's control sequence introducer
  EXPECT_EQ(Printable("\xE2\x80\xA8"), R"(\xe2\x80\xa8)");  // line separator
  EXPECT_EQ(Printable("\xE2\x80\xAE"), R"(\xe2\x80\xae)");  // right-to-left override
  EXPECT_EQ(Printable("\xE2\x81\xA6"), R"(\xe2\x81\xa6)");  // isolate
}

TEST(Printable, EscapesBytesThatAreNoUtf8) {
  EXPECT_EQ(Printable("\xFF"), R"(\xff)");
  EXPECT_EQ(Printable("a\xE2\x82"), R"(a\xe2\x82)");                  // cut
  EXPECT_EQ(Printable("\xC0\xAF"), R"(\xc0\xaf)");                    // overlong
  EXPECT_EQ(Printable("\xED\xA0\x80"), R"(\xed\xa0\x80)");            // surrogate
  EXPECT_EQ(Printable("\xF4\x90\x80\x80z"), R"(\xf4\x90\x80\x80z)");  // above U+10FFFF
  EXPECT_EQ(Printable("\x80\xC3\xA9"), "\\x80\xC3\xA9");
}

}  // namespace
}  // namespace tidepool
