#include "server/model/synthesize.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/digest.h"
#include "base/rng.h"
#include "base/status.h"
#include "server/model/model_config.h"
#include "server/model/synthesis_tokenizer.h"
#include "server/model/tensor_list.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr uint64_t kChunkBytes = 4 << 20;     // what a thread draws and writes at a time
constexpr uint64_t kSpareBytes = 256u << 20;  // to leave free on the disk, the tokenizer included

std::string Gigabytes(uint64_t bytes) { return absl::StrFormat("%.2f GB", static_cast<double>(bytes) / 1e9); }

absl::Status Errno(std::string_view what, const std::string& path, int error) {
  const std::string message =
      absl::StrCat(path, " cannot be ", std::string(what), ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT ? absl::ResourceExhaustedError(message)
                                            : absl::UnavailableError(message);
}

absl::Status WriteText(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  return out ? absl::OkStatus() : Errno("written", path.string(), errno);
}

// --- shapes ---

absl::StatusOr<ModelSpec> Check(const ordered_json& config) {
  return ParseModelSpec(config.dump(), "", "the model to synthesize");
}

// Number `field` of the config, or `fallback`.
uint32_t Number(const ordered_json& config, const char* field, uint32_t fallback) {
  const auto it = config.find(field);
  return it != config.end() && it->is_number_unsigned() ? it->get<uint32_t>() : fallback;
}

// A config whose hidden size is another one, with what goes with it.
void ScaleHidden(ordered_json& config, uint32_t hidden, const ShapeChanges& changes) {
  const uint32_t old = std::max(1u, Number(config, "hidden_size", hidden));
  const auto scaled = [&](uint32_t n, uint32_t multiple) {
    const uint64_t product = uint64_t{n} * hidden / old;
    return static_cast<uint32_t>(
        std::max<uint64_t>(multiple, (product + multiple / 2) / multiple * multiple));
  };
  config["hidden_size"] = hidden;
  const uint32_t old_heads = Number(config, "num_attention_heads", 1);
  const uint32_t heads = changes.heads.value_or(scaled(old_heads, 1));
  config["num_attention_heads"] = heads;
  uint32_t kv_heads =
      std::min(heads, changes.kv_heads.value_or(Number(config, "num_key_value_heads", old_heads)));
  // A config that gives 0 of them is refused later.
  while (!changes.kv_heads && kv_heads > 1 && heads % kv_heads != 0) --kv_heads;
  config["num_key_value_heads"] = kv_heads;
  if (!changes.head_dim) {
    const uint32_t head_dim = Number(config, "head_dim", old / std::max(1u, old_heads));
    config["head_dim"] = std::max(2u, std::min(head_dim, hidden) / 2 * 2);
  }
  for (const char* field : {"intermediate_size", "moe_intermediate_size"}) {
    if (config.contains(field)) config[field] = scaled(Number(config, field, 0), hidden < 512 ? 8 : 64);
  }
}

// The layers that bring the parameters nearest to `wanted`.
absl::Status FitLayers(ordered_json& config, uint64_t wanted) {
  const auto count = [&](uint32_t layers) -> absl::StatusOr<uint64_t> {
    config["num_hidden_layers"] = layers;
    TP_ASSIGN_OR_RETURN(const ModelSpec spec, Check(config));
    return CountParameters(spec).total;
  };
  TP_ASSIGN_OR_RETURN(const uint64_t one, count(1));
  TP_ASSIGN_OR_RETURN(const uint64_t two, count(2));
  const uint64_t layer = two - one, rest = one - layer;
  const uint64_t layers = wanted <= rest ? 1 : std::max<uint64_t>(1, (wanted - rest + layer / 2) / layer);
  const double got = static_cast<double>(rest + layers * layer);
  if (layers > 1024 || got > 1.25 * static_cast<double>(wanted)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "size: %.3g parameters cannot be met with this shape, whose embeddings have %.3g and each "
        "layer %.3g (1 to 1024 layers); choose another shape, or hidden, vocab and layers",
        static_cast<double>(wanted), static_cast<double>(rest), static_cast<double>(layer)));
  }
  config["num_hidden_layers"] = layers;
  return absl::OkStatus();
}

// --- weights ---

// Normal numbers by table: entry i is the (i + 0.5) / 65536 quantile. 16 random bits make one number.
struct Normals {
  std::vector<float> quantiles;
  Normals() : quantiles(65536) {
    // Source: Acklam's rational approximation of the normal quantile; relative error below 1.2e-9.
    const auto tail = [](double p) {
      const double q = std::sqrt(-2 * std::log(p));
      return (((((-7.784894002430293e-03 * q - 3.223964580411365e-01) * q - 2.400758277161838e+00) * q -
                2.549732539343734e+00) *
                   q +
               4.374664141464968e+00) *
                  q +
              2.938163982698783e+00) /
             ((((7.784695709041462e-03 * q + 3.224671290700398e-01) * q + 2.445134137142996e+00) * q +
               3.754408661907416e+00) *
                  q +
              1);
    };
    for (size_t i = 0; i < quantiles.size(); ++i) {
      const double p = (static_cast<double>(i) + 0.5) / 65536;
      if (p < 0.02425) {
        quantiles[i] = static_cast<float>(tail(p));
      } else if (p > 1 - 0.02425) {
        quantiles[i] = static_cast<float>(-tail(1 - p));
      } else {
        const double q = p - 0.5, r = q * q;
        quantiles[i] = static_cast<float>(
            (((((-3.969683028665376e+01 * r + 2.209460984245205e+02) * r - 2.759285104469687e+02) * r +
               1.383577518672690e+02) *
                  r -
              3.066479806614716e+01) *
                 r +
             2.506628277459239e+00) *
            q /
            (((((-5.447609879822406e+01 * r + 1.615858368580409e+02) * r - 1.556989798598866e+02) * r +
               6.680131188771972e+01) *
                  r -
              1.328068155288572e+01) *
                 r +
             1));
      }
    }
  }
};

// How one tensor is drawn: mean + deviation * normal.
struct Distribution {
  float mean = 0, deviation = 0;
  bool operator==(const Distribution&) const = default;
};

Distribution DistributionOf(const ModelSpec& spec, const TensorSpec& tensor) {
  switch (tensor.kind) {
    case TensorKind::kNorm:
      return {spec.architecture->norm_plus_one ? 0.0f : 1.0f, 0.05f};
    case TensorKind::kBias:
    case TensorKind::kEmbedding:
      return {0, 0.02f};
    case TensorKind::kMatrix:
      break;
  }
  auto deviation = static_cast<float>(0.8 / std::sqrt(static_cast<double>(tensor.shape[1])));
  // What ends a block is added to the residual 2 * layers times.
  const auto ends = [&](std::string_view pattern) {
    if (pattern.empty()) return false;
    const size_t at = pattern.rfind(pattern.find("[]") != pattern.npos ? "[]" : "{}");
    return tensor.name.ends_with(pattern.substr(at + 2));
  };
  const Architecture& a = *spec.architecture;
  if (ends(a.o) || ends(a.down) || ends(a.expert_down)) {
    deviation /= std::sqrt(2.0f * static_cast<float>(spec.layers));
  }
  return {0, deviation};
}

uint16_t ToHalf(float f) {
  // Round to nearest even; our numbers are neither huge nor NaN.
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(f);
  if (magnitude < 0x1.0p-14f)
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1.0p24f)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// Every value that a tensor of this distribution may hold, by 16 random bits.
template <typename T>
std::vector<T> Values(const Normals& normals, Distribution d, DType dtype) {
  std::vector<T> values(normals.quantiles.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const float f = d.mean + d.deviation * normals.quantiles[i];
    if constexpr (sizeof(T) == 4) {
      values[i] = std::bit_cast<T>(f);
    } else {
      values[i] = dtype == DType::kBF16 ? ToBF16(f).bits : ToHalf(f);
    }
  }
  return values;
}

// Elements [first, first + n) of the stream `key`; first is a multiple of 4. One 64-bit draw gives four.
template <typename T>
void Draw(uint64_t key, uint64_t first, const T* values, size_t n, T* out) {
  uint64_t counter = key + first / 4;
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const uint64_t bits = Mix64(counter++);
    out[i] = values[bits & 0xffff];
    out[i + 1] = values[(bits >> 16) & 0xffff];
    out[i + 2] = values[(bits >> 32) & 0xffff];
    out[i + 3] = values[bits >> 48];
  }
  for (uint64_t bits = Mix64(counter); i < n; ++i, bits >>= 16) out[i] = values[bits & 0xffff];
}

// A tensor's place in a file.
struct Placed {
  const TensorSpec* tensor;
  size_t shard;
  uint64_t offset;  // in the shard's file
  uint64_t elements;
  size_t table;  // its values
  uint64_t key;
};

// One file of the checkpoint.
struct Shard {
  std::string name;
  std::string header;
  uint64_t data_bytes = 0;
  int fd = -1;
};

const char* DTypeTag(DType dtype) {
  return dtype == DType::kBF16 ? "BF16" : dtype == DType::kF16 ? "F16" : "F32";
}

class Writer {
 public:
  Writer(const ModelSpec& spec, const SynthesisOptions& options)
      : spec_(spec),
        options_(options),
        tensors_(ExpectedTensors(spec)),
        element_bytes_(DTypeBytes(options.dtype)) {
    for (const TensorSpec& tensor : tensors_) total_ += Bytes(tensor);
    Plan();
  }
  ~Writer() {
    for (Shard& shard : shards_) {
      if (shard.fd >= 0) ::close(shard.fd);
    }
  }

  uint64_t total_bytes() const { return total_; }
  uint32_t shards() const { return static_cast<uint32_t>(shards_.size()); }

  absl::Status Write(const fs::path& dir) {
    for (Shard& shard : shards_) {
      const std::string path = (dir / shard.name).string();
      shard.fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
      if (shard.fd < 0) return Errno("created", path, errno);
      TP_RETURN_IF_ERROR(WriteAt(shard, 0, shard.header.data(), shard.header.size()));
    }
    if (shards_.size() > 1)
      TP_RETURN_IF_ERROR(WriteText(dir / "model.safetensors.index.json", Index().dump(1)));
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    const unsigned threads = options_.threads > 0 ? options_.threads : std::min(8u, cores);
    {
      std::vector<std::jthread> workers;
      for (unsigned i = 1; i < threads; ++i) workers.emplace_back([this] { Work(); });
      Work();
    }
    for (Shard& shard : shards_) {
      // close() reports what the disk refused late.
      const int fd = std::exchange(shard.fd, -1);
      if (::close(fd) != 0 && status_.ok()) status_ = Errno("written", shard.name, errno);
    }
    return status_;
  }

 private:
  uint64_t Bytes(const TensorSpec& tensor) const {
    return static_cast<uint64_t>(tensor.elements()) * element_bytes_;
  }

  // Places the tensors, in their order, into shards of at most shard_bytes_max (a larger tensor alone).
  void Plan() {
    std::vector<std::vector<const TensorSpec*>> groups(1);
    uint64_t bytes = 0;
    for (const TensorSpec& tensor : tensors_) {
      if (bytes > 0 && bytes + Bytes(tensor) > options_.shard_bytes_max) {
        groups.emplace_back();
        bytes = 0;
      }
      groups.back().push_back(&tensor);
      bytes += Bytes(tensor);
    }
    const Normals normals;
    for (size_t g = 0; g < groups.size(); ++g) {
      Shard shard;
      shard.name = groups.size() == 1
                       ? std::string("model.safetensors")
                       : absl::StrFormat("model-%05d-of-%05d.safetensors", g + 1, groups.size());
      ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
      auto& entries = header.get_ref<ordered_json::object_t&>();
      const size_t first = placed_.size();
      for (const TensorSpec* tensor : groups[g]) {
        const uint64_t end = shard.data_bytes + Bytes(*tensor);
        entries.emplace_back(tensor->name, ordered_json{{"dtype", DTypeTag(options_.dtype)},
                                                        {"shape", tensor->shape},
                                                        {"data_offsets", {shard.data_bytes, end}}});
        placed_.push_back({tensor, g, shard.data_bytes, static_cast<uint64_t>(tensor->elements()),
                           Table(normals, DistributionOf(spec_, *tensor)), Key(tensor->name)});
        shard.data_bytes = end;
      }
      std::string text = header.dump();
      text.append((8 - text.size() % 8) % 8, ' ');
      const uint64_t length = text.size();
      shard.header.assign(reinterpret_cast<const char*>(&length), sizeof length);  // x86: little-endian
      shard.header += text;
      for (size_t i = first; i < placed_.size(); ++i) placed_[i].offset += shard.header.size();
      shards_.push_back(std::move(shard));
    }
    for (size_t i = 0; i < placed_.size(); ++i) {
      const uint64_t chunk = kChunkBytes / element_bytes_;
      for (uint64_t at = 0; at < placed_[i].elements; at += chunk) {
        chunks_.push_back({i, at, std::min(chunk, placed_[i].elements - at)});
      }
    }
  }

  size_t Table(const Normals& normals, Distribution d) {
    for (size_t i = 0; i < distributions_.size(); ++i) {
      if (distributions_[i] == d) return i;
    }
    distributions_.push_back(d);
    if (element_bytes_ == 4) {
      wide_.push_back(Values<uint32_t>(normals, d, options_.dtype));
    } else {
      narrow_.push_back(Values<uint16_t>(normals, d, options_.dtype));
    }
    return distributions_.size() - 1;
  }

  // Where a tensor's numbers begin in the sequence of draws: by its name, so that nothing else moves them.
  uint64_t Key(const std::string& name) const {
    const Sha256Digest digest = Sha256().UpdateField(name).UpdateU64(options_.seed).Finish();
    uint64_t key = 0;
    for (size_t i = 0; i < 8; ++i) key = key << 8 | digest[i];
    return key;
  }

  ordered_json Index() const {
    ordered_json map = ordered_json::object();
    auto& entries = map.get_ref<ordered_json::object_t&>();
    for (const Placed& p : placed_) entries.emplace_back(p.tensor->name, shards_[p.shard].name);
    return {{"metadata", {{"total_size", total_}}}, {"weight_map", std::move(map)}};
  }

  void Work() {
    std::vector<uint32_t> buffer(kChunkBytes / sizeof(uint32_t));
    while (!failed_) {
      const size_t i = next_.fetch_add(1);
      if (i >= chunks_.size()) return;
      if (options_.stop && options_.stop()) return Fail(absl::CancelledError("interrupted"));
      const Chunk& chunk = chunks_[i];
      const Placed& p = placed_[chunk.placed];
      if (element_bytes_ == 4) {
        Draw(p.key, chunk.first, wide_[p.table].data(), chunk.elements, buffer.data());
      } else {
        Draw(p.key, chunk.first, narrow_[p.table].data(), chunk.elements,
             reinterpret_cast<uint16_t*>(buffer.data()));
      }
      const uint64_t bytes = chunk.elements * element_bytes_;
      const absl::Status status = WriteAt(shards_[p.shard], p.offset + chunk.first * element_bytes_,
                                          reinterpret_cast<const char*>(buffer.data()), bytes);
      if (!status.ok()) return Fail(status);
      std::lock_guard lock(mu_);
      done_ += bytes;
      if (options_.progress) options_.progress(done_, total_);
    }
  }

  void Fail(absl::Status status) {
    std::lock_guard lock(mu_);
    if (status_.ok()) status_ = std::move(status);
    failed_ = true;
  }

  static absl::Status WriteAt(const Shard& shard, uint64_t offset, const char* data, uint64_t bytes) {
    while (bytes > 0) {
      const ssize_t n = ::pwrite(shard.fd, data, bytes, static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Errno("written", shard.name, errno);
      data += n;
      offset += static_cast<uint64_t>(n);
      bytes -= static_cast<uint64_t>(n);
    }
    return absl::OkStatus();
  }

  struct Chunk {
    size_t placed;
    uint64_t first, elements;
  };

  const ModelSpec& spec_;
  const SynthesisOptions& options_;
  const std::vector<TensorSpec> tensors_;
  const size_t element_bytes_;
  uint64_t total_ = 0;
  std::vector<Shard> shards_;
  std::vector<Placed> placed_;
  std::vector<Chunk> chunks_;
  std::vector<Distribution> distributions_;
  std::vector<std::vector<uint16_t>> narrow_;  // by distribution; for two-byte types
  std::vector<std::vector<uint32_t>> wide_;    // for float32

  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mu_;
  uint64_t done_ = 0;
  absl::Status status_;
};

// --- directory ---

// The directory while it is being written: removed unless Commit() moved it to its place.
class PartialDir {
 public:
  static absl::StatusOr<std::unique_ptr<PartialDir>> Make(const fs::path& target) {
    std::error_code error;
    if (fs::exists(target, error) && !(fs::is_directory(target, error) && fs::is_empty(target, error))) {
      return absl::AlreadyExistsError(
          absl::StrCat(target.string(), " is there already and not empty; choose another directory"));
    }
    auto partial = std::unique_ptr<PartialDir>(new PartialDir);
    partial->target_ = target;
    const fs::path path = target.string() + ".partial-" + std::to_string(::getpid());
    if (path.has_parent_path()) fs::create_directories(path.parent_path(), error);
    // Only one that was not there: what an earlier run left would end up in the checkpoint.
    if (!error && !fs::create_directory(path, error) && !error) {
      return absl::AlreadyExistsError(
          absl::StrCat(path.string(), " is there already, left by a run that was killed; remove it"));
    }
    if (error) {
      return absl::UnavailableError(absl::StrCat(path.string(), " cannot be created: ", error.message()));
    }
    partial->path_ = path;
    return partial;
  }
  ~PartialDir() {
    std::error_code error;
    if (!path_.empty()) fs::remove_all(path_, error);
  }

  const fs::path& path() const { return path_; }
  absl::Status Commit() {
    std::error_code error;
    fs::rename(path_, target_, error);  // over an empty directory, too
    if (error) {
      return absl::UnavailableError(absl::StrCat(target_.string(), " cannot be created: ", error.message()));
    }
    path_.clear();
    return absl::OkStatus();
  }

 private:
  PartialDir() = default;
  fs::path target_, path_;
};

absl::Status CheckRoom(const fs::path& dir, uint64_t bytes) {
  std::error_code error;
  const fs::space_info space = fs::space(dir, error);
  if (error) return absl::UnavailableError(absl::StrCat(dir.string(), ": ", error.message()));
  if (space.available >= bytes + kSpareBytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the weights take ", Gigabytes(bytes), ", but only ", Gigabytes(space.available), " are free at ",
      fs::absolute(dir).parent_path().string(), " (", Gigabytes(kSpareBytes), " are to stay free)"));
}

// Writes or copies the tokenizer; sets the config's ids to its.
absl::Status AddTokenizer(const SynthesisOptions& options, uint32_t vocab, const fs::path& dir,
                          ordered_json& config) {
  if (!options.tokenizer.empty()) {
    TP_ASSIGN_OR_RETURN(const auto tokenizer, Tokenizer::Load(options.tokenizer));
    if (static_cast<uint32_t>(tokenizer->vocab_size()) > vocab) {
      return absl::InvalidArgumentError(absl::StrCat("vocab_size is ", vocab, ", but the tokenizer in ",
                                                     options.tokenizer, " has ", tokenizer->vocab_size(),
                                                     " ids; give a vocabulary of at least that"));
    }
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                             "added_tokens.json", "chat_template.jinja"}) {
      std::error_code error;
      const fs::path from = fs::path(options.tokenizer) / name;
      if (!fs::exists(from, error)) continue;
      fs::copy_file(from, dir / name, error);
      if (error)
        return absl::UnavailableError(absl::StrCat(from.string(), " cannot be copied: ", error.message()));
    }
    if (const auto bos = tokenizer->bos_id()) config["bos_token_id"] = *bos;
    if (const auto eos = tokenizer->eos_id()) config["eos_token_id"] = *eos;
    return absl::OkStatus();
  }
  if (vocab < SynthesisTokenizer::kVocabMin) {
    return absl::InvalidArgumentError(absl::StrCat("vocab_size is ", vocab,
                                                   "; the byte-level tokenizer needs at least ",
                                                   SynthesisTokenizer::kVocabMin));
  }
  const SynthesisTokenizer made = MakeSynthesisTokenizer(vocab);
  config["bos_token_id"] = made.bos_id;
  config["eos_token_id"] = made.eos_id;
  TP_RETURN_IF_ERROR(WriteText(dir / "tokenizer.json", made.tokenizer.dump()));
  return WriteText(dir / "tokenizer_config.json", made.config.dump(2) + "\n");
}

}  // namespace

absl::StatusOr<ordered_json> SynthesisConfig(std::string_view like, const ShapeChanges& changes) {
  const SynthesisShape* found = nullptr;
  std::string names;
  for (const SynthesisShape& shape : SynthesisShapes()) {
    if (found == nullptr && shape.name == like) found = &shape;
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(shape.name));
  }
  // A family stands for its first shape.
  for (const Architecture& a : Architectures()) {
    if (found != nullptr || a.family != like) continue;
    const std::string quoted = absl::StrCat("\"", std::string(a.name), "\"");
    for (const SynthesisShape& shape : SynthesisShapes()) {
      if (found == nullptr && shape.config.find(quoted) != shape.config.npos) found = &shape;
    }
  }
  if (found == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("like: no shape is called '", std::string(like), "'; there are ", names));
  }
  return ChangeShape(ordered_json::parse(found->config), changes);
}

absl::StatusOr<ordered_json> ChangeShape(ordered_json config, const ShapeChanges& changes) {
  if (!config.is_object()) return absl::InvalidArgumentError("config: must be a JSON object");
  if (changes.layers && changes.parameters) {
    return absl::InvalidArgumentError("size and layers exclude each other; give one");
  }
  if (changes.hidden) ScaleHidden(config, *changes.hidden, changes);
  const auto set = [&](const char* field, const std::optional<uint32_t>& value) {
    if (value) config[field] = *value;
  };
  set("num_hidden_layers", changes.layers);
  set("num_attention_heads", changes.heads);
  set("num_key_value_heads", changes.kv_heads);
  set("head_dim", changes.head_dim);
  if (changes.intermediate) {
    config[config.contains("moe_intermediate_size") ? "moe_intermediate_size" : "intermediate_size"] =
        *changes.intermediate;
  }
  set("vocab_size", changes.vocab);
  set("max_position_embeddings", changes.max_positions);
  if (changes.experts) {
    const char* field = config.contains("num_local_experts") ? "num_local_experts" : "num_experts";
    if (!config.contains(field)) return absl::InvalidArgumentError("experts: the shape has none");
    config[field] = *changes.experts;
    config["num_experts_per_tok"] = std::min(*changes.experts, Number(config, "num_experts_per_tok", 1));
  }
  if (changes.parameters) TP_RETURN_IF_ERROR(FitLayers(config, *changes.parameters));
  TP_RETURN_IF_ERROR(Check(config).status());
  return config;
}

absl::StatusOr<SynthesisResult> Synthesize(ordered_json config, const SynthesisOptions& options) {
  config["torch_dtype"] = DTypeName(options.dtype);
  config.erase("dtype");
  TP_ASSIGN_OR_RETURN(const ModelSpec spec, Check(config));
  const fs::path target = fs::path(options.out).lexically_normal();
  const fs::path out = target.has_filename() ? target : target.parent_path();
  TP_ASSIGN_OR_RETURN(const auto dir, PartialDir::Make(out));
  Writer writer(spec, options);
  TP_RETURN_IF_ERROR(CheckRoom(dir->path(), writer.total_bytes()));
  TP_RETURN_IF_ERROR(AddTokenizer(options, spec.vocab, dir->path(), config));
  TP_RETURN_IF_ERROR(WriteText(dir->path() / "config.json", config.dump(2) + "\n"));
  ordered_json generation = {{"_from_model_config", true}};
  for (const char* field : {"bos_token_id", "eos_token_id"}) {
    if (config.contains(field)) generation[field] = config[field];
  }
  TP_RETURN_IF_ERROR(WriteText(dir->path() / "generation_config.json", generation.dump(2) + "\n"));
  TP_RETURN_IF_ERROR(writer.Write(dir->path()));
  TP_RETURN_IF_ERROR(dir->Commit());
  return SynthesisResult{.parameters = CountParameters(spec).total,
                         .weight_bytes = writer.total_bytes(),
                         .shards = writer.shards()};
}

}  // namespace tidepool
