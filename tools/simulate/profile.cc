#include "tools/simulate/profile.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/small_file.h"
#include "base/status.h"

namespace tidepool {

namespace {

constexpr uint64_t kProfileBytesMax = 1 << 20;

// Reader: takes the fields of one YAML map, checks each, and says at the end what it did not know.
class Reader {
 public:
  Reader(const YAML::Node& node, std::string file, std::string path)
      : node_(node), file_(std::move(file)), path_(std::move(path)) {
    if (!node.IsMap()) Fail("", "must be a map of fields");
  }

  void Number(const char* key, double scale, double min, double max, double& out) {
    const auto value = Scalar<double>(key);
    if (!value) return;
    if (!std::isfinite(*value) || *value < min || *value > max) {
      Fail(key, absl::StrCat("is ", *value, "; it must be from ", min, " to ", max));
      return;
    }
    out = *value * scale;
  }
  void Count(const char* key, uint32_t min, uint32_t max, uint32_t& out) {
    const auto value = Scalar<int64_t>(key);
    if (!value) return;
    if (*value < min || *value > max) {
      Fail(key, absl::StrCat("is ", *value, "; it must be a whole number from ", min, " to ", max));
      return;
    }
    out = static_cast<uint32_t>(*value);
  }
  void Text(const char* key, std::string& out) {
    if (const auto value = Scalar<std::string>(key)) out = *value;
  }
  Reader Section(const char* key) {
    known_.insert(key);
    Reader section(node_[key] ? node_[key] : YAML::Node(YAML::NodeType::Map), file_, path_ + key + ".");
    if (!node_[key]) section.Fail("", "is missing");
    return section;
  }

  // The first problem of this map, and of `sections`.
  absl::Status End(std::initializer_list<const Reader*> sections = {}) {
    for (const Reader* section : sections) {
      if (problem_.ok()) problem_ = section->problem_;
    }
    CheckKeys();
    return problem_;
  }
  void CheckKeys() {
    if (!node_.IsMap()) return;
    for (const auto& entry : node_) {
      const auto key = entry.first.as<std::string>("");
      if (!known_.contains(key)) Fail(key, "is no field of a profile; see config/profiles/README.md");
    }
  }

 private:
  template <typename T>
  std::optional<T> Scalar(const char* key) {
    known_.insert(key);
    if (!node_.IsMap() || !node_[key]) {
      Fail(key, "is missing");
      return std::nullopt;
    }
    try {
      return node_[key].as<T>();
    } catch (const YAML::Exception&) {
      Fail(key, "is not of its type; write a plain number or word");
      return std::nullopt;
    }
  }
  void Fail(std::string_view key, std::string_view what) {
    if (!problem_.ok()) return;
    std::string field = path_ + std::string(key);
    if (field.ends_with('.')) field.pop_back();
    problem_ = absl::InvalidArgumentError(
        absl::StrCat(file_, ": ", field, field.empty() ? "" : " ", std::string(what)));
  }

  YAML::Node node_;
  const std::string file_, path_;
  std::set<std::string> known_;
  absl::Status problem_;
};

std::vector<std::string> Known(const std::vector<std::filesystem::path>& directories) {
  std::set<std::string> names;
  for (const auto& directory : directories) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
      if (entry.path().extension() == ".yaml") names.insert(entry.path().stem().string());
    }
  }
  return {names.begin(), names.end()};
}

}  // namespace

double WorkerProfile::PrefillSeconds(uint64_t new_tokens, uint64_t cached) const {
  double seconds = 0;
  for (uint64_t done = 0; done < new_tokens;) {
    const auto n = static_cast<double>(std::min<uint64_t>(max_step_tokens, new_tokens - done));
    seconds += overhead_seconds + std::max(weights_seconds, token_seconds * n) +
               pair_seconds * n * (static_cast<double>(cached + done) + n / 2);
    done += static_cast<uint64_t>(n);
  }
  return seconds;
}

double WorkerProfile::DecodeStepSeconds(uint64_t batch, uint64_t context_tokens) const {
  return overhead_seconds + std::max(weights_seconds, sequence_seconds * static_cast<double>(batch)) +
         context_seconds * static_cast<double>(context_tokens);
}

absl::StatusOr<WorkerProfile> ParseProfile(const std::string& text, const std::string& file) {
  YAML::Node root;
  try {
    root = YAML::Load(text);
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(file, ":", e.mark.line + 1, ": ", e.msg));
  }
  WorkerProfile p;
  Reader top(root, file, "");
  p.name = std::filesystem::path(file).stem().string();
  top.Text("about", p.about);

  Reader model = top.Section("model");
  model.Count("layers", 1, 1024, p.layout.layers);
  model.Count("kv_heads", 1, 4096, p.layout.kv_heads);
  model.Count("head_dim", 1, 4096, p.layout.head_dim);
  model.Count("max_model_len", 1, 1u << 28, p.max_model_len);
  p.layout.dtype = DType::kBF16;

  Reader memory = top.Section("memory");
  memory.Count("block_tokens", 1, 1u << 16, p.layout.block_tokens);
  memory.Count("pool_blocks", 1, 1u << 28, p.pool_blocks);

  Reader engine = top.Section("engine");
  engine.Count("max_batch", 1, 1u << 16, p.max_batch);
  engine.Count("max_step_tokens", 1, 1u << 20, p.max_step_tokens);
  engine.Count("max_waiting", 1, 1u << 20, p.max_waiting);

  Reader step = top.Section("step");
  step.Number("overhead_ms", 1e-3, 0, 1e6, p.overhead_seconds);
  step.Number("weights_ms", 1e-3, 0, 1e6, p.weights_seconds);
  step.Number("token_us", 1e-6, 0, 1e9, p.token_seconds);
  step.Number("sequence_us", 1e-6, 0, 1e9, p.sequence_seconds);
  step.Number("pair_ns", 1e-9, 0, 1e9, p.pair_seconds);
  step.Number("context_ns", 1e-9, 0, 1e9, p.context_seconds);
  step.Number("jitter", 1, 0, 1, p.jitter);

  Reader link = top.Section("link");
  link.Number("gigabytes_per_second", 1e9, 1e-6, 1e6, p.link_bytes_per_second);
  link.Number("latency_us", 1e-6, 0, 1e9, p.link_latency_seconds);
  link.Number("control_us", 1e-6, 0, 1e9, p.control_seconds);

  Reader slo = top.Section("slo");
  slo.Number("ttft_ms", 1e-3, 0, 1e9, p.slo_ttft_seconds);
  slo.Number("itl_ms", 1e-3, 0, 1e9, p.slo_itl_seconds);

  for (Reader* section : {&model, &memory, &engine, &step, &link, &slo}) section->CheckKeys();
  TP_RETURN_IF_ERROR(top.End({&model, &memory, &engine, &step, &link, &slo}));
  if (p.max_step_tokens < p.max_batch) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": engine.max_step_tokens is ", p.max_step_tokens,
                                                   "; it must be at least engine.max_batch (", p.max_batch,
                                                   "), so that every running sequence fits into a step"));
  }
  return p;
}

absl::StatusOr<WorkerProfile> LoadProfile(std::string_view name, std::string_view source_dir) {
  std::string path(name);
  if (name.find('/') == name.npos && !name.ends_with(".yaml")) {
    const std::filesystem::path below = "config/profiles";
    const std::vector<std::filesystem::path> directories = {below, std::filesystem::path(source_dir) / below};
    path.clear();
    for (const auto& directory : directories) {
      const auto file = directory / (std::string(name) + ".yaml");
      std::error_code error;
      if (path.empty() && std::filesystem::is_regular_file(file, error)) path = file.string();
    }
    if (path.empty()) {
      return absl::NotFoundError(absl::StrCat("no profile '", std::string(name), "'; there are ",
                                              absl::StrJoin(Known(directories), ", "),
                                              ", or give the path of a file like theirs"));
    }
  }
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kProfileBytesMax));
  return ParseProfile(text, path);
}

}  // namespace tidepool
