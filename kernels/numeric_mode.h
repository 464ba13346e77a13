#pragma once

#include <cstdint>

namespace tidepool {

// How much freedom the kernels have in the order of their sums.
//
// kFast            results of a row may differ in the last bits with the batch it is computed in.
// kBatchInvariant  every output row depends on its own inputs only: bitwise the same at any batch size,
//                  position in the batch, chunking of the prompt and number of threads. (The same on one
//                  kind of CPU: a machine with other vector instructions may round differently; see
//                  Linear::kernel.)
enum class NumericMode : uint8_t { kFast, kBatchInvariant };

}  // namespace tidepool
