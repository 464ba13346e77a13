#include "server/model/weights.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/status.h"

namespace tidepool {
namespace {

std::string LayerName(std::string_view pattern, uint32_t layer) {
  return absl::StrReplaceAll(std::string(pattern), {{"{}", std::to_string(layer)}});
}

std::array<std::string_view, 7> MatrixPatterns(const Architecture& a) {
  return {a.q, a.k, a.v, a.o, a.gate, a.up, a.down};
}

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

  // Packs what was staged, [n, k] in all.
  absl::StatusOr<Linear> Pack(int64_t n, int64_t k) {
    const void* w = dtype_ == DType::kBF16 ? static_cast<const void*>(b16_.data()) : f32_.data();
    TP_ASSIGN_OR_RETURN(Linear out, Linear::Create(dtype_, n, k, w));
    b16_.clear();
    f32_.clear();
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
};

absl::StatusOr<LayerWeights> LoadLayer(Loader& loader, const ModelSpec& spec, uint32_t layer) {
  const Architecture& a = *spec.architecture;
  auto name = [&](std::string_view pattern) { return LayerName(pattern, layer); };
  const int64_t hidden = spec.hidden, inter = spec.intermediate;
  const int64_t q = int64_t{spec.heads} * spec.head_dim, kv = int64_t{spec.kv_heads} * spec.head_dim;

  TP_ASSIGN_OR_RETURN(auto attention_norm, loader.Vector(name(a.attention_norm), hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.q), q, hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.k), kv, hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.v), kv, hidden));
  TP_ASSIGN_OR_RETURN(Linear qkv, loader.Pack(q + 2 * kv, hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.o), hidden, q));
  TP_ASSIGN_OR_RETURN(Linear o, loader.Pack(hidden, q));
  TP_ASSIGN_OR_RETURN(auto mlp_norm, loader.Vector(name(a.mlp_norm), hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.gate), inter, hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.up), inter, hidden));
  TP_ASSIGN_OR_RETURN(Linear gate_up, loader.Pack(2 * inter, hidden));
  TP_RETURN_IF_ERROR(loader.Stage(name(a.down), hidden, inter));
  TP_ASSIGN_OR_RETURN(Linear down, loader.Pack(hidden, inter));
  return LayerWeights{.attention_norm = std::move(attention_norm),
                      .qkv = std::move(qkv),
                      .o = std::move(o),
                      .mlp_norm = std::move(mlp_norm),
                      .gate_up = std::move(gate_up),
                      .down = std::move(down)};
}

}  // namespace

uint64_t Weights::bytes() const {
  uint64_t sum = embedding_b16.size() * 2 + embedding_f32.size() * 4 + final_norm.size() * 4;
  for (const LayerWeights& l : layers) {
    sum += (l.attention_norm.size() + l.mlp_norm.size()) * 4;
    for (const Linear* m : {&l.qkv, &l.o, &l.gate_up, &l.down})
      sum += static_cast<uint64_t>(m->packed_bytes());
  }
  for (const Linear& m : lm_head) sum += static_cast<uint64_t>(m.packed_bytes());
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
  std::vector<std::string> names = {std::string(spec.architecture->embedding)};
  if (!spec.tie_embeddings) names.emplace_back(spec.architecture->lm_head);
  for (uint32_t l = 0; l < spec.layers; ++l) {
    for (std::string_view p : MatrixPatterns(*spec.architecture)) names.push_back(LayerName(p, l));
  }
  for (const std::string& name : names) {
    TP_ASSIGN_OR_RETURN(const TensorView* t, checkpoint.Find(name));
    if (t->dtype_name != "BF16") return DType::kF32;
  }
  return DType::kBF16;
}

absl::StatusOr<Weights> LoadWeights(const Checkpoint& checkpoint, const ModelSpec& spec, DType dtype,
                                    const LoadProgress& progress) {
  TP_CHECK(dtype == DType::kBF16 || dtype == DType::kF32);
  const Architecture& a = *spec.architecture;
  Loader loader(checkpoint, dtype, progress);
  Weights out;
  out.dtype = dtype;

  TP_RETURN_IF_ERROR(loader.Stage(std::string(a.embedding), spec.vocab, spec.hidden));
  loader.TakeStaged(out);
  if (spec.tie_embeddings) {
    TP_ASSIGN_OR_RETURN(Linear head, Linear::Create(dtype, spec.vocab, spec.hidden, out.embedding()));
    out.lm_head.push_back(std::move(head));
  } else {
    TP_RETURN_IF_ERROR(loader.Stage(std::string(a.lm_head), spec.vocab, spec.hidden));
    TP_ASSIGN_OR_RETURN(Linear head, loader.Pack(spec.vocab, spec.hidden));
    out.lm_head.push_back(std::move(head));
  }
  out.layers.reserve(spec.layers);
  for (uint32_t l = 0; l < spec.layers; ++l) {
    TP_ASSIGN_OR_RETURN(LayerWeights layer, LoadLayer(loader, spec, l));
    out.layers.push_back(std::move(layer));
  }
  TP_ASSIGN_OR_RETURN(out.final_norm, loader.Vector(std::string(a.final_norm), spec.hidden));
  loader.Finish();
  return out;
}

}  // namespace tidepool
