#include "server/cli/output.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(OutputTest, PadsColumnsToTheirWidestCell) {
  EXPECT_EQ(FormatTable({"a", "bb"}, {{"long", "x"}, {"y", "z"}}), "a     bb\nlong  x\ny     z\n");
}

TEST(OutputTest, ObjectsBecomeRowsUnderTheKeysOfTheFirst) {
  const auto rows =
      nlohmann::ordered_json::parse(R"([{"name": "w", "n": 1, "s": 0.25}, {"name": "v", "n": 2, "s": 1.0}])");
  EXPECT_EQ(FormatTable(rows), "name  n  s\nw     1  0.25\nv     2  1\n");
}

TEST(OutputTest, NoRowsAreSaidToBeNone) {
  EXPECT_EQ(FormatTable(nlohmann::ordered_json::array()), "(none)\n");
}

}  // namespace
}  // namespace tidepool
