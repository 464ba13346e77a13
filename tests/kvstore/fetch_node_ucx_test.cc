#include "kvstore/fetch_node.h"
#include "tests/kvstore/fetch_node_contract.h"
#include "transport/ucx_transport.h"

namespace tidepool {
namespace {

INSTANTIATE_TEST_SUITE_P(Ucx, FetchNodeContract, testing::Values(NodeTransportFactory([] {
                           return std::move(*CreateUcxTransport({}));
                         })));

}  // namespace
}  // namespace tidepool
