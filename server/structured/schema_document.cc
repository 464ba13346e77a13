#include "server/structured/schema_document.h"

#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/structured/json_schema.h"

namespace tidepool::structured {
namespace {

enum Shape : uint8_t {
  kSchema,      // an object or a boolean
  kSchemas,     // a non-empty array of schemas
  kSchemaMap,   // an object of schemas
  kCount,       // a whole number, 0 or more
  kNumeric,     // a number
  kText,        // a string
  kFlag,        // a boolean
  kStrings,     // an array of strings
  kList,        // an array
  kAnything,    // any value
  kAnnotation,  // ignored
  kSpecial,     // looked at in CheckKeyword
  kUnsupported,
};

struct Keyword {
  std::string_view name;
  Shape shape;
  uint32_t types = kAllTypes;  // that it says something about
};

constexpr Keyword kKeywords[] = {
    {"type", kSpecial},
    {"enum", kList},
    {"const", kAnything},
    {"nullable", kFlag},
    {"properties", kSchemaMap, kObject},
    {"required", kStrings, kObject},
    {"additionalProperties", kSchema, kObject},
    {"patternProperties", kSchemaMap, kObject},
    {"propertyNames", kSchema, kObject},
    {"minProperties", kCount, kObject},
    {"maxProperties", kCount, kObject},
    {"dependentRequired", kSpecial, kObject},
    {"dependentSchemas", kSchemaMap, kObject},
    {"dependencies", kSpecial, kObject},
    {"items", kSpecial, kArray},
    {"prefixItems", kSchemas, kArray},
    {"additionalItems", kSchema, kArray},
    {"minItems", kCount, kArray},
    {"maxItems", kCount, kArray},
    {"uniqueItems", kFlag, kArray},
    {"contains", kSpecial, kArray},
    {"minContains", kCount, kArray},
    {"maxContains", kCount, kArray},
    {"minLength", kCount, kString},
    {"maxLength", kCount, kString},
    {"pattern", kText, kString},
    {"format", kText},
    {"minimum", kNumeric, kNumber},
    {"maximum", kNumeric, kNumber},
    {"exclusiveMinimum", kSpecial, kNumber},
    {"exclusiveMaximum", kSpecial, kNumber},
    {"multipleOf", kNumeric, kNumber},
    {"allOf", kSchemas},
    {"anyOf", kSchemas},
    {"oneOf", kSchemas},
    {"not", kSchema},
    {"$ref", kText},
    {"$defs", kSpecial},
    {"definitions", kSpecial},
    {"$schema", kAnnotation},
    {"$id", kAnnotation},
    {"id", kAnnotation},
    {"$anchor", kAnnotation},
    {"$comment", kAnnotation},
    {"title", kAnnotation},
    {"description", kAnnotation},
    {"default", kAnnotation},
    {"example", kAnnotation},
    {"examples", kAnnotation},
    {"deprecated", kAnnotation},
    {"readOnly", kAnnotation},
    {"writeOnly", kAnnotation},
    {"contentEncoding", kAnnotation},
    {"contentMediaType", kAnnotation},
    {"contentSchema", kAnnotation},
    {"discriminator", kAnnotation},
    {"externalDocs", kAnnotation},
    {"xml", kAnnotation},
    {"markdownDescription", kAnnotation},
    {"if", kUnsupported},
    {"then", kUnsupported},
    {"else", kUnsupported},
    {"unevaluatedProperties", kUnsupported, kObject},
    {"unevaluatedItems", kUnsupported, kArray},
    {"$dynamicRef", kUnsupported},
    {"$dynamicAnchor", kAnnotation},
    {"$recursiveRef", kUnsupported},
    {"$recursiveAnchor", kUnsupported},
    {"$vocabulary", kUnsupported},
};

const Keyword* FindKeyword(std::string_view name) {
  static const auto* index = [] {
    auto* out = new absl::flat_hash_map<std::string_view, const Keyword*>();
    for (const Keyword& k : kKeywords) out->emplace(k.name, &k);
    return out;
  }();
  const auto it = index->find(name);
  return it == index->end() ? nullptr : it->second;
}

uint32_t TypeNamed(const std::string& name) {
  if (name == "null") return kNull;
  if (name == "boolean") return kBoolean;
  if (name == "object") return kObject;
  if (name == "array") return kArray;
  if (name == "string") return kString;
  if (name == "integer") return kInteger;
  if (name == "number") return kNumber;
  return 0;
}

bool IsSchema(const Json& node) { return node.is_object() || node.is_boolean(); }

// A pointer serves messages: what a client names may be as long as the schema, once per sub-schema.
constexpr size_t kPointerMax = 1024;

std::string JoinPointer(std::string_view pointer, std::string_view path) {
  std::string out = absl::StrCat(std::string(pointer), std::string(path.substr(0, kPointerMax)));
  if (out.size() <= kPointerMax) return out;
  out.resize(kPointerMax);
  // No half characters.
  while (!out.empty() && (static_cast<uint8_t>(out.back()) & 0xC0) == 0x80) out.pop_back();
  if (!out.empty() && static_cast<uint8_t>(out.back()) >= 0xC0) out.pop_back();
  return out;
}

// Takes the length of `node` as compact JSON (without what escapes add) from `bytes_left`.
absl::Status Measure(const Json& node, int depth_left, size_t& bytes_left, Budget& budget) {
  const CompileLimits& limits = budget.limits();
  if (depth_left < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("#: nested deeper than the limit of ", limits.nesting_max, " schemas"));
  }
  TP_RETURN_IF_ERROR(budget.Work());
  const auto take = [&](size_t bytes) {
    if (bytes > bytes_left) {
      return absl::InvalidArgumentError(
          absl::StrCat("the schema is longer than the limit of ", limits.source_bytes_max, " bytes"));
    }
    bytes_left -= bytes;
    return absl::OkStatus();
  };
  if (node.is_string()) return take(node.get_ref<const std::string&>().size() + 2);
  if (node.is_number()) return take(1);
  if (!node.is_structured()) return take(4);
  TP_RETURN_IF_ERROR(take(node.empty() ? 2 : 1 + node.size()));
  if (node.is_array()) {
    for (const Json& item : node) TP_RETURN_IF_ERROR(Measure(item, depth_left - 1, bytes_left, budget));
    return absl::OkStatus();
  }
  for (const auto& [name, item] : node.items()) {
    TP_RETURN_IF_ERROR(take(name.size() + 3));
    TP_RETURN_IF_ERROR(Measure(item, depth_left - 1, bytes_left, budget));
  }
  return absl::OkStatus();
}

// ParseSchemaText's guard: depth and duplicate keys while the parser runs.
class Guard {
 public:
  explicit Guard(int depth_max) : depth_max_(depth_max) {}
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > depth_max_) too_deep = true;
    if (event == Json::parse_event_t::object_start) keys_.emplace_back();
    if (event == Json::parse_event_t::object_end && !keys_.empty()) keys_.pop_back();
    if (event == Json::parse_event_t::key && !keys_.empty()) {
      const std::string& name = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(name).second && duplicate.empty()) duplicate = "'" + name + "'";
    }
    return true;
  }
  bool too_deep = false;
  std::string duplicate;

 private:
  const int depth_max_;
  std::vector<absl::flat_hash_set<std::string>> keys_;
};

// Levels of JSON for one level of sub-schemas: {"properties": {"a": ...}}.
constexpr int kLevelsPerSchema = 3;

}  // namespace

std::string PointerToken(std::string_view name) {
  std::string out;
  for (const char c : name) {
    if (c == '~') {
      out += "~0";
    } else if (c == '/') {
      out += "~1";
    } else {
      out += c;
    }
  }
  return out;
}

absl::StatusOr<bool> JsonEqual(const Json& a, const Json& b, Budget& budget) {
  TP_RETURN_IF_ERROR(budget.Work());
  if (a.is_number() && b.is_number()) return a == b;
  if (a.type() != b.type()) return false;
  if (a.is_string()) {
    const auto& x = a.get_ref<const std::string&>();
    const auto& y = b.get_ref<const std::string&>();
    if (x.size() != y.size()) return false;
    TP_RETURN_IF_ERROR(budget.Work(x.size() / 64));
    return x == y;
  }
  if (!a.is_structured()) return a == b;
  if (a.size() != b.size()) return false;
  if (a.is_array()) {
    for (size_t i = 0; i < a.size(); ++i) {
      TP_ASSIGN_OR_RETURN(const bool equal, JsonEqual(a[i], b[i], budget));
      if (!equal) return false;
    }
    return true;
  }
  // Mostly in the same order; a search for each name would be quadratic in what a client sends.
  absl::flat_hash_map<std::string_view, const Json*> by_name;
  auto beside = b.begin();
  for (auto it = a.begin(); it != a.end(); ++it, ++beside) {
    const Json* other = nullptr;
    if (by_name.empty() && it.key() == beside.key()) {
      other = &*beside;
    } else {
      if (by_name.empty()) {
        TP_RETURN_IF_ERROR(budget.Work(4 * b.size()));
        for (auto of_b = b.begin(); of_b != b.end(); ++of_b) by_name.emplace(of_b.key(), &*of_b);
      }
      const auto found = by_name.find(it.key());
      if (found == by_name.end()) return false;
      other = found->second;
    }
    TP_ASSIGN_OR_RETURN(const bool equal, JsonEqual(*it, *other, budget));
    if (!equal) return false;
  }
  return true;
}

absl::Status ChargeValue(const Json& value, Budget& budget) {
  if (!value.is_structured()) {
    return budget.Work(8 + (value.is_string() ? value.get_ref<const std::string&>().size() / 16 : 0));
  }
  TP_RETURN_IF_ERROR(budget.Work(8 + 8 * value.size()));
  for (const Json& item : value) TP_RETURN_IF_ERROR(ChargeValue(item, budget));
  return absl::OkStatus();
}

TypeBit TypeOf(const Json& value) {
  if (value.is_null()) return kNull;
  if (value.is_boolean()) return kBoolean;
  if (value.is_object()) return kObject;
  if (value.is_array()) return kArray;
  if (value.is_string()) return kString;
  if (value.is_number_float()) {
    const double v = value.get<double>();
    return std::floor(v) == v ? kInteger : kFraction;
  }
  return kInteger;
}

absl::StatusOr<Json> ParseSchemaText(std::string_view text, const CompileLimits& limits) {
  if (text.size() > limits.source_bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("the schema is longer than the limit of ", limits.source_bytes_max, " bytes"));
  }
  auto guard = Guard(limits.nesting_max * kLevelsPerSchema);
  Json json = Json::parse(
      text.begin(), text.end(),
      [&](int depth, Json::parse_event_t event, Json& parsed) { return guard(depth, event, parsed); },
      /*allow_exceptions=*/false);
  if (json.is_discarded()) return absl::InvalidArgumentError("the schema is not valid JSON");
  if (guard.too_deep)
    return absl::InvalidArgumentError(
        absl::StrCat("the schema is nested deeper than the limit of ", limits.nesting_max, " schemas"));
  if (!guard.duplicate.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("the schema has a duplicate key ", guard.duplicate));
  }
  return json;
}

SchemaDocument::SchemaDocument(const Json& root, Budget& budget) : document_(root), budget_(budget) {
  schemas_.push_back({&root, "#", false});
  index_.emplace(&root, 0);
}

absl::Status SchemaDocument::Open() {
  size_t bytes_left = budget_.limits().source_bytes_max;
  TP_RETURN_IF_ERROR(
      Measure(document_, budget_.limits().nesting_max * kLevelsPerSchema, bytes_left, budget_));
  if (!IsSchema(document_)) return absl::InvalidArgumentError("#: a schema must be an object or a boolean");
  if (!document_.is_object()) return absl::OkStatus();
  if (const Json* dialect = Find(0, "$schema"); dialect != nullptr) {
    if (!dialect->is_string()) return Malformed(0, "$schema", "must be a string");
    const auto& text = dialect->get_ref<const std::string&>();
    for (const char* draft : {"draft-03", "draft-04", "draft-05", "draft-06", "draft-07"}) {
      legacy_ |= absl::StrContains(text, draft);
    }
  }
  for (const char* keyword : {"$id", "id"}) {
    if (const Json* id = Find(0, keyword); id != nullptr && id->is_string()) {
      base_ = id->get_ref<const std::string&>();
      while (!base_.empty() && base_.back() == '#') base_.pop_back();
    }
  }
  nested_ids_ = HasNestedId(document_, true);
  return absl::OkStatus();
}

bool SchemaDocument::HasNestedId(const Json& node, bool root) const {
  if (!node.is_structured()) return false;
  if (node.is_object() && !root) {
    const auto it = node.find("$id");
    if (it != node.end() && it->is_string() && !it->get_ref<const std::string&>().starts_with("#"))
      return true;
  }
  for (const auto& [name, value] : node.items()) {
    if (node.is_object() && (name == "enum" || name == "const" || name == "default" || name == "examples"))
      continue;
    if (HasNestedId(value, false)) return true;
  }
  return false;
}

SchemaDocument::Id SchemaDocument::Child(Id owner, const Json& node, std::string_view path) {
  const auto [it, fresh] = index_.emplace(&node, static_cast<Id>(schemas_.size()));
  if (fresh) schemas_.push_back({&node, JoinPointer(schemas_[owner].pointer, path), false});
  return it->second;
}

SchemaDocument::Id SchemaDocument::Synthetic(Id owner, Json node, std::string_view path) {
  synthetic_.push_back(std::move(node));
  const Id id = Child(owner, synthetic_.back(), path);
  schemas_[id].synthetic = true;
  return id;
}

const Json* SchemaDocument::Find(Id id, std::string_view keyword) const {
  const Json& node = *schemas_[id].node;
  if (!node.is_object()) return nullptr;
  const auto it = node.find(std::string(keyword));
  return it == node.end() ? nullptr : &*it;
}

absl::Status SchemaDocument::Malformed(Id id, std::string_view keyword, std::string_view what) const {
  return absl::InvalidArgumentError(
      absl::StrCat(schemas_[id].pointer, "/", PointerToken(keyword), ": ", std::string(what)));
}

absl::Status SchemaDocument::Unsupported(Id id, std::string_view keyword, std::string_view why) const {
  return absl::UnimplementedError(
      absl::StrCat(schemas_[id].pointer, "/", PointerToken(keyword), ": ", std::string(why)));
}

uint32_t SchemaDocument::Types(Id id) const {
  const Json* type = Find(id, "type");
  if (type == nullptr) return kAllTypes;
  uint32_t out = 0;
  if (type->is_string()) {
    out = TypeNamed(type->get_ref<const std::string&>());
  } else {
    for (const Json& name : *type)
      out |= name.is_string() ? TypeNamed(name.get_ref<const std::string&>()) : 0;
  }
  const Json* nullable = Find(id, "nullable");
  if (nullable != nullptr && nullable->is_boolean() && nullable->get<bool>()) out |= kNull;
  return out;
}

absl::Status SchemaDocument::Check(Id id) {
  if (schemas_[id].checked) return absl::OkStatus();
  const Json& node = *schemas_[id].node;
  if (!IsSchema(node)) {
    return absl::InvalidArgumentError(
        absl::StrCat(schemas_[id].pointer, ": a schema must be an object or a boolean"));
  }
  if (node.is_object()) {
    if (legacy_ && node.contains("$ref")) {
      TP_RETURN_IF_ERROR(CheckKeyword(id, "$ref", node["$ref"]));
    } else {
      // `type` first: others are judged by it.
      if (const Json* type = Find(id, "type"); type != nullptr)
        TP_RETURN_IF_ERROR(CheckKeyword(id, "type", *type));
      for (const auto& [name, value] : node.items()) {
        TP_RETURN_IF_ERROR(budget_.Work(16));
        TP_RETURN_IF_ERROR(CheckKeyword(id, name, value));
      }
    }
  }
  schemas_[id].checked = true;
  return absl::OkStatus();
}

absl::Status SchemaDocument::CheckKeyword(Id id, const std::string& name, const Json& value) {
  const Keyword* keyword = FindKeyword(name);
  if (keyword == nullptr) {
    if (name.starts_with("x-")) return absl::OkStatus();
    return Unsupported(id, name, "this keyword is not known");
  }
  const bool relevant = (keyword->types & Types(id)) != 0;
  const auto is_count = [](const Json& v) {
    if (v.is_number_integer()) return v.is_number_unsigned() || v.get<int64_t>() >= 0;
    return v.is_number_float() && std::floor(v.get<double>()) == v.get<double>() && v.get<double>() >= 0;
  };
  switch (keyword->shape) {
    case kSchema:
      if (!IsSchema(value)) return Malformed(id, name, "must be a schema (an object or a boolean)");
      break;
    case kSchemas:
      if (!value.is_array() || value.empty()) return Malformed(id, name, "must be a list of schemas");
      for (const Json& item : value) {
        if (!IsSchema(item)) return Malformed(id, name, "must be a list of schemas");
      }
      break;
    case kSchemaMap:
      if (!value.is_object()) return Malformed(id, name, "must be an object of schemas");
      for (const auto& [property, item] : value.items()) {
        if (!IsSchema(item)) return Malformed(id, name, absl::StrCat("'", property, "' must be a schema"));
      }
      break;
    case kCount:
      if (!is_count(value)) return Malformed(id, name, "must be a whole number, 0 or more");
      break;
    case kNumeric:
      if (!value.is_number()) return Malformed(id, name, "must be a number");
      if (name == "multipleOf" && !(value.get<double>() > 0)) return Malformed(id, name, "must be above 0");
      break;
    case kText:
      if (!value.is_string()) return Malformed(id, name, "must be a string");
      break;
    case kFlag:
      if (!value.is_boolean()) return Malformed(id, name, "must be a boolean");
      break;
    case kStrings:
      if (!value.is_array()) return Malformed(id, name, "must be a list of strings");
      for (const Json& item : value) {
        if (!item.is_string()) return Malformed(id, name, "must be a list of strings");
      }
      break;
    case kList:
      if (!value.is_array()) return Malformed(id, name, "must be a list");
      break;
    case kAnything:
      return absl::OkStatus();
    case kAnnotation:
      // Assertions, if a validator wants them to be, up to draft 7.
      if (legacy_ && name.starts_with("content"))
        return Unsupported(id, name, "this keyword is not supported");
      return absl::OkStatus();
    case kUnsupported:
      if (name == "then" || name == "else") {
        if (Find(id, "if") == nullptr) return absl::OkStatus();  // without `if` they say nothing
      }
      if (name == "if" && Find(id, "then") == nullptr && Find(id, "else") == nullptr) return absl::OkStatus();
      if (name.starts_with("unevaluated") && value.is_boolean() && value.get<bool>()) return absl::OkStatus();
      if (!relevant) return absl::OkStatus();
      return Unsupported(id, name, "this keyword is not supported");
    case kSpecial:
      break;
  }
  if (name == "type") {
    const bool list = value.is_array() && !value.empty();
    if (!value.is_string() && !list) return Malformed(id, name, "must be a type or a list of types");
    const auto good = [](const Json& v) {
      return v.is_string() && TypeNamed(v.get_ref<const std::string&>()) != 0;
    };
    if (value.is_string() && !good(value)) return Malformed(id, name, "is not a type of JSON Schema");
    if (list) {
      for (const Json& item : value) {
        if (!good(item)) return Malformed(id, name, "holds something that is not a type of JSON Schema");
      }
    }
  } else if (name == "items") {
    if (value.is_array()) {
      for (const Json& item : value) {
        if (!IsSchema(item)) return Malformed(id, name, "must be a schema or a list of schemas");
      }
    } else if (!IsSchema(value)) {
      return Malformed(id, name, "must be a schema or a list of schemas");
    }
  } else if (name == "exclusiveMinimum" || name == "exclusiveMaximum") {
    if (!value.is_number() && !value.is_boolean()) return Malformed(id, name, "must be a number");
  } else if (name == "dependentRequired" || name == "dependencies") {
    if (!value.is_object()) return Malformed(id, name, "must be an object");
    for (const auto& [property, item] : value.items()) {
      bool good = name == "dependencies" && IsSchema(item);
      if (item.is_array()) {
        good = true;
        for (const Json& other : item) good = good && other.is_string();
      }
      if (!good) return Malformed(id, name, absl::StrCat("'", property, "' must be a list of strings"));
    }
  } else if (name == "contains") {
    const Json* least = Find(id, "minContains");
    const bool idle = least != nullptr && least->is_number() && least->get<double>() == 0 &&
                      Find(id, "maxContains") == nullptr;
    if (relevant && !idle) return Unsupported(id, name, "this keyword is not supported");
  } else if (name == "uniqueItems" && value.get<bool>() && relevant) {
    const Json* most = Find(id, "maxItems");
    const bool idle = most != nullptr && most->is_number() && most->get<double>() <= 1;
    if (!idle) return Unsupported(id, name, "this keyword is not supported");
  } else if (name == "not") {
    const bool trivial = value.is_boolean() || (value.is_object() && value.empty());
    if (!trivial) return Unsupported(id, name, "this keyword is not supported");
  }
  return absl::OkStatus();
}

absl::StatusOr<SchemaDocument::Id> SchemaDocument::Resolve(Id id) {
  const Json* ref = Find(id, "$ref");
  std::string text = ref->get<std::string>();
  if (nested_ids_) {
    return Unsupported(id, "$ref", "references are not supported in a schema with $id below its root");
  }
  if (!base_.empty() && text.starts_with(base_) &&
      (text.size() == base_.size() || text[base_.size()] == '#')) {
    text.erase(0, base_.size());
    if (text.empty()) text = "#";
  }
  if (!text.starts_with("#"))
    return Unsupported(id, "$ref", "only references into the same document are supported");
  std::string fragment;
  for (size_t i = 1; i < text.size(); ++i) {
    const auto hex = [&](size_t at) {
      const char c = at < text.size() ? text[at] : '\0';
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                    : -1;
    };
    if (text[i] == '%' && hex(i + 1) >= 0 && hex(i + 2) >= 0) {
      fragment.push_back(static_cast<char>(hex(i + 1) * 16 + hex(i + 2)));
      i += 2;
    } else {
      fragment.push_back(text[i]);
    }
  }
  if (fragment.empty()) return root();
  if (fragment[0] == '/') return ByPointer(id, fragment);
  std::string path;
  TP_ASSIGN_OR_RETURN(const Json* const found, FindAnchor(document_, fragment, path));
  if (found == nullptr) return Malformed(id, "$ref", absl::StrCat("there is no anchor '", fragment, "'"));
  return Child(root(), *found, path);
}

absl::StatusOr<const Json*> SchemaDocument::FindAnchor(const Json& node, std::string_view anchor,
                                                       std::string& path) const {
  if (!node.is_structured()) return nullptr;
  TP_RETURN_IF_ERROR(budget_.Work(1 + node.size()));
  if (node.is_object()) {
    for (const auto& [keyword, prefix] : {std::pair("$anchor", ""), std::pair("$id", "#")}) {
      const auto it = node.find(keyword);
      if (it != node.end() && it->is_string() &&
          it->get_ref<const std::string&>() == absl::StrCat(prefix, std::string(anchor))) {
        return &node;
      }
    }
  }
  for (const auto& [name, value] : node.items()) {
    if (node.is_object() && (name == "enum" || name == "const" || name == "default" || name == "examples"))
      continue;
    if (!value.is_structured()) continue;
    const size_t length = path.size();
    absl::StrAppend(&path, "/", PointerToken(std::string_view(name).substr(0, kPointerMax)));
    TP_ASSIGN_OR_RETURN(const Json* const found, FindAnchor(value, anchor, path));
    if (found != nullptr) return found;
    path.resize(length);
  }
  return nullptr;
}

absl::StatusOr<SchemaDocument::Id> SchemaDocument::ByPointer(Id from, std::string_view pointer) {
  const Json* at = &document_;
  std::string_view rest = pointer.substr(1);
  while (true) {
    const size_t slash = rest.find('/');
    std::string name;
    const std::string_view raw = rest.substr(0, slash);
    for (size_t i = 0; i < raw.size(); ++i) {
      if (raw[i] == '~' && i + 1 < raw.size() && (raw[i + 1] == '0' || raw[i + 1] == '1')) {
        name.push_back(raw[++i] == '0' ? '~' : '/');
      } else {
        name.push_back(raw[i]);
      }
    }
    const Json* next = nullptr;
    TP_RETURN_IF_ERROR(budget_.Work(1 + raw.size() / 16));
    if (at->is_object()) {
      TP_RETURN_IF_ERROR(budget_.Work(at->size()));  // the search is linear
      const auto it = at->find(name);
      if (it != at->end()) next = &*it;
    } else if (at->is_array() && !name.empty() && name.size() < 7 &&
               name.find_first_not_of("0123456789") == name.npos) {
      const auto i = static_cast<size_t>(std::stoul(name));
      if (i < at->size()) next = &(*at)[i];
    }
    if (next == nullptr) {
      return Malformed(from, "$ref", absl::StrCat("'#", std::string(pointer), "' leads nowhere"));
    }
    at = next;
    if (slash == rest.npos) break;
    rest.remove_prefix(slash + 1);
  }
  if (!IsSchema(*at)) {
    return Malformed(from, "$ref", absl::StrCat("'#", std::string(pointer), "' is not a schema"));
  }
  return Child(root(), *at, pointer);
}

}  // namespace tidepool::structured
