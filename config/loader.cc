#include "config/loader.h"

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "config/fields.h"
#include "config/yaml_read.h"
#include "yaml-cpp/eventhandler.h"
#include "yaml-cpp/yaml.h"

namespace tidepool {
namespace {

// No sane configuration comes near; a wrong path (say, a checkpoint) is refused before it is read.
constexpr size_t kMaxFileBytes = 1 << 20;

std::vector<std::string> KnownChildren(std::string_view section) {
  std::set<std::string> names;
  const std::string prefix = section.empty() ? "" : std::string(section) + ".";
  for (const Field& field : Fields()) {
    if (field.path.substr(0, prefix.size()) != prefix) continue;
    const std::string_view rest = field.path.substr(prefix.size());
    names.emplace(rest.substr(0, rest.find('.')));
  }
  return {names.begin(), names.end()};
}

// YamlReader: walks one document against the table of fields; collects problems instead of stopping.
class YamlReader {
 public:
  YamlReader(std::string_view name, LoadedConfig& out, std::vector<std::string>& problems)
      : name_(name), out_(out), problems_(problems) {}

  void ReadSection(const YAML::Node& node, const std::string& section) {
    if (node.IsNull()) return;  // a section whose every line is commented out
    if (!node.IsMap()) {
      Problem(node, section.empty() ? "the document" : section,
              "must be a mapping, as in `gateway:` with keys below it");
      return;
    }
    std::set<std::string> seen;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) {
        Problem(entry.first, section, "has a key that is no plain word");
        continue;
      }
      const std::string key = entry.first.Scalar();
      const std::string path = section.empty() ? key : section + "." + key;
      if (!seen.insert(key).second) {
        Problem(entry.first, path, "is given twice; remove one");
      } else if (const Field* field = FindField(path)) {
        ReadField(entry.first, entry.second, *field);
      } else if (!KnownChildren(path).empty()) {
        ReadSection(entry.second, path);
      } else {
        UnknownKey(entry.first, key, section);
      }
    }
  }

 private:
  std::string Place(const YAML::Node& node) const { return YamlPlace(name_, node); }

  void Problem(const YAML::Node& node, std::string_view path, std::string_view what) {
    problems_.push_back(absl::StrCat(Place(node), ": ", std::string(path), " ", std::string(what)));
  }

  void UnknownKey(const YAML::Node& node, const std::string& key, const std::string& section) {
    const std::string path = section.empty() ? key : section + "." + key;
    if (const std::string_view now = PresentPath(path); !now.empty()) {
      Problem(node, path, absl::StrCat("is now called ", std::string(now), "; rename it"));
      return;
    }
    const std::vector<std::string> known = KnownChildren(section);
    const std::string nearest = NearestOf(key, known);
    problems_.push_back(absl::StrCat(Place(node), ": unknown key '", key, "'",
                                     section.empty() ? "" : absl::StrCat(" in ", section), "; ",
                                     nearest.empty() ? "known here: " + absl::StrJoin(known, ", ")
                                                     : absl::StrCat("did you mean '", nearest, "'?")));
  }

  void ReadField(const YAML::Node& key, const YAML::Node& node, const Field& field) {
    absl::Status status;
    if (field.kind == FieldKind::kApiKeys && !node.IsNull()) {
      status = ReadApiKeys(node);
      if (status.ok() || status.message().empty()) {
        if (status.ok()) Record(node, field);
        return;
      }
    } else if (field.kind == FieldKind::kList && node.IsSequence()) {
      status = ReadList(node, field);
    } else if (field.kind == FieldKind::kTenantBytes && node.IsMap()) {
      status = ReadTenantBytes(node, field);
    } else if (!node.IsScalar()) {
      Problem(node.IsNull() ? key : node, field.path,
              node.IsNull() ? "has no value; give one or remove the line" : "must be a single value");
      return;
    } else {
      status = SetField(field, node.Scalar(), out_.config);
    }
    if (status.ok()) {
      Record(node, field);
    } else {
      Problem(node, field.path, std::string(status.message()));
    }
  }

  absl::Status ReadList(const YAML::Node& node, const Field& field) {
    std::vector<std::string> words;
    for (const YAML::Node& entry : node) {
      if (!entry.IsScalar() || entry.Scalar().find(',') != std::string::npos) {
        return absl::InvalidArgumentError("must be a list of single words");
      }
      words.push_back(entry.Scalar());
    }
    return SetField(field, absl::StrJoin(words, ","), out_.config);
  }

  absl::Status ReadTenantBytes(const YAML::Node& node, const Field& field) {
    std::vector<std::string> entries;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar() || !entry.second.IsScalar()) {
        return absl::InvalidArgumentError("must hold TENANT: SIZE, as in {team-a: 256MiB}");
      }
      // As text these would part it.
      if (entry.first.Scalar().find_first_of(",:") != std::string::npos ||
          entry.second.Scalar().find(',') != std::string::npos) {
        return absl::InvalidArgumentError("names tenants without ',' and ':', and a size of each");
      }
      entries.push_back(absl::StrCat(entry.first.Scalar(), ":", entry.second.Scalar()));
    }
    return SetField(field, absl::StrJoin(entries, ","), out_.config);
  }

  // Problems inside the list carry their own line; the status is then non-OK with an empty message.
  absl::Status ReadApiKeys(const YAML::Node& node) {
    if (!node.IsSequence()) {
      return absl::InvalidArgumentError("must be a list of {key_sha256: ..., tenant: ...}");
    }
    const size_t before = problems_.size();
    auto keys = ReadApiKeyList(node, name_, "gateway.api_keys", problems_);
    if (problems_.size() != before) return absl::InvalidArgumentError("");
    out_.config.gateway.api_keys = std::move(keys);
    return absl::OkStatus();
  }

  void Record(const YAML::Node& node, const Field& field) {
    out_.sources[std::string(field.path)] = absl::StrCat(name_, ":", node.Mark().line + 1);
  }

  const std::string name_;
  LoadedConfig& out_;
  std::vector<std::string>& problems_;
};

// Hears of a document and keeps nothing.
class Unheard : public YAML::EventHandler {
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {
  }
  void OnMapEnd() override {}
};

// Two are looked for and no more: behind a document that is followed by what belongs to none, yaml-cpp finds
// empty ones without end.
bool HoldsSeveralDocuments(const std::string& text) {
  std::istringstream in(text);
  YAML::Parser parser(in);
  Unheard unheard;
  return parser.HandleNextDocument(unheard) && parser.HandleNextDocument(unheard);
}

void ReadYaml(std::string_view text, std::string_view name, LoadedConfig& out,
              std::vector<std::string>& problems) {
  try {
    const std::string yaml(text);
    if (HoldsSeveralDocuments(yaml)) {
      problems.push_back(absl::StrCat(std::string(name), ": holds more than one YAML document; one is read"));
      return;
    }
    YamlReader(name, out, problems).ReadSection(YAML::Load(yaml), "");
  } catch (const YAML::Exception& e) {
    problems.push_back(
        absl::StrCat(std::string(name), ":", e.mark.line + 1, ":", e.mark.column + 1, ": not YAML: ", e.msg));
  }
}

}  // namespace

absl::StatusOr<std::string> ReadConfigFile(const std::string& path, std::string_view from) {
  std::ifstream in(path, std::ios::binary);
  std::string text(kMaxFileBytes + 1, '\0');
  if (in) in.read(text.data(), static_cast<std::streamsize>(text.size()));
  // A directory opens but does not read.
  if (!in.is_open() || in.bad()) {
    return absl::NotFoundError(
        absl::StrCat(path, ": cannot be read; check ", std::string(from), " and its permissions"));
  }
  text.resize(static_cast<size_t>(in.gcount()));
  if (text.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": is larger than ", kMaxFileBytes, " bytes; is it the right file?"));
  }
  return text;
}

namespace {

absl::Status Joined(const std::vector<std::string>& problems) {
  if (problems.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

}  // namespace

std::string LoadedConfig::Describe(std::string_view path) const {
  const auto it = sources.find(path);
  return absl::StrCat(std::string(path), " (", it == sources.end() ? "default" : it->second, ")");
}

absl::StatusOr<LoadedConfig> LoadConfigText(std::string_view yaml, std::string_view name) {
  LoadedConfig out;
  std::vector<std::string> problems;
  ReadYaml(yaml, name, out, problems);
  TP_RETURN_IF_ERROR(Joined(problems));
  return out;
}

absl::StatusOr<LoadedConfig> LoadConfig(const ConfigInput& input) {
  LoadedConfig out;
  std::vector<std::string> problems;
  if (!input.file.empty()) {
    TP_ASSIGN_OR_RETURN(const std::string text, ReadConfigFile(input.file, "--config"));
    ReadYaml(text, input.file, out, problems);
  }
  const auto apply = [&](const Field& field, const std::string& place, const std::string& text) {
    const absl::Status status = SetField(field, text, out.config);
    if (!status.ok()) {
      problems.push_back(
          absl::StrCat(place, ": ", std::string(field.path), " ", std::string(status.message())));
    }
    out.sources[std::string(field.path)] = place;
  };
  const auto take = [&](const LoadedConfig& layer) {
    for (const Field& field : Fields()) {
      const auto source = layer.sources.find(field.path);
      if (source != layer.sources.end()) apply(field, source->second, FormatField(field, layer.config));
    }
  };
  if (input.cluster) take(*input.cluster);
  for (const Field& field : Fields()) {
    const std::string name = field.env();
    std::optional<std::string> value;
    if (input.env) {
      value = input.env(name);
    } else if (const char* text = std::getenv(name.c_str())) {
      value = text;
    }
    if (value) apply(field, name, *value);
  }
  for (const RenamedField& renamed : RenamedFields()) {
    const std::string name = Field{.path = renamed.old_path}.env();
    if (input.env ? input.env(name).has_value() : std::getenv(name.c_str()) != nullptr) {
      problems.push_back(
          absl::StrCat(name, ": is now called ", FindField(renamed.path)->env(), "; rename it"));
    }
  }
  for (const auto& [path, text] : input.flags) {
    const Field* field = FindField(path);
    TP_CHECK(field != nullptr);  // flags are made from the table
    apply(*field, field->flag(), text);
  }
  if (input.reloaded) take(*input.reloaded);
  TP_RETURN_IF_ERROR(Joined(problems));
  return out;
}

}  // namespace tidepool
