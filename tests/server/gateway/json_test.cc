#include "server/gateway/json.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace tidepool {
namespace {

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream out;
  out << in.rdbuf();
  return out.str();
}

TEST(JsonTest, RefusesDuplicateKeys) {
  EXPECT_FALSE(ParseJson(R"({"a":1,"a":2})").ok());
  EXPECT_FALSE(ParseJson(R"({"x":{"a":1,"\u0061":2}})").ok()) << "spelled differently";
  EXPECT_TRUE(ParseJson(R"({"a":{"a":1},"b":{"a":2}})").ok());
}

TEST(JsonTest, BoundsTheDepth) {
  auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(ParseJson(nested(kJsonDepthMax)).ok());
  const auto deep = ParseJson(nested(kJsonDepthMax + 1));
  ASSERT_FALSE(deep.ok());
  EXPECT_NE(deep.status().message().find("64"), std::string::npos);
  EXPECT_FALSE(ParseJson(std::string(100'000, '[')).ok());
  EXPECT_FALSE(ParseJson(std::string(100'000, '{')).ok());
}

TEST(JsonTest, RefusesNumbersThatNothingHolds) {
  EXPECT_FALSE(ParseJson("[1e400]").ok());
  EXPECT_FALSE(ParseJson("[NaN]").ok());
  EXPECT_FALSE(ParseJson("[-Infinity]").ok());
  EXPECT_TRUE(ParseJson("[9223372036854775808, 1e300]").ok());
}

TEST(JsonTest, RefusesInvalidUtf8AndLoneSurrogates) {
  EXPECT_FALSE(ParseJson("[\"\xff\"]").ok());
  EXPECT_FALSE(ParseJson("[\"\xed\xa0\x80\"]").ok());
  EXPECT_FALSE(ParseJson(R"(["\ud800"])").ok());
}

TEST(JsonTest, DumpNeverThrowsOnHalfCharacters) {
  EXPECT_EQ(DumpJson(OrderedJson{{"t", "a\xe2\x82"}}), "{\"t\":\"a\xef\xbf\xbd\"}");
}

TEST(JsonTest, AgreesWithJsonTestSuite) {
  const std::filesystem::path dir = "../shared/data/json_parser/JSONTestSuite/test_parsing";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << "the JSONTestSuite files are not here";
  int accepted = 0, refused = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    const auto json = ParseJson(ReadFile(entry.path()));
    if (name.starts_with("y_")) {
      // The suite takes duplicate keys for valid; a request with two temperatures is not.
      const bool duplicate = name.find("duplicated_key") != std::string::npos;
      EXPECT_EQ(json.ok(), !duplicate) << name << " " << json.status();
      ++accepted;
    } else if (name.starts_with("n_")) {
      EXPECT_FALSE(json.ok()) << name;
      ++refused;
    }
  }
  EXPECT_GT(accepted, 90);
  EXPECT_GT(refused, 180);
}

TEST(JsonTest, QuotesAKeyThatIsGivenTwiceShortAndHarmless) {
  const auto message = [](const std::string& key) {
    const auto json = ParseJson("{\"" + key + "\":1,\"" + key + "\":2}");
    return std::string(json.status().message());
  };
  EXPECT_EQ(message("temperature"), "the key 'temperature' is given twice");
  EXPECT_EQ(message("a\\nb"), "the key 'a\\x0ab' is given twice");
  // Whole characters: the 64th byte is within one.
  EXPECT_EQ(message(std::string(63, 'k') + "\xc3\xa4" + std::string(100'000, 'x')),
            "the key '" + std::string(63, 'k') + "...' is given twice");
}

}  // namespace
}  // namespace tidepool
