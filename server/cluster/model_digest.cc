#include "server/cluster/model_digest.h"

#include <span>

#include "base/digest.h"

namespace tidepool {

std::string ModelIdentityDigest(const v1::ModelIdentity& model) {
  constexpr size_t kDigestBytes = 16;
  Sha256 sha;
  sha.UpdateField("tidepool model identity 1").UpdateField(model.fingerprint()).UpdateField(model.kv_codec());
  for (const uint32_t v : {model.layers(), model.kv_heads(), model.head_dim(), model.block_tokens(),
                           model.kv_dtype(), model.max_model_len(), model.vocab_size()}) {
    sha.UpdateU64(v);
  }
  const Sha256Digest digest = sha.Finish();
  return HexEncode(std::span(digest).first(kDigestBytes));
}

}  // namespace tidepool
