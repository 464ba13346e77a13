#include "server/gateway/tenant_limits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/numbers.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Ticket = TenantLimits::Ticket;

TenantTable Tenants(std::vector<TenantSettings> settings) {
  TenantTable table;
  for (TenantSettings& tenant : settings) {
    table.keys.push_back({std::string(64, 'a'), tenant.name});
    table.tenants.push_back(tenant);
  }
  return table;
}
TenantSettings Of(std::string name, TenantLimitsConfig limits) { return {std::move(name), limits, 0}; }

class TenantLimitsTest : public ::testing::Test {
 protected:
  void Make(TenantTable table) { limits_ = std::make_unique<TenantLimits>(config_, table, clock_, metrics_); }
  // The code of the refusal; "" and the ticket kept where there is none.
  std::string Admit(const std::string& tenant, uint32_t prompt = 0) {
    auto admitted = limits_->Admit(tenant);
    if (auto* error = std::get_if<ApiError>(&admitted)) return Refused(*error);
    Ticket ticket = std::get<Ticket>(std::move(admitted));
    if (prompt > 0) {
      if (auto error = ticket.TakePrompt(prompt)) return Refused(*error);
    }
    tickets_.push_back(std::move(ticket));
    return "";
  }
  std::string Refused(const ApiError& error) {
    EXPECT_EQ(error.status, 429);
    EXPECT_GE(error.retry_after_seconds, 1u);
    EXPECT_LE(error.retry_after_seconds, 60u);
    error_ = error;
    return std::string(error.code);
  }
  std::string Header(const std::string& tenant, const std::string& name) {
    for (const auto& [key, value] : limits_->RateHeaders(tenant)) {
      if (key == "x-ratelimit-" + name) return value;
    }
    return "";
  }

  FakeClock clock_;
  MetricRegistry metrics_;
  GatewayConfig config_;
  std::unique_ptr<TenantLimits> limits_;
  std::vector<Ticket> tickets_;
  ApiError error_;
};

TEST_F(TenantLimitsTest, WithoutLimitsNothingIsRefusedOrShown) {
  Make({});
  for (int i = 0; i < 100; ++i) EXPECT_EQ(Admit("default", 1000), "");
  EXPECT_THAT(limits_->RateHeaders("default"), IsEmpty());
}

TEST_F(TenantLimitsTest, ARateOfRequestsFillsEvenly) {
  Make(Tenants({Of("a", {.requests_per_minute = 6}), Of("b", {})}));
  for (int i = 0; i < 6; ++i) EXPECT_EQ(Admit("a"), "") << i;
  EXPECT_EQ(Admit("a"), "rate_limit_exceeded");
  EXPECT_EQ(error_.retry_after_seconds, 10u);
  EXPECT_EQ(Admit("b"), "") << "nobody else pays";
  EXPECT_EQ(Header("a", "limit-requests"), "6");
  EXPECT_EQ(Header("a", "remaining-requests"), "0");
  EXPECT_EQ(Header("a", "reset-requests"), "1m0s");
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(Admit("a"), "");
  EXPECT_EQ(Admit("a"), "rate_limit_exceeded");
  clock_.Advance(absl::Hours(1));
  for (int i = 0; i < 6; ++i) EXPECT_EQ(Admit("a"), "") << "a minute's worth, not an hour's";
  EXPECT_EQ(Admit("a"), "rate_limit_exceeded");
}

TEST_F(TenantLimitsTest, PromptsAndAnswersSpendTokens) {
  Make(Tenants({Of("a", {.tokens_per_minute = 600})}));
  EXPECT_EQ(Admit("a", 400), "");
  EXPECT_EQ(Header("a", "remaining-tokens"), "200");
  EXPECT_EQ(Admit("a", 300), "rate_limit_exceeded");
  EXPECT_EQ(error_.retry_after_seconds, 10u);  // 100 of 10 a second
  EXPECT_THAT(error_.message, HasSubstr("300"));
  EXPECT_EQ(Header("a", "remaining-tokens"), "200") << "a refusal costs nothing";
  limits_->Spend("a", 500);  // below zero
  EXPECT_EQ(Header("a", "remaining-tokens"), "0");
  EXPECT_EQ(Admit("a", 1), "rate_limit_exceeded");
  EXPECT_EQ(error_.retry_after_seconds, 31u);
  clock_.Advance(absl::Seconds(31));
  EXPECT_EQ(Admit("a", 1), "");
}

TEST_F(TenantLimitsTest, APromptAboveTheMinuteIsTakenWhenItIsUnusedAndPaidOff) {
  Make(Tenants({Of("a", {.tokens_per_minute = 60})}));
  EXPECT_EQ(Admit("a", 180), "");
  EXPECT_EQ(Admit("a", 1), "rate_limit_exceeded");
  clock_.Advance(absl::Seconds(119));
  EXPECT_EQ(Admit("a", 1), "rate_limit_exceeded");
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(Admit("a", 1), "");
}

TEST_F(TenantLimitsTest, ATenantsRequestsInFlightAreBoundedAndGivenBack) {
  Make(Tenants({Of("a", {.max_inflight = 2}), Of("b", {})}));
  EXPECT_EQ(Admit("a"), "");
  EXPECT_EQ(Admit("a"), "");
  EXPECT_EQ(Admit("a"), "too_many_requests");
  EXPECT_EQ(Admit("b"), "");
  tickets_.erase(tickets_.begin());
  EXPECT_EQ(Admit("a"), "");
  tickets_.push_back(limits_->Join("a"));
  tickets_.erase(tickets_.begin());
  EXPECT_EQ(Admit("a"), "too_many_requests") << "a further choice counts";
}

TEST_F(TenantLimitsTest, TheQueueIsBoundedInRequestsAndTokensUntilTheFirstToken) {
  config_.max_queued_requests = 3;
  config_.max_queued_tokens = 1000;
  Make({});
  EXPECT_EQ(Admit("default", 600), "");
  EXPECT_EQ(Admit("default", 600), "queue_full");
  EXPECT_EQ(Admit("default", 300), "");
  EXPECT_EQ(Admit("default", 50), "");
  EXPECT_EQ(Admit("default", 1), "queue_full");
  tickets_[0].FirstToken();
  tickets_[0].FirstToken();
  EXPECT_EQ(Admit("default", 600), "") << "room for one, and for its tokens";
  EXPECT_EQ(Admit("default", 1), "queue_full");
  tickets_.clear();
  EXPECT_EQ(metrics_.AddGauge("tidepool_gateway_waiting_prompt_tokens", "").value(), 0);
  EXPECT_EQ(Admit("default", 5000), "") << "what is larger than the queue is taken when it is empty";
  EXPECT_EQ(Admit("default", 1), "queue_full");
}

TEST_F(TenantLimitsTest, OtherBoundsForAllHoldAtOnceAndForWhatIsThere) {
  config_.max_inflight = 3;
  config_.max_queued_requests = 1;
  Make({});
  EXPECT_EQ(Admit("default", 600), "");
  EXPECT_EQ(Admit("default", 1), "queue_full");
  GatewayConfig more = config_;
  more.max_queued_requests = 0;  // as many as may be in flight
  more.max_queued_tokens = 700;
  limits_->SetBounds(more);
  EXPECT_EQ(Admit("default", 200), "queue_full") << "of tokens";
  EXPECT_EQ(Admit("default", 100), "");
  limits_->SetBounds(config_);
  EXPECT_EQ(Admit("default", 1), "queue_full");
}

TEST_F(TenantLimitsTest, ATenantsOwnQueueIsBounded) {
  Make(Tenants({Of("a", {.max_queued_requests = 2, .max_queued_tokens = 100}), Of("b", {})}));
  EXPECT_EQ(Admit("a", 80), "");
  EXPECT_EQ(Admit("a", 80), "queue_full");
  EXPECT_EQ(Admit("a", 10), "");
  EXPECT_EQ(Admit("a", 1), "queue_full");
  EXPECT_EQ(Admit("b", 1000), "");
}

// RELIABILITY 5d: one tenant at ten times its load.
TEST_F(TenantLimitsTest, OneTenantAloneLeavesRoomForTheOthers) {
  config_.max_inflight = 40;
  config_.max_queued_requests = 40;
  Make(Tenants({Of("greedy", {}), Of("b", {}), Of("c", {})}));
  int greedy = 0;
  while (Admit("greedy", 1).empty()) ++greedy;
  EXPECT_EQ(greedy, 20) << "half";
  int b = 0;
  while (Admit("b", 1).empty()) ++b;
  EXPECT_EQ(b, 10) << "half of what is left";
  EXPECT_EQ(Admit("c", 1), "") << "and still room";
  EXPECT_NE(Admit("greedy", 1), "");
  // With only one tenant there is nobody to leave room for.
  tickets_.clear();
  limits_->Replace(Tenants({Of("greedy", {})}));
  for (int i = 0; i < 40; ++i) EXPECT_EQ(Admit("greedy", 1), "") << i;
  EXPECT_NE(Admit("greedy", 1), "");
}

TEST_F(TenantLimitsTest, TheRetryTimeIsWhatTheQueueTakesToDrain) {
  config_.max_inflight = 10000;
  config_.max_queued_requests = 40;
  Make({});
  for (int i = 0; i < 40; ++i) EXPECT_EQ(Admit("default", 1), "");
  EXPECT_EQ(Admit("default", 1), "queue_full");
  EXPECT_GE(error_.retry_after_seconds, 48u) << "nothing drains";
  // Four a second.
  for (int i = 0; i < 400; ++i) {
    clock_.Advance(absl::Milliseconds(250));
    tickets_.erase(tickets_.begin());
    EXPECT_EQ(Admit("default", 1), "");
  }
  EXPECT_EQ(Admit("default", 1), "queue_full");
  EXPECT_GE(error_.retry_after_seconds, 8u);
  EXPECT_LE(error_.retry_after_seconds, 13u) << "ten seconds, spread by a fifth";
}

TEST_F(TenantLimitsTest, NewLimitsHoldAtOnceAndKeepWhatWasSpent) {
  Make(Tenants({Of("a", {.requests_per_minute = 10})}));
  for (int i = 0; i < 8; ++i) EXPECT_EQ(Admit("a"), "");
  limits_->Replace(Tenants({Of("a", {.requests_per_minute = 5})}));
  EXPECT_EQ(Header("a", "limit-requests"), "5");
  EXPECT_EQ(Header("a", "remaining-requests"), "2");
  limits_->Replace(Tenants({Of("a", {})}));
  EXPECT_THAT(limits_->RateHeaders("a"), IsEmpty());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(Admit("a"), "");
  limits_->Replace({});
  tickets_.clear();  // of a tenant that is gone
}

TEST_F(TenantLimitsTest, ATicketThatMovesIsGivenBackOnce) {
  config_.max_inflight = 1;
  Make({});
  {
    auto admitted = limits_->Admit("default");
    Ticket first = std::get<Ticket>(std::move(admitted));
    Ticket second = std::move(first);
    std::vector<Ticket> tickets;
    tickets.push_back(std::move(second));
    tickets.push_back(limits_->Join("default"));
    tickets[0] = std::move(tickets[1]);
  }
  EXPECT_EQ(Admit("default"), "");
  EXPECT_EQ(Admit("default"), "too_many_requests");
}

TEST_F(TenantLimitsTest, AReloadWithoutKeysKeepsTheOneTenantsBuckets) {
  TenantTable table;
  table.defaults = {.requests_per_minute = 1};
  Make(table);
  EXPECT_EQ(Admit("default"), "");
  tickets_.clear();
  limits_->Replace(table);
  EXPECT_EQ(Admit("default"), "rate_limit_exceeded");
}

}  // namespace
}  // namespace tidepool
