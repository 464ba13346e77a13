#include "server/model/weights.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/model/tensor_list.h"

namespace tidepool {
namespace {

// The file's data need not be aligned: elements are copied out.
template <typename T>
T LoadAt(const std::byte* p, size_t i) {
  T v;
  std::memcpy(&v, p + i * sizeof(T), sizeof(T));
  return v;
}

void AppendF32(DType from, const TensorView& t, std::vector<float>& out) {
  const size_t n = t.data.size() / DTypeBytes(from);
  const std::byte* p = t.data.data();
  const size_t base = out.size();
  out.resize(base + n);
  switch (from) {
    case DType::kF32:
      if (n > 0) std::memcpy(out.data() + base, p, n * sizeof(float));
      break;
    case DType::kBF16:
      for (size_t i = 0; i < n; ++i) out[base + i] = ToFloat(BF16{LoadAt<uint16_t>(p, i)});
      break;
    case DType::kF16:
      for (size_t i = 0; i < n; ++i) out[base + i] = HalfToFloat(LoadAt<uint16_t>(p, i));
      break;
  }
}

void AppendBF16(DType from, const TensorView& t, std::vector<uint16_t>& out) {
  const size_t n = t.data.size() / DTypeBytes(from);
  const std::byte* p = t.data.data();
  const size_t base = out.size();
  out.resize(base + n);
  switch (from) {
    case DType::kF32:
      for (size_t i = 0; i < n; ++i) out[base + i] = ToBF16(LoadAt<float>(p, i)).bits;
      break;
    case DType::kBF16:
      if (n > 0) std::memcpy(out.data() + base, p, n * sizeof(uint16_t));
      break;
    case DType::kF16:
      for (size_t i = 0; i < n; ++i) out[base + i] = ToBF16(HalfToFloat(LoadAt<uint16_t>(p, i))).bits;
      break;
  }
}

// Reads the tensors of one model in turn, and keeps count.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, DType dtype, const LoadProgress& progress)
      : checkpoint_(checkpoint), dtype_(dtype), progress_(progress) {
    for (const auto& [name, t] : checkpoint.tensors()) total_ += t.data.size();
  }

  absl::StatusOr<std::vector<float>> Vector(const std::string& name, int64_t n) {
    const int64_t shape[] = {n};
    TP_ASSIGN_OR_RETURN(const TensorView* t, checkpoint_.Get(name, shape));
    TP_ASSIGN_OR_RETURN(const DType from, Annotated(t->dtype(), name));
    std::vector<float> out;
    AppendF32(from, *t, out);
    Count(*t);
    return out;
  }

  // Appends [n, k] to a staging buffer of the compute dtype.
  absl::Status Stage(const std::string& name, int64_t n, int64_t k) {
    const int64_t shape[] = {n, k};
    TP_ASSIGN_OR_RETURN(const TensorView* t, checkpoint_.Get(name, shape));
    TP_ASSIGN_OR_RETURN(const DType from, Annotated(t->dtype(), name));
    if (dtype_ == DType::kBF16) {
      AppendBF16(from, *t, b16_);
    } else {
      AppendF32(from, *t, f32_);
    }
    Count(*t);
    return absl::OkStatus();
  }

  // Appends [n] to a staging buffer.
  absl::Status StageBias(const std::string& name, int64_t n) {
    TP_ASSIGN_OR_RETURN(const std::vector<float> bias, Vector(name, n));
    bias_.insert(bias_.end(), bias.begin(), bias.end());
    return absl::OkStatus();
  }

  // Packs what was staged, [n, k] in all.
  absl::StatusOr<Linear> Pack(int64_t n, int64_t k) {
    const void* w = dtype_ == DType::kBF16 ? static_cast<const void*>(b16_.data()) : f32_.data();
    TP_ASSIGN_OR_RETURN(Linear out, Linear::Create(dtype_, n, k, w, bias_.empty() ? nullptr : bias_.data()));
    b16_.clear();
    f32_.clear();
    bias_.clear();
    return out;
  }

  void TakeStaged(Weights& w) {
    w.embedding_b16 = std::move(b16_);
    w.embedding_f32 = std::move(f32_);
    b16_.clear();
    f32_.clear();
  }

  void Finish() {
    if (progress_) progress_(total_, total_);
  }

 private:
  static absl::StatusOr<DType> Annotated(absl::StatusOr<DType> d, const std::string& name) {
    if (!d.ok()) return Annotate(d.status(), absl::StrCat("tensor \"", name, "\""));
    return d;
  }
  void Count(const TensorView& t) {
    done_ += t.data.size();
    if (progress_ && done_ < total_) progress_(done_, total_);
  }

  const Checkpoint& checkpoint_;
  const DType dtype_;
  const LoadProgress& progress_;
  uint64_t done_ = 0, total_ = 0;
  std::vector<uint16_t> b16_;
  std::vector<float> f32_;
  std::vector<float> bias_;
};

// Reads the layers of one model.
class LayerLoader {
 public:
  LayerLoader(Loader& loader, const ModelSpec& spec, const TensorPrefix& prefix)
      : loader_(loader), spec_(spec), a_(*spec.architecture), prefix_(prefix) {}

  absl::StatusOr<LayerWeights> Load(uint32_t layer) {
    layer_ = layer;
    const LayerSpec& l = spec_.layer_specs[layer];
    const int64_t hidden = spec_.hidden;
    const int64_t q = int64_t{spec_.heads} * spec_.head_dim, kv = int64_t{spec_.kv_heads} * spec_.head_dim;
    TP_ASSIGN_OR_RETURN(auto attention_norm, Norm(a_.attention_norm, hidden));
    TP_RETURN_IF_ERROR(Stage(a_.q, q, hidden, spec_.qkv_bias));
    TP_RETURN_IF_ERROR(Stage(a_.k, kv, hidden, spec_.qkv_bias));
    TP_RETURN_IF_ERROR(Stage(a_.v, kv, hidden, spec_.qkv_bias));
    TP_RETURN_IF_ERROR(Stage(a_.fused_qkv, q + 2 * kv, hidden, spec_.qkv_bias));
    TP_ASSIGN_OR_RETURN(Linear qkv, loader_.Pack(q + 2 * kv, hidden));
    TP_ASSIGN_OR_RETURN(auto q_norm, Norm(a_.q_norm, spec_.head_dim));
    TP_ASSIGN_OR_RETURN(auto k_norm, Norm(a_.k_norm, spec_.head_dim));
    TP_RETURN_IF_ERROR(Stage(a_.o, hidden, q, spec_.o_bias));
    TP_ASSIGN_OR_RETURN(Linear o, loader_.Pack(hidden, q));
    TP_ASSIGN_OR_RETURN(auto post_attention_norm, Norm(a_.post_attention_norm, hidden));
    TP_ASSIGN_OR_RETURN(auto mlp_norm, Norm(a_.mlp_norm, hidden));
    std::optional<Linear> router;
    std::vector<MlpWeights> mlps;
    if (l.experts > 0) {
      TP_RETURN_IF_ERROR(Stage(a_.router, l.experts, hidden, false));
      TP_ASSIGN_OR_RETURN(router, loader_.Pack(l.experts, hidden));
      mlps.reserve(l.experts);
      for (expert_ = 0; expert_ < l.experts; ++expert_) {
        TP_ASSIGN_OR_RETURN(MlpWeights mlp,
                            Mlp(a_.expert_gate, a_.expert_up, "", a_.expert_down, l.intermediate, false));
        mlps.push_back(std::move(mlp));
      }
    } else {
      TP_ASSIGN_OR_RETURN(MlpWeights mlp,
                          Mlp(a_.gate, a_.up, a_.fused_gate_up, a_.down, l.intermediate, spec_.mlp_bias));
      mlps.push_back(std::move(mlp));
    }
    TP_ASSIGN_OR_RETURN(auto post_mlp_norm, Norm(a_.post_mlp_norm, hidden));
    return LayerWeights{.attention_norm = std::move(attention_norm),
                        .qkv = std::move(qkv),
                        .q_norm = std::move(q_norm),
                        .k_norm = std::move(k_norm),
                        .o = std::move(o),
                        .post_attention_norm = std::move(post_attention_norm),
                        .mlp_norm = std::move(mlp_norm),
                        .router = std::move(router),
                        .mlps = std::move(mlps),
                        .post_mlp_norm = std::move(post_mlp_norm)};
  }

  // An RMSNorm's factors; empty where the pattern is.
  absl::StatusOr<std::vector<float>> Norm(std::string_view pattern, int64_t n) {
    if (pattern.empty()) return std::vector<float>();
    TP_ASSIGN_OR_RETURN(std::vector<float> out, loader_.Vector(TensorName(prefix_, pattern, layer_), n));
    if (a_.norm_plus_one) {
      for (float& v : out) v += 1.0f;
    }
    return out;
  }

 private:
  absl::Status Stage(std::string_view pattern, int64_t n, int64_t k, bool bias) {
    if (pattern.empty()) return absl::OkStatus();
    const std::string name = TensorName(prefix_, pattern, layer_, expert_);
    TP_RETURN_IF_ERROR(loader_.Stage(name, n, k));
    return bias ? loader_.StageBias(BiasName(name), n) : absl::OkStatus();
  }

  absl::StatusOr<MlpWeights> Mlp(std::string_view gate, std::string_view up, std::string_view fused,
                                 std::string_view down_name, int64_t inter, bool bias) {
    const int64_t hidden = spec_.hidden;
    TP_RETURN_IF_ERROR(Stage(gate, inter, hidden, bias));
    TP_RETURN_IF_ERROR(Stage(up, inter, hidden, bias));
    TP_RETURN_IF_ERROR(Stage(fused, 2 * inter, hidden, bias));
    TP_ASSIGN_OR_RETURN(Linear gate_up, loader_.Pack(2 * inter, hidden));
    TP_RETURN_IF_ERROR(Stage(down_name, hidden, inter, bias));
    TP_ASSIGN_OR_RETURN(Linear down, loader_.Pack(hidden, inter));
    return MlpWeights{std::move(gate_up), std::move(down)};
  }

  Loader& loader_;
  const ModelSpec& spec_;
  const Architecture& a_;
  const TensorPrefix& prefix_;
  uint32_t layer_ = 0, expert_ = 0;
};

// The prefix under which this checkpoint has its embedding; the first where none has.
const TensorPrefix& PrefixOf(const Checkpoint& checkpoint, const Architecture& a) {
  for (const TensorPrefix& p : a.prefixes) {
    if (checkpoint.tensors().contains(TensorName(p, a.embedding))) return p;
  }
  return a.prefixes.front();
}

std::string HeadName(const Architecture& a, const TensorPrefix& prefix) {
  return absl::StrCat(std::string(prefix.head), std::string(a.lm_head));
}

// A tied head that the checkpoint holds too, and with other values.
bool HasOwnHead(const Checkpoint& checkpoint, const Architecture& a, const TensorPrefix& prefix) {
  const auto head = checkpoint.tensors().find(HeadName(a, prefix));
  const auto embedding = checkpoint.tensors().find(TensorName(prefix, a.embedding));
  if (head == checkpoint.tensors().end() || embedding == checkpoint.tensors().end()) return false;
  return head->second.dtype_name != embedding->second.dtype_name ||
         !std::ranges::equal(head->second.data, embedding->second.data);
}

// Every expected tensor is there in its shape, and nothing of the decoder is there beside them.
absl::Status CheckTensors(const Checkpoint& checkpoint, const ModelSpec& spec, const TensorPrefix& prefix) {
  std::set<std::string, std::less<>> expected;
  for (TensorSpec& t : ExpectedTensors(spec, prefix)) {
    TP_ASSIGN_OR_RETURN(const TensorView* view, checkpoint.Get(t.name, t.shape));
    if (const auto dtype = view->dtype(); !dtype.ok()) {
      return Annotate(dtype.status(), absl::StrCat("tensor \"", t.name, "\""));
    }
    expected.insert(std::move(t.name));
  }
  const std::string head = HeadName(*spec.architecture, prefix);
  const std::string head_module = head.substr(0, head.size() - std::string_view("weight").size());
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    const bool ours = name.starts_with(prefix.body) || name.starts_with(head_module);
    if (!ours || expected.contains(name) || name == head || absl::StrContains(name, "rotary_emb.")) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(tensor.file), ": tensor \"", name, "\" is not part of the ",
                     std::string(spec.architecture->name),
                     " that config.json describes; computing without it would change the output"));
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t Weights::bytes() const {
  uint64_t sum = embedding_b16.size() * 2 + embedding_f32.size() * 4 + final_norm.size() * 4;
  const auto add = [&](const Linear& m) { sum += static_cast<uint64_t>(m.packed_bytes()); };
  for (const LayerWeights& l : layers) {
    for (const auto* norm :
         {&l.attention_norm, &l.q_norm, &l.k_norm, &l.post_attention_norm, &l.mlp_norm, &l.post_mlp_norm}) {
      sum += norm->size() * 4;
    }
    add(l.qkv);
    add(l.o);
    if (l.router) add(*l.router);
    for (const MlpWeights& m : l.mlps) {
      add(m.gate_up);
      add(m.down);
    }
  }
  for (const Linear& m : lm_head) add(m);
  return sum;
}

absl::StatusOr<DType> ComputeDType(std::string_view config_dtype, const ModelSpec& spec,
                                   const Checkpoint& checkpoint) {
  if (config_dtype == "bfloat16") return DType::kBF16;
  if (config_dtype == "float32") return DType::kF32;
  if (config_dtype != "auto") {
    return absl::InvalidArgumentError(absl::StrCat("model.dtype is \"", std::string(config_dtype),
                                                   "\"; it must be auto, bfloat16 or float32"));
  }
  for (const TensorSpec& t : ExpectedTensors(spec, PrefixOf(checkpoint, *spec.architecture))) {
    if (t.kind != TensorKind::kEmbedding && t.kind != TensorKind::kMatrix) continue;
    TP_ASSIGN_OR_RETURN(const TensorView* view, checkpoint.Find(t.name));
    if (view->dtype_name != "BF16") return DType::kF32;
  }
  return DType::kBF16;
}

absl::Status CheckTensors(const Checkpoint& checkpoint, const ModelSpec& spec) {
  return CheckTensors(checkpoint, spec, PrefixOf(checkpoint, *spec.architecture));
}

absl::StatusOr<Weights> LoadWeights(const Checkpoint& checkpoint, const ModelSpec& spec, DType dtype,
                                    const LoadProgress& progress) {
  TP_CHECK(dtype == DType::kBF16 || dtype == DType::kF32);
  const Architecture& a = *spec.architecture;
  const TensorPrefix& prefix = PrefixOf(checkpoint, a);
  TP_RETURN_IF_ERROR(CheckTensors(checkpoint, spec, prefix));
  Loader loader(checkpoint, dtype, progress);
  LayerLoader layers(loader, spec, prefix);
  Weights out;
  out.dtype = dtype;

  TP_RETURN_IF_ERROR(loader.Stage(TensorName(prefix, a.embedding), spec.vocab, spec.hidden));
  loader.TakeStaged(out);
  if (spec.tie_embeddings && !HasOwnHead(checkpoint, a, prefix)) {
    TP_ASSIGN_OR_RETURN(Linear head, Linear::Create(dtype, spec.vocab, spec.hidden, out.embedding()));
    out.lm_head.push_back(std::move(head));
  } else {
    TP_RETURN_IF_ERROR(loader.Stage(HeadName(a, prefix), spec.vocab, spec.hidden));
    TP_ASSIGN_OR_RETURN(Linear head, loader.Pack(spec.vocab, spec.hidden));
    out.lm_head.push_back(std::move(head));
  }
  out.layers.reserve(spec.layers);
  for (uint32_t l = 0; l < spec.layers; ++l) {
    TP_ASSIGN_OR_RETURN(LayerWeights layer, layers.Load(l));
    out.layers.push_back(std::move(layer));
  }
  TP_ASSIGN_OR_RETURN(out.final_norm, layers.Norm(a.final_norm, spec.hidden));
  loader.Finish();
  return out;
}

}  // namespace tidepool
