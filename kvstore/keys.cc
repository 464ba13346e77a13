#include "kvstore/keys.h"

#include "base/digest.h"

namespace tidepool {

BlockKey RootKey(std::string_view model_fingerprint, const BlockLayout& layout, std::string_view tenant_salt,
                 std::string_view codec) {
  Sha256 h;
  h.UpdateField(model_fingerprint).UpdateField(layout.ToString()).UpdateField(tenant_salt);
  if (!codec.empty() && codec != "none") h.UpdateField(codec);
  return BlockKey{h.Finish()};
}

BlockKey ChildKey(const BlockKey& parent, std::span<const int32_t> tokens) {
  // The parent's length is fixed and the count comes before the tokens, so no two inputs encode alike.
  Sha256 h;
  h.Update(parent.bytes).UpdateU64(tokens.size());
  std::array<uint8_t, 256> le;
  size_t used = 0;
  for (int32_t token : tokens) {
    const auto v = static_cast<uint32_t>(token);
    for (int shift = 0; shift < 32; shift += 8) le[used++] = static_cast<uint8_t>(v >> shift);
    if (used == le.size()) {
      h.Update(le);
      used = 0;
    }
  }
  h.Update(std::span(le).first(used));
  return BlockKey{h.Finish()};
}

std::vector<BlockKey> BlockKeys(const BlockKey& root, std::span<const int32_t> tokens,
                                uint32_t block_tokens) {
  std::vector<BlockKey> keys;
  if (block_tokens == 0) return keys;
  keys.reserve(tokens.size() / block_tokens);
  BlockKey parent = root;
  for (size_t at = 0; at + block_tokens <= tokens.size(); at += block_tokens) {
    parent = ChildKey(parent, tokens.subspan(at, block_tokens));
    keys.push_back(parent);
  }
  return keys;
}

}  // namespace tidepool
