#include "server/cli/ctl_kv.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <string>

namespace tidepool {
namespace {

using testing::HasSubstr;

const std::string kKey(64, 'a');

std::string Why(const CtlSelectorFlags& flags) {
  const auto selector = MakeSelector(flags);
  EXPECT_EQ(selector.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(selector.status().message());
}

TEST(CtlKv, KeysAreHexDigits) {
  CtlSelectorFlags flags;
  flags.keys = {kKey, std::string(64, '0')};
  flags.model = "f1";
  const auto selector = MakeSelector(flags);
  ASSERT_TRUE(selector.ok()) << selector.status();
  ASSERT_EQ(selector->keys().keys_size(), 2);
  EXPECT_EQ(selector->keys().keys(0), std::string(32, '\xaa'));
  EXPECT_EQ(selector->fingerprint(), "f1");
  flags.keys = {kKey.substr(1)};
  EXPECT_THAT(Why(flags), HasSubstr("64 hex digits"));
  flags.keys = {std::string(64, 'g')};
  EXPECT_THAT(Why(flags), HasSubstr("64 hex digits"));
}

TEST(CtlKv, BlocksAreNamedInExactlyOneWay) {
  CtlSelectorFlags flags;
  EXPECT_THAT(Why(flags), HasSubstr("no blocks are named"));
  flags.all = true;
  flags.tenant = "t";
  EXPECT_THAT(Why(flags), HasSubstr("several ways"));
  flags.tenant.clear();
  EXPECT_TRUE(MakeSelector(flags)->all());
}

TEST(CtlKv, TokensGoWithTheirSalt) {
  CtlSelectorFlags flags;
  flags.tokens = {1, 2, 3};
  flags.salt = "0aff";
  const auto selector = MakeSelector(flags);
  ASSERT_TRUE(selector.ok()) << selector.status();
  EXPECT_EQ(selector->tokens().tokens_size(), 3);
  EXPECT_EQ(selector->tokens().salt(), std::string("\x0a\xff", 2));
  flags.salt = "0af";
  EXPECT_THAT(Why(flags), HasSubstr("is not hex"));
  flags.tokens.clear();
  flags.all = true;
  EXPECT_THAT(Why(flags), HasSubstr("--salt goes with --tokens"));
}

TEST(CtlKv, SessionsAreNumbers) {
  CtlSelectorFlags flags;
  flags.session = "18446744073709551615";
  EXPECT_EQ(MakeSelector(flags)->session(), UINT64_MAX);
  flags.session = "0xff";
  EXPECT_EQ(MakeSelector(flags)->session(), 255u);
  for (const char* bad : {"0", "porch", "-1", "18446744073709551616"}) {
    flags.session = bad;
    EXPECT_THAT(Why(flags), HasSubstr("is no session")) << bad;
  }
}

TEST(CtlKv, KeysComeFromAFileToo) {
  const std::string path = testing::TempDir() + "ctl_kv_test.keys";
  std::ofstream(path) << kKey << "\n\n  " << kKey << "  \n";
  CtlSelectorFlags flags;
  flags.keys_file = path;
  EXPECT_EQ(MakeSelector(flags)->keys().keys_size(), 2);
  std::ofstream(path) << "\n";
  EXPECT_THAT(Why(flags), HasSubstr("holds no key"));
  std::ofstream(path) << "nonsense\n";
  EXPECT_THAT(Why(flags), HasSubstr("64 hex digits"));
  std::remove(path.c_str());
  EXPECT_THAT(Why(flags), HasSubstr("cannot be read"));
}

}  // namespace
}  // namespace tidepool
