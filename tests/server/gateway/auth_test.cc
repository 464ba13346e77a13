#include "server/gateway/auth.h"

#include <gtest/gtest.h>

#include <set>

#include "base/digest.h"
#include "server/gateway/errors.h"

namespace tidepool {
namespace {

GatewayConfig WithKeys() {
  GatewayConfig config;
  config.server_key = "secret";
  config.api_keys = {{HexEncode(Sha256().Update("key-a").Finish()), "a"},
                     {HexEncode(Sha256().Update("key-b").Finish()), "b"}};
  return config;
}

TEST(AuthTest, WithoutKeysEverybodyIsTheDefaultTenant) {
  const auto auth = Authenticator::Create(GatewayConfig());
  ASSERT_TRUE(auth.ok());
  EXPECT_EQ(*(*auth)->Tenant(""), "default");
}

TEST(AuthTest, FindsTheTenantOfAKey) {
  const auto auth = Authenticator::Create(WithKeys());
  ASSERT_TRUE(auth.ok());
  EXPECT_EQ(*(*auth)->Tenant("Bearer key-a"), "a");
  EXPECT_EQ(*(*auth)->Tenant("bearer key-b"), "b");
  for (const char* bad : {"", "Bearer", "Bearer ", "Bearer key-c", "Basic key-a", "key-a", "Bearer key-a "}) {
    EXPECT_EQ((*auth)->Tenant(bad).status().code(), absl::StatusCode::kUnauthenticated) << bad;
  }
}

TEST(AuthTest, RefusesAKeyInPlainText) {
  GatewayConfig config;
  config.api_keys = {{"sk-oops", "a"}};
  EXPECT_FALSE(Authenticator::Create(config).ok());
}

TEST(AuthTest, SessionsOfTwoTenantsNeverMeet) {
  GatewayConfig config;
  config.server_key = "key";
  const auto auth = Authenticator::Create(config);
  ASSERT_TRUE(auth.ok()) << auth.status();
  const std::set<uint64_t> sessions = {(*auth)->Session("a", "x"), (*auth)->Session("b", "x"),
                                       (*auth)->Session("a", "y"), (*auth)->Session("ax", "y"),
                                       (*auth)->Session("a", "xy")};
  EXPECT_EQ(sessions.size(), 5u);
  EXPECT_EQ((*auth)->Session("a", "x"), (*auth)->Session("a", "x"));
  EXPECT_EQ((*auth)->Session("a", ""), 0u);
}

TEST(AuthTest, SaltsNeverMeetAcrossTenants) {
  const auto auth = Authenticator::Create(WithKeys());
  ASSERT_TRUE(auth.ok());
  // Pairs that would be equal if the fields were only put together.
  const std::set<std::string> salts = {(*auth)->Salt("a", ""),  (*auth)->Salt("b", ""),
                                       (*auth)->Salt("a", "b"), (*auth)->Salt("ab", ""),
                                       (*auth)->Salt("", "ab"), (*auth)->Salt("b", "a")};
  EXPECT_EQ(salts.size(), 6u);
  EXPECT_EQ((*auth)->Salt("a", "x"), (*auth)->Salt("a", "x"));
  GatewayConfig other = WithKeys();
  other.server_key = "another";
  EXPECT_NE((*Authenticator::Create(other))->Salt("a", "x"), (*auth)->Salt("a", "x"));
}

TEST(ErrorsTest, CodesAreUniqueAndTheBodyIsOpenAis) {
  std::set<std::string_view> codes;
  for (const ErrorKind& kind : ErrorCatalogue()) EXPECT_TRUE(codes.insert(kind.code).second) << kind.code;
  EXPECT_EQ(ErrorBody(MakeError(errors::kContextLength, "too long", "messages")),
            R"({"error":{"message":"too long","type":"invalid_request_error","param":"messages",)"
            R"("code":"context_length_exceeded"}})");
}

}  // namespace
}  // namespace tidepool
