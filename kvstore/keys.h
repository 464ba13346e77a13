#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "base/block_layout.h"
#include "kvstore/types.h"

namespace tidepool {

// The chain's root: SHA-256 over (model fingerprint, block layout, tenant salt[, codec]), each
// length-prefixed, so two models, two dtypes, two codecs or two tenants can never meet by accident. `codec`
// is the name of what blocks of this chain may have gone through (config kv.codec); "" and "none" are exact
// blocks.
BlockKey RootKey(std::string_view model_fingerprint, const BlockLayout& layout, std::string_view tenant_salt,
                 std::string_view codec);

// SHA-256 over (parent key, number of tokens, token ids little-endian). With block_tokens tokens it names
// a sealed block; with fewer, the unsealed tail of one request (never indexed, only handed off).
BlockKey ChildKey(const BlockKey& parent, std::span<const int32_t> tokens);

// Keys of the sealed blocks of `tokens`, in order: floor(tokens.size() / block_tokens) of them.
std::vector<BlockKey> BlockKeys(const BlockKey& root, std::span<const int32_t> tokens, uint32_t block_tokens);

}  // namespace tidepool
