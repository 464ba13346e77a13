#include "transport/ucx_transport.h"

#include "tests/transport/transport_contract.h"

namespace tidepool {
namespace {

std::unique_ptr<Transport> Make(const std::string& tls) {
  UcxOptions options;
  options.tls = tls;
  auto transport = CreateUcxTransport(options);
  EXPECT_TRUE(transport.ok()) << transport.status();
  return std::move(*transport);
}

INSTANTIATE_TEST_SUITE_P(UcxTcp, TransportContract,
                         testing::Values(TransportFactory([] { return Make("tcp"); })));
INSTANTIATE_TEST_SUITE_P(UcxDefault, TransportContract,
                         testing::Values(TransportFactory([] { return Make("tcp,sysv,posix,cma,self"); })));

TEST(UcxTransportTest, BindsToTheNamedInterfaceOnly) {
  const std::string address = Make("tcp")->Address();
  EXPECT_EQ(address.substr(0, 14), "ucx:127.0.0.1:") << address;
}

TEST(UcxTransportTest, AnUnknownInterfaceIsNamedInTheError) {
  UcxOptions options;
  options.net_devices = "nosuch0";
  auto transport = CreateUcxTransport(options);
  ASSERT_TRUE(absl::IsInvalidArgument(transport.status()));
  EXPECT_NE(std::string(transport.status().message()).find("nosuch0"), std::string::npos);
}

TEST(UcxTransportTest, ListenHostMustBeNumeric) {
  UcxOptions options;
  options.listen_host = "localhost";
  EXPECT_TRUE(absl::IsInvalidArgument(CreateUcxTransport(options).status()));
}

}  // namespace
}  // namespace tidepool
