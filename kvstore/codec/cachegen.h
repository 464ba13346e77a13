#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "base/block_layout.h"

namespace tidepool {

// The stream of a block after CacheGen (arXiv:2310.07240): numbers are rounded to a grid that depends on the
// layer, tokens become differences from an anchor, and what is left is entropy-coded under statistics of each
// (layer, channel). Lossless after the rounding. Little-endian:
//
//   body     := layers * layer
//   layer    := 0 u8 | planes * (step f32 | anchor_class u8) | classes | words u32 | escapes u32
//               | states 8 * u32 | words * u16 | escapes * i16
//             | 1 u8 | the layer as it lies in the block      (where coding would not make it smaller)
//   classes  := nibbles, ceil(planes * head_dim / 2) bytes: the class (rans.h) of each channel
//
// planes = 2 * kv_heads: K of each head, then V of each head. The symbols of a plane in order: the anchors of
// each group of 32 tokens (the last may be shorter), channel by channel, under anchor_class; then per channel
// and group the differences. A number is (anchor + difference) * step.
//
// Where it departs from the paper and its code, and why. The anchor of a group is not its first token but the
// rounded mean of each channel: a difference of two tokens has twice the variance of one from the mean.
// Statistics are not counted and sent (a block of 32 tokens is too short for that) but chosen for each
// channel among sixteen fixed distributions, half a byte each. The grid's step comes from the channels' mean
// standard deviation instead of each token's largest magnitude, so that outlier channels do not coarsen the
// others: they take more bits.

// Steps in which 8 standard deviations (+-4) are divided, by level (1 to 3), layer and K or V. CacheGen's
// numbers, which are for 32 layers, spread over as many as there are.
int CacheGenBins(int level, uint32_t layer, uint32_t layers, bool v);

size_t CacheGenMaxBytes(const BlockLayout& layout);

// What an encoding was like; for measurements.
struct CacheGenCost {
  uint64_t symbols = 0;      // numbers
  double ideal_bits = 0;     // of their differences, by the distributions they were coded with
  uint64_t stream_bits = 0;  // words, escapes, states of the differences and anchors
  double anchor_bits = 0;    // ideal, of the anchors
  uint64_t side_bits = 0;    // steps, classes, counts
};

// Appends the body. False: a number is not finite or at least 2^120. `cost` may be null.
bool CacheGenEncode(const BlockLayout& layout, int level, std::span<const std::byte> block,
                    std::vector<std::byte>& out, CacheGenCost* cost = nullptr);

// DataLoss: not a body of this layout. Never reads or writes outside.
absl::Status CacheGenDecode(const BlockLayout& layout, std::span<const std::byte> body,
                            std::span<std::byte> block);

}  // namespace tidepool
