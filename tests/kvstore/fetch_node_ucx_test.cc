#include "kvstore/fetch_node.h"
#include "tests/kvstore/fetch_node_contract.h"
#include "transport/ucx_transport.h"

namespace tidepool {
namespace {

INSTANTIATE_TEST_SUITE_P(Ucx, FetchNodeContract, testing::Values(NodeTransportFactory([] {
                           return std::move(*CreateUcxTransport({}));
                         })));
// Blocks are copied out of the other node's mapped pool.
INSTANTIATE_TEST_SUITE_P(UcxShm, FetchNodeContract, testing::Values(NodeTransportFactory([] {
                           UcxOptions options;
                           options.tls = "shm";
                           return std::move(*CreateUcxTransport(options));
                         })));

}  // namespace
}  // namespace tidepool
