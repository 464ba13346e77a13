#include "server/model/rope_config.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace tidepool {
namespace {

using nlohmann::json;

constexpr double kThetaMax = 1e12;
constexpr uint32_t kPositionsMax = 1 << 24;
constexpr double kFactorMax = 1e6;
constexpr char kFull[] = "full_attention";
constexpr char kSliding[] = "sliding_attention";

// One description of a rotation: an object of the config, and the field that it came from.
struct Source {
  json object = json::object();
  std::string field = "rope_scaling";
};

bool IsLayerType(const std::string& key) { return key == kFull || key == kSliding; }

// `field` of the config as an object; empty where absent.
Source Take(ConfigReader& config, const char* field) {
  Source out{json::object(), field};
  const json* v = config.Find(field);
  if (v == nullptr) return out;
  if (v->is_object()) {
    out.object = *v;
  } else {
    config.Invalid(absl::StrCat(field, " is ", JsonForMessage(*v), "; it must be an object or null"));
  }
  return out;
}

RopeType TypeOf(const std::string& name) {
  for (const RopeType t :
       {RopeType::kLinear, RopeType::kDynamic, RopeType::kYarn, RopeType::kLongrope, RopeType::kLlama3}) {
    if (name == RopeTypeName(t)) return t;
  }
  // As the first Phi-3 configs called it.
  return name == "su" ? RopeType::kLongrope : RopeType::kDefault;
}

// Keys that a type of rotation reads. Others change something that we do not know.
const std::set<std::string>& KeysOf(RopeType type) {
  static const std::set<std::string> common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"};
  static const auto with = [](std::initializer_list<const char*> more) {
    std::set<std::string> out = common;
    out.insert(more.begin(), more.end());
    return out;
  };
  static const std::set<std::string> linear = with({"factor"});
  static const std::set<std::string> yarn =
      with({"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "truncate", "finetuned"});
  static const std::set<std::string> longrope =
      with({"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"});
  static const std::set<std::string> llama3 =
      with({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"});
  switch (type) {
    case RopeType::kDefault:
      break;
    case RopeType::kLinear:
    case RopeType::kDynamic:
      return linear;
    case RopeType::kYarn:
      return yarn;
    case RopeType::kLongrope:
      return longrope;
    case RopeType::kLlama3:
      return llama3;
  }
  return common;
}

double YarnMagnitude(double scale, double mscale) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

void ReadType(ConfigReader& config, ConfigReader& fields, const Source& source, const Architecture& a,
              RopeSpec& out) {
  const char* key = source.object.contains("rope_type") ? "rope_type" : "type";
  const json* type = fields.Find(key);
  if (type == nullptr || *type == "default") return;
  const std::string name = type->is_string() ? type->get<std::string>() : std::string();
  out.type = TypeOf(name);
  const std::vector<std::string> allowed = absl::StrSplit(std::string(a.rope_types), ' ');
  if (out.type == RopeType::kDefault || std::ranges::find(allowed, RopeTypeName(out.type)) == allowed.end()) {
    out.type = RopeType::kDefault;
    config.Unsupported(absl::StrCat(source.field, ".", key), *type,
                       absl::StrCat("default ", std::string(a.rope_types)));
  }
}

// The length that the model was trained on, beside the rotation or inside it.
uint32_t OriginalPositions(ConfigReader& config, ConfigReader& fields, const ModelSpec& spec) {
  constexpr char kField[] = "original_max_position_embeddings";
  ConfigReader& reader = config.Find(kField) != nullptr ? config : fields;
  return reader.Count(kField, 1, kPositionsMax, spec.max_positions);
}

void ReadFactors(ConfigReader& config, ConfigReader& fields, const ModelSpec& spec, RopeSpec& out) {
  const auto ratio = [&] {
    return out.original_max_positions == 0
               ? 1.0
               : static_cast<double>(spec.max_positions) / out.original_max_positions;
  };
  switch (out.type) {
    case RopeType::kDefault:
      return;
    case RopeType::kLinear:
      out.factor = fields.RequiredNumber("factor", 1, kFactorMax);
      return;
    case RopeType::kDynamic:
      out.factor = fields.RequiredNumber("factor", 1, kFactorMax);
      out.original_max_positions = spec.max_positions;
      return;
    case RopeType::kLlama3:
      out.factor = fields.RequiredNumber("factor", 1, kFactorMax);
      out.original_max_positions = OriginalPositions(config, fields, spec);
      out.low_freq_factor = fields.RequiredNumber("low_freq_factor", 1e-6, kFactorMax);
      out.high_freq_factor = fields.RequiredNumber("high_freq_factor", 1e-6, kFactorMax);
      if (out.high_freq_factor <= out.low_freq_factor && fields.Find("high_freq_factor") != nullptr) {
        fields.Invalid(absl::StrCat("high_freq_factor is ", out.high_freq_factor,
                                    "; it must be above low_freq_factor (", out.low_freq_factor, ")"));
      }
      return;
    case RopeType::kYarn: {
      out.original_max_positions = OriginalPositions(config, fields, spec);
      out.factor = fields.Number("factor", 1, kFactorMax, ratio());
      out.beta_fast = fields.Number("beta_fast", 1e-3, 1e6, 32);
      out.beta_slow = fields.Number("beta_slow", 1e-3, 1e6, 1);
      out.truncate = fields.Bool("truncate", true);
      const double mscale = fields.Number("mscale", 0, 100, 0);
      const double mscale_all = fields.Number("mscale_all_dim", 0, 100, 0);
      const double magnitude = mscale != 0 && mscale_all != 0
                                   ? YarnMagnitude(out.factor, mscale) / YarnMagnitude(out.factor, mscale_all)
                                   : YarnMagnitude(out.factor, 1);
      out.attention_factor = fields.Number("attention_factor", 1e-3, 1000, magnitude);
      if (out.theta < 2) fields.Invalid(absl::StrCat("rope_theta is ", out.theta, "; yarn needs at least 2"));
      return;
    }
    case RopeType::kLongrope: {
      out.original_max_positions = OriginalPositions(config, fields, spec);
      out.factor = fields.Number("factor", 1, kFactorMax, ratio());
      double magnitude = 1.0;
      if (out.factor > 1 && out.original_max_positions > 1) {
        magnitude = std::sqrt(1 + std::log(out.factor) / std::log(out.original_max_positions));
      }
      out.attention_factor = fields.Number("attention_factor", 1e-3, 1000, magnitude);
      out.short_factor = fields.Numbers("short_factor", out.rotary_dim / 2, 1e-6, kFactorMax);
      out.long_factor = fields.Numbers("long_factor", out.rotary_dim / 2, 1e-6, kFactorMax);
      return;
    }
  }
}

RopeSpec ReadRope(ConfigReader& config, const Source& source, const char* theta_field, double theta_default,
                  const ModelSpec& spec) {
  const Architecture& a = *spec.architecture;
  ConfigReader fields(source.object, absl::StrCat(config.where(), ": ", source.field), config.problems());
  RopeSpec out;
  ReadType(config, fields, source, a, out);
  const double theta = config.Number(theta_field, 1.0, kThetaMax, theta_default);
  out.theta = fields.Number("rope_theta", 1.0, kThetaMax, theta);

  double partial = 1.0;
  if (a.partial_rotary) {
    partial = config.Number("partial_rotary_factor", 0.01, 1, 1);
    partial = fields.Number("partial_rotary_factor", 0.01, 1, partial);
  } else if (const json* v = fields.Find("partial_rotary_factor"); v != nullptr && *v != 1.0) {
    config.Unsupported(absl::StrCat(source.field, ".partial_rotary_factor"), *v, "1");
  }
  out.rotary_dim = static_cast<uint32_t>(spec.head_dim * partial);
  if (spec.head_dim > 0 && (out.rotary_dim < 2 || out.rotary_dim % 2 != 0)) {
    config.Invalid(absl::StrCat("partial_rotary_factor is ", partial, ", of head_dim ", spec.head_dim, " ",
                                out.rotary_dim, "; it must be even and at least 2"));
  }
  ReadFactors(config, fields, spec, out);
  for (const auto& [key, value] : source.object.items()) {
    if (!value.is_null() && !KeysOf(out.type).contains(key)) {
      config.Unsupported(absl::StrCat(source.field, ".", key), value,
                         absl::StrCat("no such field with rope_type ", std::string(RopeTypeName(out.type))));
    }
  }
  return out;
}

// Sets max_positions_scaled: how far a scaled rotation reaches. For the families with a rotation of its own
// for window layers max_position_embeddings counts it already.
void ReadReach(ModelSpec& spec) {
  double reach = spec.max_positions;
  const RopeSpec& r = spec.ropes[0];
  if (!spec.architecture->local_rope) {
    if (r.type == RopeType::kLinear || r.type == RopeType::kDynamic) reach = r.factor * spec.max_positions;
    if (r.type == RopeType::kYarn) reach = r.factor * r.original_max_positions;
  }
  reach = std::clamp(reach, static_cast<double>(spec.max_positions), static_cast<double>(kPositionsMax));
  spec.max_positions_scaled = static_cast<uint32_t>(reach);
}

}  // namespace

void ReadRopes(ConfigReader& config, ModelSpec& spec) {
  constexpr double kTheta = 10000.0;
  Source scaling = Take(config, "rope_scaling"), parameters = Take(config, "rope_parameters");
  if (spec.architecture->local_rope) {
    Source local{json::object(), "rope_parameters.sliding_attention"};
    for (const auto& [key, value] : parameters.object.items()) {
      if (!IsLayerType(key) || !(value.is_object() || value.is_null())) {
        config.Unsupported(absl::StrCat("rope_parameters.", key), value,
                           "an object for full_attention and one for sliding_attention");
      } else if (value.is_object() && key == kSliding) {
        local.object = value;
      } else if (value.is_object()) {
        json full = value;
        if (scaling.object.empty()) scaling.field = "rope_parameters.full_attention";
        full.update(scaling.object);
        scaling.object = std::move(full);
      }
    }
    spec.ropes = {ReadRope(config, scaling, "rope_theta", kTheta, spec),
                  ReadRope(config, local, "rope_local_base_freq", kTheta, spec)};
  } else {
    const Source& source = scaling.object.empty() ? parameters : scaling;
    spec.ropes = {ReadRope(config, source, "rope_theta", kTheta, spec)};
  }
  ReadReach(spec);
}

}  // namespace tidepool
