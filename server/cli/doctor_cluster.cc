#include <fcntl.h>
#include <unistd.h>

#include <filesystem>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "kvstore/disk/record.h"
#include "server/cli/doctor_checks.h"
#include "server/model/fingerprint.h"
#include "server/model/model.h"
#include "server/model/safetensors.h"
#include "server/model/text/tokenizer.h"
#include "server/model/weights.h"

namespace tidepool {
namespace {

namespace fs = std::filesystem;

std::string CodecOf(const v1::ModelIdentity& model) {
  return model.kv_codec().empty() ? "none" : model.kv_codec();
}

BlockLayout LayoutOf(const v1::ModelIdentity& model) {
  return {.layers = model.layers(),
          .kv_heads = model.kv_heads(),
          .head_dim = model.head_dim(),
          .block_tokens = model.block_tokens(),
          .dtype = static_cast<DType>(model.kv_dtype())};
}

// What keeps the two from exchanging KV, with what to do about it.
std::vector<std::string> Differences(const ModelSeen& a, const ModelSeen& b) {
  std::vector<std::string> out;
  const auto field = [&](const char* what, const std::string& left, const std::string& right,
                         const char* fix) {
    if (left != right) out.push_back(absl::StrCat(what, " ", left, " here, ", right, " there: ", fix));
  };
  const auto number = [&](const char* what, uint32_t left, uint32_t right, const char* fix) {
    field(what, std::to_string(left), std::to_string(right), fix);
  };
  const v1::ModelIdentity &x = a.model, &y = b.model;
  number("block_tokens", x.block_tokens(), y.block_tokens(), "give all the same kv.block_tokens");
  number("KV number format", x.kv_dtype(), y.kv_dtype(), "give all the same model.dtype");
  number("max_model_len", x.max_model_len(), y.max_model_len(), "give all the same model.max_model_len");
  field("codec", CodecOf(x), CodecOf(y), "give all the same kv.codec");
  const bool shape = x.layers() != y.layers() || x.kv_heads() != y.kv_heads() || x.head_dim() != y.head_dim();
  if (shape) {
    out.push_back("the model's shape differs: give all the same model.path");
  } else if (x.fingerprint() != y.fingerprint() && out.empty()) {
    // Not what of it: the weights, the tokenizer or the model's config.json.
    out.push_back(absl::StrCat("fingerprint ", x.fingerprint().substr(0, 12), " here, ",
                               y.fingerprint().substr(0, 12),
                               " there: another checkpoint, tokenizer or config.json"));
  }
  return out;
}

// The header of the first record of a tier's directory; an error where there is none.
absl::StatusOr<RecordHeader> FirstRecord(const fs::path& dir, uint32_t block_tokens) {
  const int fd = open((dir / "blocks").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError("no file of extents");
  std::vector<std::byte> bytes(RecordHeaderBytes(block_tokens));
  const ssize_t n = pread(fd, bytes.data(), bytes.size(), kDiskPageBytes);
  close(fd);
  if (n != static_cast<ssize_t>(bytes.size())) return absl::NotFoundError("no record");
  return DecodeRecordHeader(bytes);
}

}  // namespace

absl::StatusOr<ModelSeen> LocalModel(const Config& config) {
  TP_ASSIGN_OR_RETURN(const ModelSpec spec, LoadModelSpec(config.model.path));
  TP_ASSIGN_OR_RETURN(const uint32_t max_model_len, EffectiveMaxModelLen(config.model, spec));
  TP_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(config.model.path));
  TP_ASSIGN_OR_RETURN(const DType dtype, ComputeDType(config.model.dtype, spec, checkpoint));
  TP_ASSIGN_OR_RETURN(
      const auto tokenizer,
      Tokenizer::Load(config.model.tokenizer.empty() ? config.model.path : config.model.tokenizer));
  const BlockLayout layout = LayoutFor(spec, config.kv.block_tokens, dtype);
  ModelSeen out;
  out.who = "this configuration";
  out.version = TIDEPOOL_VERSION;
  v1::ModelIdentity& model = out.model;
  model.set_name(ServedModelName(config.model));
  model.set_fingerprint(ModelFingerprint(spec, tokenizer->Digest(), dtype, checkpoint, max_model_len));
  model.set_layers(layout.layers);
  model.set_kv_heads(layout.kv_heads);
  model.set_head_dim(layout.head_dim);
  model.set_block_tokens(layout.block_tokens);
  model.set_kv_dtype(static_cast<uint32_t>(layout.dtype));
  model.set_max_model_len(max_model_len);
  if (config.kv.codec != "none") model.set_kv_codec(config.kv.codec);
  return out;
}

std::vector<Finding> CompareModels(const ModelSeen& local, const std::vector<ModelSeen>& others) {
  std::vector<Finding> out;
  for (const ModelSeen& other : others) {
    const std::vector<std::string> differences = Differences(local, other);
    if (!differences.empty()) {
      out.push_back(Fail("cluster", absl::StrCat(other.who, " cannot exchange KV with ", local.who, ": ",
                                                 absl::StrJoin(differences, "; "))));
    } else if (!other.version.empty() && !local.version.empty() && other.version != local.version) {
      out.push_back(Warn("cluster", absl::StrCat(other.who, " runs version ", other.version, ", this is ",
                                                 local.version, "; upgrade them together")));
    } else {
      out.push_back(Ok("cluster", absl::StrCat(other.who, " has the same model, layout and codec")));
    }
  }
  return out;
}

std::vector<Finding> CompareDisk(const KvConfig& kv, const ModelSeen& local) {
  if (kv.disk.path.empty()) return {};
  const BlockLayout layout = LayoutOf(local.model);
  const Sha256Digest space = RecordSpace(local.model.fingerprint(), layout, CodecOf(local.model));
  std::vector<Finding> out;
  std::error_code error;
  std::set<fs::path> tiers;
  for (const auto& entry : fs::directory_iterator(kv.disk.path, error)) {
    if (fs::exists(entry.path() / "FORMAT", error)) tiers.insert(entry.path());
  }
  for (const fs::path& tier : tiers) {
    const auto record = FirstRecord(tier, layout.block_tokens);
    if (absl::IsNotFound(record.status())) {
      out.push_back(Ok("disk records", absl::StrCat(tier.string(), ": none yet")));
    } else if (!record.ok()) {
      // An extent that was never written, or whose write was cut off: the tier takes it for free.
      out.push_back(Ok("disk records", absl::StrCat(tier.string(), ": the first extent holds none")));
    } else if (record->space == space) {
      out.push_back(Ok("disk records", absl::StrCat(tier.string(), ": of this model, layout and codec")));
    } else {
      out.push_back(Warn("disk records",
                         absl::StrCat(tier.string(), ": of another model, layout or codec (", record->layout,
                                      ", here ", layout.ToString(),
                                      "); they are no hits and make room for new ones; give each model its "
                                      "own kv.disk.path")));
    }
  }
  return out;
}

}  // namespace tidepool
