#include "transport/bench/transport_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

TEST(TransportBenchTest, EveryRowHasItsReferenceFromTheSameRun) {
  TransportBenchOptions options;
  options.block_bytes = 256 << 10;
  options.pass_bytes = 4 << 20;
  options.rounds = 1;
  const auto rows = RunTransportBench(options);
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 4u);
  for (const BenchRow& row : *rows) {
    EXPECT_GT(row.value, 0) << row.name;
    EXPECT_GT(row.reference, 0) << row.name;
    EXPECT_FALSE(row.reference_name.empty()) << row.name;
    EXPECT_EQ(row.unit, "GB/s");
  }
  EXPECT_EQ((*rows)[0].name, "transport/shm/bulk");
  EXPECT_EQ((*rows)[3].name, "transport/ucx-tcp/bulk");
}

TEST(TransportBenchTest, ATransportThatCannotStartIsTheError) {
  TransportBenchOptions options;
  TransportBenchOptions::Subject subject{.name = "x"};
  subject.transport.ucx.net_devices = "nosuch0";
  options.subjects = {subject};
  options.pass_bytes = options.block_bytes;
  const auto rows = RunTransportBench(options);
  ASSERT_FALSE(rows.ok());
  EXPECT_THAT(std::string(rows.status().message()), testing::HasSubstr("nosuch0"));
}

TEST(TransportBenchTest, NothingToMeasureIsRefused) {
  TransportBenchOptions options;
  options.rounds = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(RunTransportBench(options).status()));
}

}  // namespace
}  // namespace tidepool
