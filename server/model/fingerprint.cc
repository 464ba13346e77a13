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

void HashDouble(Sha256& sha, double v) { sha.UpdateU64(std::bit_cast<uint64_t>(v)); }

void HashSpec(Sha256& sha, const ModelSpec& spec, uint32_t max_model_len) {
  sha.UpdateField(spec.architecture->name);
  for (uint64_t v : {spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate,
                     spec.vocab, uint32_t{spec.tie_embeddings}, uint32_t{spec.qkv_bias},
                     uint32_t{spec.o_bias}, uint32_t{spec.mlp_bias}}) {
    sha.UpdateU64(v);
  }
  for (double v : {spec.rms_eps, spec.attention_scale, spec.attention_softcap, spec.final_softcap}) {
    HashDouble(sha, v);
  }
  for (const LayerSpec& l : spec.layer_specs) {
    for (uint64_t v : {l.window, l.rope, l.intermediate, l.experts, l.experts_per_token,
                       uint32_t{l.renormalise_experts}}) {
      sha.UpdateU64(v);
    }
  }
  sha.UpdateU64(spec.ropes.size());
  for (const RopeSpec& r : spec.ropes) {
    HashDouble(sha, r.attention_factor);
    sha.UpdateU64(r.rotary_dim);
    for (const float f : RopeFrequencies(r, max_model_len)) sha.UpdateU64(std::bit_cast<uint32_t>(f));
  }
}

}  // namespace

std::string ModelFingerprint(const ModelSpec& spec, std::string_view tokenizer_digest, DType compute_dtype,
                             const Checkpoint& checkpoint, uint32_t max_model_len) {
  Sha256 sha;
  sha.UpdateField("tidepool model fingerprint 2");
  HashSpec(sha, spec, max_model_len);
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
