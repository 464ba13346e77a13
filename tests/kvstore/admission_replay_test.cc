#include "kvstore/disk/admission_replay.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>
#include <map>

#include "kvstore/policy/admission.h"

namespace tidepool {
namespace {

constexpr char kTrace[] = "../shared/data/traces/mooncake/conversation_trace.jsonl";

// One conversation of four blocks comes again and again among prompts that never do.
BlockTrace OneThatReturns() {
  BlockTrace trace;
  uint32_t next = 100;
  for (int i = 0; i < 400; ++i) {
    TraceRequest request;
    if (i % 4 == 0) {
      request.blocks = {1, 2, 3, 4};
    } else {
      for (int k = 0; k < 4; ++k) request.blocks.push_back(next++);
    }
    trace.blocks += request.blocks.size();
    trace.requests.push_back(std::move(request));
  }
  trace.distinct_blocks = next;
  return trace;
}

TEST(AdmissionReplay, FiltersWriteLessAndTinyLfuKeepsWhatReturns) {
  const BlockTrace trace = OneThatReturns();
  std::map<std::string_view, AdmissionReplayResult> by_name;
  for (const std::string_view name : AdmissionNames()) {
    const auto result = ReplayAdmission(trace, {.blocks = 8, .admission = std::string(name)});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->blocks, trace.blocks);
    by_name[name] = *result;
  }
  // Eight blocks are two requests: the returning one is gone before it returns.
  EXPECT_EQ(by_name["always"].hits, 0u);
  EXPECT_GT(by_name["tinylfu"].hits, 300u);
  EXPECT_LT(by_name["tinylfu"].written, 40u);
  EXPECT_GT(by_name["frequent"].hits, 300u);
  EXPECT_LT(by_name["frequent"].written, by_name["always"].written / 10);
}

TEST(AdmissionReplay, WhatCannotBeIsRefused) {
  EXPECT_FALSE(ReplayAdmission({}, {.blocks = 0}).ok());
  EXPECT_FALSE(ReplayAdmission({}, {.blocks = 1, .admission = "none"}).ok());
  EXPECT_FALSE(ReplayAdmission({}, {.blocks = 1, .eviction = "none"}).ok());
}

// Prints the table of kvstore/README.md.
TEST(AdmissionReplay, OnTheConversationTraceFiltersWriteAFractionForMostOfTheHits) {
  if (!std::filesystem::exists(kTrace)) GTEST_SKIP() << kTrace << " is not there";
  const auto trace = ReadMooncakeTrace(kTrace);
  ASSERT_TRUE(trace.ok()) << trace.status();
  for (const uint32_t blocks : {5859u, 10000u, 30000u, 100000u}) {
    std::map<std::string_view, AdmissionReplayResult> by_name;
    for (const std::string_view name : AdmissionNames()) {
      by_name[name] = *ReplayAdmission(*trace, {.blocks = blocks, .admission = std::string(name)});
      std::cout << blocks << " " << name << " hit " << by_name[name].hit_rate() << " written "
                << by_name[name].write_rate() << "\n";
    }
    EXPECT_LT(by_name["tinylfu"].written, by_name["always"].written);
    EXPECT_LT(by_name["frequent"].written, by_name["always"].written / 2);
  }
}

}  // namespace
}  // namespace tidepool
