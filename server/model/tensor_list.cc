#include "server/model/tensor_list.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status.h"

namespace tidepool {
namespace {

// Builds the list of one layer after the other.
class Lister {
 public:
  Lister(const ModelSpec& spec, const TensorPrefix& prefix, std::vector<TensorSpec>& out)
      : spec_(spec), a_(*spec.architecture), prefix_(prefix), out_(out) {}

  void Layer(uint32_t layer) {
    layer_ = layer;
    const LayerSpec& l = spec_.layer_specs[layer];
    const int64_t q = int64_t{spec_.heads} * spec_.head_dim, kv = int64_t{spec_.kv_heads} * spec_.head_dim;
    Norm(a_.attention_norm, spec_.hidden);
    Matrix(a_.q, q, spec_.hidden, spec_.qkv_bias);
    Matrix(a_.k, kv, spec_.hidden, spec_.qkv_bias);
    Matrix(a_.v, kv, spec_.hidden, spec_.qkv_bias);
    Matrix(a_.fused_qkv, q + 2 * kv, spec_.hidden, spec_.qkv_bias);
    Norm(a_.q_norm, spec_.head_dim);
    Norm(a_.k_norm, spec_.head_dim);
    Matrix(a_.o, spec_.hidden, q, spec_.o_bias);
    Norm(a_.post_attention_norm, spec_.hidden);
    Norm(a_.mlp_norm, spec_.hidden);
    if (l.experts > 0) {
      Matrix(a_.router, l.experts, spec_.hidden, false);
      for (expert_ = 0; expert_ < l.experts; ++expert_) {
        Matrix(a_.expert_gate, l.intermediate, spec_.hidden, false);
        Matrix(a_.expert_up, l.intermediate, spec_.hidden, false);
        Matrix(a_.expert_down, spec_.hidden, l.intermediate, false);
      }
    } else {
      Matrix(a_.gate, l.intermediate, spec_.hidden, spec_.mlp_bias);
      Matrix(a_.up, l.intermediate, spec_.hidden, spec_.mlp_bias);
      Matrix(a_.fused_gate_up, 2 * int64_t{l.intermediate}, spec_.hidden, spec_.mlp_bias);
      Matrix(a_.down, spec_.hidden, l.intermediate, spec_.mlp_bias);
    }
    Norm(a_.post_mlp_norm, spec_.hidden);
  }

 private:
  void Norm(std::string_view pattern, int64_t n) {
    if (!pattern.empty()) {
      out_.push_back({TensorName(prefix_, pattern, layer_), {n}, TensorKind::kNorm});
    }
  }
  void Matrix(std::string_view pattern, int64_t n, int64_t k, bool bias) {
    if (pattern.empty()) return;
    std::string name = TensorName(prefix_, pattern, layer_, expert_);
    if (bias) out_.push_back({BiasName(name), {n}, TensorKind::kBias});
    out_.push_back({std::move(name), {n, k}, TensorKind::kMatrix});
  }

  const ModelSpec& spec_;
  const Architecture& a_;
  const TensorPrefix& prefix_;
  std::vector<TensorSpec>& out_;
  uint32_t layer_ = 0, expert_ = 0;
};

}  // namespace

int64_t TensorSpec::elements() const {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

std::string TensorName(const TensorPrefix& prefix, std::string_view pattern, uint32_t layer,
                       uint32_t expert) {
  return absl::StrCat(std::string(prefix.body),
                      absl::StrReplaceAll(std::string(pattern),
                                          {{"{}", std::to_string(layer)}, {"[]", std::to_string(expert)}}));
}

std::string BiasName(std::string_view weight_name) {
  constexpr std::string_view kWeight = "weight";
  TP_CHECK(weight_name.ends_with(kWeight));
  return absl::StrCat(std::string(weight_name.substr(0, weight_name.size() - kWeight.size())), "bias");
}

std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec, const TensorPrefix& prefix) {
  const Architecture& a = *spec.architecture;
  const int64_t vocab = spec.vocab, hidden = spec.hidden;
  std::vector<TensorSpec> out;
  out.push_back({TensorName(prefix, a.embedding), {vocab, hidden}, TensorKind::kEmbedding});
  Lister lister(spec, prefix, out);
  for (uint32_t l = 0; l < spec.layers; ++l) lister.Layer(l);
  out.push_back({TensorName(prefix, a.final_norm), {hidden}, TensorKind::kNorm});
  if (!spec.tie_embeddings) {
    out.push_back({absl::StrCat(std::string(prefix.head), std::string(a.lm_head)),
                   {vocab, hidden},
                   TensorKind::kMatrix});
  }
  return out;
}

std::vector<TensorSpec> ExpectedTensors(const ModelSpec& spec) {
  return ExpectedTensors(spec, spec.architecture->prefixes.front());
}

ParameterCounts CountParameters(const ModelSpec& spec) {
  ParameterCounts out;
  for (const TensorSpec& t : ExpectedTensors(spec)) out.total += static_cast<uint64_t>(t.elements());
  out.active = out.total;
  for (const LayerSpec& l : spec.layer_specs) {
    if (l.experts > 0)
      out.active -= uint64_t{l.experts - l.experts_per_token} * 3 * l.intermediate * spec.hidden;
  }
  return out;
}

}  // namespace tidepool
