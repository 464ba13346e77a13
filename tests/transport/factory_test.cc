#include "transport/factory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace tidepool {
namespace {

using ::testing::HasSubstr;

TEST(FactoryTest, AnUnknownKindNamesTheKnownOnes) {
  TransportOptions options;
  options.kind = "smoke";
  const auto made = CreateTransport(options);
  ASSERT_TRUE(absl::IsInvalidArgument(made.status()));
  EXPECT_THAT(std::string(made.status().message()), HasSubstr("'smoke' is unknown; give ucx or tls"));
}

TEST(FactoryTest, UcxIsTheDefault) {
  auto made = CreateTransport({});
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ((*made)->Name(), "ucx");
}

TEST(FactoryTest, TlsWithoutCertificatesSaysWhichAreMissing) {
  TransportOptions options;
  options.kind = "tls";
  const auto made = CreateTransport(options);
  ASSERT_TRUE(absl::IsInvalidArgument(made.status()));
  EXPECT_THAT(std::string(made.status().message()), HasSubstr("tls_cert is empty"));
}

TEST(FactoryTest, ALimitIsCounted) {
  MetricRegistry metrics;
  TransportOptions options;
  options.max_bytes_per_second = 1000;
  options.metrics = &metrics;
  auto made = CreateTransport(options);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ((*made)->Name(), "ucx");
  EXPECT_THAT(metrics.Render(), HasSubstr("tidepool_transport_rate_limit_queue_bytes"));
  EXPECT_THAT(metrics.Render(), HasSubstr("tidepool_transport_bytes_total"));
}

}  // namespace
}  // namespace tidepool
