#include "server/bench/sse_parser.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace tidepool {
namespace {

using Events = std::vector<std::pair<std::string, std::string>>;

Events Parse(const std::vector<std::string_view>& pieces) {
  SseParser parser;
  Events out;
  for (const auto piece : pieces) {
    EXPECT_TRUE(
        parser
            .Feed(piece, [&](std::string_view name, std::string_view data) { out.emplace_back(name, data); })
            .ok());
  }
  return out;
}

TEST(SseParserTest, ReadsWhatTheStandardsExamplesSay) {
  EXPECT_EQ(Parse({"data: YHOO\ndata: +2\ndata: 10\n\n"}), (Events{{"", "YHOO\n+2\n10"}}));
  EXPECT_EQ(
      Parse({": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"}),
      (Events{{"", "first event"}, {"", "second event"}, {"", " third event"}}));
  EXPECT_EQ(Parse({"data\n\ndata\ndata\n\ndata:"}), (Events{{"", ""}, {"", "\n"}}));
  EXPECT_EQ(Parse({"event: add\ndata: 1\n\ndata: 2\n\n"}), (Events{{"add", "1"}, {"", "2"}}));
}

TEST(SseParserTest, TakesEveryLineEndAndAByteOrderMark) {
  EXPECT_EQ(Parse({"\xEF\xBB\xBF"
                   "data: a\r\n\r\ndata: b\r\rdata: c\n\n"}),
            (Events{{"", "a"}, {"", "b"}, {"", "c"}}));
}

TEST(SseParserTest, GivesTheSameEventsHoweverTheStreamIsCut) {
  const std::string stream =
      ": ping\r\n\r\nevent: x\r\ndata: {\"a\":1}\r\n\r\ndata: one\ndata: two\n\ndata: \xE2\x82\xAC\r\rdata: "
      "[DONE]\n\n";
  const Events whole = Parse({stream});
  ASSERT_EQ(whole.size(), 4u);
  for (size_t i = 0; i <= stream.size(); ++i) {
    for (size_t j = i; j <= stream.size(); ++j) {
      const std::string_view view = stream;
      ASSERT_EQ(Parse({view.substr(0, i), view.substr(i, j - i), view.substr(j)}), whole) << i << " " << j;
    }
  }
}

TEST(SseParserTest, RefusesAnEventWithoutEnd) {
  SseParser parser(100);
  const auto none = [](std::string_view, std::string_view) { FAIL(); };
  EXPECT_TRUE(parser.Feed("data: " + std::string(80, 'x'), none).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(parser.Feed(std::string(80, 'x'), none)));
}

}  // namespace
}  // namespace tidepool
