#include "server/model/fingerprint.h"

#include <algorithm>
#include <bit>

#include "base/digest.h"

namespace tidepool {
namespace {

void HashContents(Sha256& sha, std::span<const std::byte> data, bool whole) {
  const auto* p = reinterpret_cast<const uint8_t*>(data.data());
  if (whole || data.size() <= kFingerprintSamples * kFingerprintSampleBytes) {
    sha.Update(std::span(p, data.size()));
    return;
  }
  const uint64_t last = data.size() - kFingerprintSampleBytes;
  for (uint64_t i = 0; i < kFingerprintSamples; ++i) {
    // last < 2^60 and i < 16: no overflow.
    sha.Update(std::span(p + last * i / (kFingerprintSamples - 1), kFingerprintSampleBytes));
  }
}

}  // namespace

std::string ModelFingerprint(const ModelSpec& spec, std::string_view tokenizer_digest, DType compute_dtype,
                             const Checkpoint& checkpoint) {
  Sha256 sha;
  sha.UpdateField("tidepool model fingerprint 1");
  sha.UpdateField(spec.architecture->name);
  for (uint64_t v : {spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate,
                     spec.vocab, uint32_t{spec.tie_embeddings}}) {
    sha.UpdateU64(v);
  }
  sha.UpdateU64(std::bit_cast<uint64_t>(spec.rms_eps));
  sha.UpdateU64(std::bit_cast<uint64_t>(spec.rope_theta));
  sha.UpdateField(tokenizer_digest);
  sha.UpdateField(DTypeName(compute_dtype));

  uint64_t total = 0;
  for (const auto& [name, t] : checkpoint.tensors()) total += t.data.size();
  const bool whole = total <= kFingerprintWholeBytesMax;
  sha.UpdateU64(checkpoint.tensors().size());
  for (const auto& [name, t] : checkpoint.tensors()) {
    sha.UpdateField(name);
    sha.UpdateField(t.dtype_name);
    sha.UpdateU64(t.shape.size());
    for (int64_t d : t.shape) sha.UpdateU64(static_cast<uint64_t>(d));
    HashContents(sha, t.data, whole);
  }
  return HexEncode(sha.Finish());
}

}  // namespace tidepool
