#include "server/http/origin_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;
using Verdict = OriginPolicy::Verdict;

HttpRequest Request(std::string host, std::string origin = "", std::string method = "GET") {
  HttpRequest request;
  request.method = std::move(method);
  if (!host.empty()) request.headers.emplace_back("host", std::move(host));
  if (!origin.empty()) request.headers.emplace_back("origin", std::move(origin));
  return request;
}

TEST(OriginPolicyTest, OnLoopbackOnlyItsOwnNamesAreAnswered) {
  const OriginPolicy policy{OriginPolicy::Options{}};
  for (const char* host : {"localhost", "localhost:8000", "LocalHost.:8000", "127.0.0.1:8000", "127.9.9.9",
                           "[::1]:8000", "[::1]", ""}) {
    EXPECT_EQ(policy.Check(Request(host)), Verdict::kAllowed) << host;
  }
  for (const char* host :
       {"evil.example", "127.0.0.1.evil.example", "127.evil.example:8000", "localhost.evil.example",
        "192.168.1.1", "[::2]", "[::1", "0.0.0.0", "2130706433"}) {
    EXPECT_EQ(policy.Check(Request(host)), Verdict::kHostRefused) << host;
  }
}

TEST(OriginPolicyTest, FurtherNamesAreConfigured) {
  OriginPolicy::Options options;
  options.allowed_hosts = {"Api.Example"};
  EXPECT_EQ(OriginPolicy(options).Check(Request("api.example:443")), Verdict::kAllowed);
  EXPECT_EQ(OriginPolicy(options).Check(Request("evil.example")), Verdict::kHostRefused);
  options.loopback = false;
  EXPECT_EQ(OriginPolicy(options).Check(Request("localhost")), Verdict::kHostRefused) << "then only they are";
  options.allowed_hosts = {};
  EXPECT_EQ(OriginPolicy(options).Check(Request("anything")), Verdict::kAllowed);
}

TEST(OriginPolicyTest, PagesOfOtherOriginsAreRefused) {
  const OriginPolicy policy{OriginPolicy::Options{}};
  EXPECT_EQ(policy.Check(Request("localhost:8000", "http://localhost:8000")), Verdict::kAllowed);
  for (const char* origin :
       {"http://localhost:3000", "https://localhost:8000", "https://evil.example", "null"}) {
    EXPECT_EQ(policy.Check(Request("localhost:8000", origin)), Verdict::kOriginRefused) << origin;
  }
  const auto reply = policy.Filter(Request("localhost", "https://evil.example"));
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->status, 403);
  EXPECT_THAT(reply->body, HasSubstr("origin_not_allowed"));
  HttpHeaders headers;
  policy.AddCorsHeaders("https://evil.example", headers);
  EXPECT_THAT(headers, IsEmpty());
}

TEST(OriginPolicyTest, ListedOriginsGetCorsHeadersAndPreflights) {
  OriginPolicy::Options options;
  options.allowed_origins = {"https://app.example"};
  const OriginPolicy policy(options);
  HttpHeaders headers;
  policy.AddCorsHeaders("https://app.example", headers);
  EXPECT_THAT(headers, Contains(Pair("Access-Control-Allow-Origin", "https://app.example")));
  EXPECT_THAT(headers, Contains(Pair("Vary", "Origin")));
  headers.clear();
  policy.AddCorsHeaders("", headers);
  EXPECT_THAT(headers, Contains(Pair("Vary", "Origin"))) << "a cache must not mix the two";
  HttpRequest preflight = Request("localhost", "https://app.example", "OPTIONS");
  EXPECT_EQ(policy.Filter(preflight), std::nullopt) << "plain OPTIONS";
  preflight.headers.emplace_back("access-control-request-method", "POST");
  preflight.headers.emplace_back("access-control-request-headers", "authorization,x-stainless-os");
  const auto reply = policy.Filter(preflight);
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->status, 204);
  EXPECT_THAT(reply->headers, Contains(Pair("Access-Control-Allow-Headers", "authorization,x-stainless-os")));
}

TEST(OriginPolicyTest, AStarAllowsEveryPage) {
  OriginPolicy::Options options;
  options.allowed_origins = {"*"};
  const OriginPolicy policy(options);
  EXPECT_EQ(policy.Check(Request("localhost", "https://any.example")), Verdict::kAllowed);
  HttpHeaders headers;
  policy.AddCorsHeaders("https://any.example", headers);
  EXPECT_THAT(headers, Contains(Pair("Access-Control-Allow-Origin", "*")));
}

}  // namespace
}  // namespace tidepool
