#include "base/trace.h"

#include <gtest/gtest.h>

namespace tidepool {
namespace {

constexpr char kExample[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(Traceparent, ExampleOfTheSpecificationComesBackUnchanged) {
  const auto trace = ParseTraceparent(kExample);
  ASSERT_TRUE(trace.has_value());
  EXPECT_TRUE(trace->valid());
  EXPECT_TRUE(trace->sampled);
  EXPECT_EQ(trace->TraceIdHex(), "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(FormatTraceparent(*trace), kExample);
  EXPECT_EQ(TraceNote(*trace), " trace 0af7651916cd43dd8448eb211c80319c");
}

TEST(Traceparent, UnknownFlagsAreNotPassedOn) {
  const auto trace = ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-fe");
  ASSERT_TRUE(trace.has_value());
  EXPECT_FALSE(trace->sampled);
  EXPECT_EQ(FormatTraceparent(*trace), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00");
}

TEST(Traceparent, LaterVersionMayBeLongerAndIsReadAsFarAsKnown) {
  const std::string rest = "-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  EXPECT_TRUE(ParseTraceparent("cc" + rest).has_value());
  EXPECT_TRUE(ParseTraceparent("cc" + rest + "-what-comes-later").has_value());
  EXPECT_FALSE(ParseTraceparent("cc" + rest + ".what").has_value());
  EXPECT_FALSE(ParseTraceparent("00" + rest + "-more").has_value());
}

TEST(Traceparent, MalformedOnesAreNone) {
  const std::string good = kExample;
  for (size_t i = 0; i < good.size(); ++i) {
    EXPECT_FALSE(ParseTraceparent(good.substr(0, i)).has_value()) << i;
    std::string bad = good;
    bad[i] = good[i] == '-' ? '0' : 'G';
    EXPECT_FALSE(ParseTraceparent(bad).has_value()) << i;
  }
  EXPECT_FALSE(ParseTraceparent("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01").has_value());
  EXPECT_FALSE(ParseTraceparent("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").has_value());
  EXPECT_FALSE(ParseTraceparent("00-00000000000000000000000000000000-b7ad6b7169203331-01").has_value());
  EXPECT_FALSE(ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01").has_value());
}

TEST(Traceparent, ChildStaysInTheTraceUnderAnotherParent) {
  const auto trace = ParseTraceparent(kExample);
  ASSERT_TRUE(trace.has_value());
  const TraceContext child = ChildOf(*trace);
  EXPECT_EQ(child.trace_id, trace->trace_id);
  EXPECT_NE(child.parent_id, trace->parent_id);
  EXPECT_TRUE(child.sampled);
  EXPECT_NE(ChildOf(*trace).parent_id, child.parent_id);
}

TEST(Traceparent, NoTraceHasNoHeaderAndNoChild) {
  EXPECT_FALSE(TraceContext{}.valid());
  EXPECT_EQ(FormatTraceparent({}), "");
  EXPECT_EQ(TraceNote({}), "");
  EXPECT_EQ(TraceContext{}.TraceIdHex(), "");
  EXPECT_FALSE(ChildOf({}).valid());
}

}  // namespace
}  // namespace tidepool
