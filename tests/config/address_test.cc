#include "config/address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(HostPortTest, ReadsNamesAddressesAndBracketedIpv6) {
  EXPECT_EQ(ParseHostPort("localhost:80")->host, "localhost");
  EXPECT_EQ(ParseHostPort("0.0.0.0:65535")->port, 65535);
  EXPECT_EQ(ParseHostPort("[::1]:8000")->host, "::1");
}

TEST(HostPortTest, PrintsWhatItRead) {
  for (const char* text : {"localhost:80", "[fe80::1]:1", "10.0.0.1:0"})
    EXPECT_EQ(ParseHostPort(text)->ToString(), text);
}

TEST(HostPortTest, RefusesWhatIsNoListener) {
  for (const char* text : {"", "8000", ":8000", "host:", "host:x", "host:65536", "host:-1", "::1:80", "[::1]",
                           "[::1", "host:1e3", "host: 80", "host:99999999999999999999"}) {
    EXPECT_EQ(ParseHostPort(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(HostPortTest, KnowsLoopback) {
  for (const char* text : {"localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1"}) {
    EXPECT_TRUE(ParseHostPort(text)->IsLoopback()) << text;
  }
  for (const char* text : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "node1:1"}) {
    EXPECT_FALSE(ParseHostPort(text)->IsLoopback()) << text;
  }
}

}  // namespace
}  // namespace tidepool
