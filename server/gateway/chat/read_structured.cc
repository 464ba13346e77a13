#include "server/gateway/chat/read_structured.h"

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/gateway/errors.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

using Kind = StructuredSpec::Kind;

absl::Status OnlyOne(std::string_view field, std::string_view other) {
  return FieldError(field,
                    absl::StrCat("cannot be combined with ", std::string(other), "; give one of them"));
}

StructuredSpec Spec(Kind kind, std::string field) {
  StructuredSpec spec;
  spec.kind = kind;
  spec.field = std::move(field);
  return spec;
}

// A JSON schema: an object or a boolean; a string holds one (vLLM, SGLang).
absl::StatusOr<StructuredSpec> Schema(std::string field, const OrderedJson& value) {
  StructuredSpec spec = Spec(Kind::kJsonSchema, std::move(field));
  spec.schema = value;
  if (value.is_string()) {
    auto parsed = ParseJson(value.get_ref<const std::string&>());
    if (!parsed.ok()) {
      return FieldError(spec.field,
                        absl::StrCat("is not valid JSON: ", std::string(parsed.status().message())));
    }
    spec.schema = *std::move(parsed);
  }
  if (!spec.schema.is_object() && !spec.schema.is_boolean()) {
    return FieldError(spec.field, "must be a JSON schema, an object");
  }
  return spec;
}

absl::StatusOr<StructuredSpec> Text(Kind kind, std::string field, const OrderedJson& value) {
  StructuredSpec spec = Spec(kind, std::move(field));
  if (!value.is_string() || value.get_ref<const std::string&>().empty()) {
    return FieldError(spec.field, "must be a non-empty string");
  }
  spec.text = value.get<std::string>();
  return spec;
}

absl::StatusOr<StructuredSpec> Choices(std::string field, const OrderedJson& value) {
  StructuredSpec spec = Spec(Kind::kChoice, std::move(field));
  const std::string what = absl::StrCat("must be a list of 1 to ", kStructuredChoicesMax, " strings");
  if (!value.is_array() || value.empty() || value.size() > kStructuredChoicesMax) {
    return FieldError(spec.field, what);
  }
  for (const OrderedJson& one : value) {
    if (!one.is_string()) return FieldError(spec.field, what);
    spec.choices.push_back(one.get<std::string>());
  }
  return spec;
}

absl::StatusOr<StructuredSpec> JsonObject(std::string field) {
  return Spec(Kind::kJsonObject, std::move(field));
}

using MaybeSpec = absl::StatusOr<std::optional<StructuredSpec>>;

MaybeSpec ReadResponseFormat(const OrderedJson& format) {
  const std::string field = "response_format";
  if (!format.is_object() || !format.contains("type") || !format["type"].is_string()) {
    return FieldError(field, "must be an object with type text, json_object or json_schema");
  }
  const auto& type = format["type"].get_ref<const std::string&>();
  if (type == "text") return std::nullopt;
  // llama.cpp has the schema here, in both types.
  const auto bare = format.find("schema");
  const bool has_bare = bare != format.end() && !bare->is_null();
  if (type == "json_object") {
    return has_bare ? MaybeSpec(Schema(field + ".schema", *bare)) : MaybeSpec(JsonObject(field));
  }
  if (type != "json_schema") {
    return FieldError(field + ".type", "must be text, json_object or json_schema");
  }
  const auto outer = format.find("json_schema");
  if (outer == format.end() || outer->is_null()) {
    if (has_bare) return Schema(field + ".schema", *bare);
    return FieldError(field + ".json_schema", "must be an object with name and schema");
  }
  if (!outer->is_object())
    return FieldError(field + ".json_schema", "must be an object with name and schema");
  const FieldReader fields(*outer);
  const auto inside = [&](const absl::Status& status) {
    return absl::InvalidArgumentError(field + ".json_schema." + std::string(status.message()));
  };
  const auto name = fields.String("name", 64);
  if (!name.ok()) return inside(name.status());
  if (const auto strict = fields.Bool("strict"); !strict.ok()) return inside(strict.status());
  const OrderedJson* schema = fields.Find("schema");
  if (schema == nullptr) {
    return FieldError(field + ".json_schema.schema", "must be a JSON schema, an object");
  }
  TP_ASSIGN_OR_RETURN(StructuredSpec spec, Schema(field + ".json_schema.schema", *schema));
  spec.name = name->value_or("");
  return std::optional(std::move(spec));
}

MaybeSpec ReadOne(const std::string& field, std::string_view what, const OrderedJson& value) {
  if (what == "json") return Schema(field, value);
  if (what == "regex") return Text(Kind::kRegex, field, value);
  if (what == "choice") return Choices(field, value);
  return Text(Kind::kGrammar, field, value);
}

// vLLM's object: one of json, regex, choice, grammar, json_object.
MaybeSpec ReadStructuredOutputs(const OrderedJson& object) {
  const std::string field = "structured_outputs";
  if (!object.is_object()) {
    return FieldError(field, "must be an object with one of json, regex, choice, grammar, json_object");
  }
  const FieldReader fields(object);
  for (const char* other : {"structural_tag", "whitespace_pattern"}) {
    if (fields.Find(other) != nullptr)
      return FieldError(field + "." + other, "is not supported; leave it out");
  }
  const auto inside = [&](const absl::Status& status) {
    return absl::InvalidArgumentError(field + "." + std::string(status.message()));
  };
  const auto no_additional = fields.Bool("disable_additional_properties");
  if (!no_additional.ok()) return inside(no_additional.status());
  if (no_additional->value_or(false)) {
    return FieldError(field + ".disable_additional_properties",
                      "is not supported; write additionalProperties: false into the schema");
  }
  std::optional<StructuredSpec> spec;
  for (const char* what : {"json", "regex", "choice", "grammar"}) {
    const OrderedJson* value = fields.Find(what);
    if (value == nullptr) continue;
    if (spec) return OnlyOne(field + "." + what, spec->field);
    TP_ASSIGN_OR_RETURN(spec, ReadOne(field + "." + what, what, *value));
  }
  const auto any = fields.Bool("json_object");
  if (!any.ok()) return inside(any.status());
  if (any->value_or(false)) {
    if (spec) return OnlyOne(field + ".json_object", spec->field);
    TP_ASSIGN_OR_RETURN(spec, JsonObject(field + ".json_object"));
  }
  if (!spec) return FieldError(field, "needs one of json, regex, choice, grammar, json_object");
  const auto compact = fields.Bool("disable_any_whitespace");
  if (!compact.ok()) return inside(compact.status());
  spec->compact = compact->value_or(false);
  return spec;
}

bool AsksForNothing(const OrderedJson& value) {
  return value == "" || (value.is_structured() && value.empty());
}

}  // namespace

absl::StatusOr<std::optional<StructuredSpec>> ReadStructured(const OrderedJson& body) {
  const FieldReader fields(body);
  std::optional<StructuredSpec> spec;
  std::string_view first;
  const auto take = [&](std::string_view field, MaybeSpec read) -> absl::Status {
    if (!read.ok()) return read.status();
    if (!*read) return absl::OkStatus();
    if (spec) return OnlyOne(field, first);
    spec = *std::move(read);
    first = field;
    return absl::OkStatus();
  };
  if (const OrderedJson* format = fields.Find("response_format")) {
    TP_RETURN_IF_ERROR(take("response_format", ReadResponseFormat(*format)));
  }
  if (const OrderedJson* outputs = fields.Find("structured_outputs")) {
    TP_RETURN_IF_ERROR(take("structured_outputs", ReadStructuredOutputs(*outputs)));
  }
  struct Name {
    const char* field;
    std::string_view what;
  };
  for (const Name& name :
       {Name{"guided_json", "json"}, Name{"guided_regex", "regex"}, Name{"guided_choice", "choice"},
        Name{"guided_grammar", "grammar"}, Name{"json_schema", "json"}, Name{"grammar", "grammar"},
        Name{"regex", "regex"}, Name{"ebnf", "grammar"}}) {
    const OrderedJson* value = fields.Find(name.field);
    // An empty schema is one: any JSON.
    if (value == nullptr || (AsksForNothing(*value) && !(name.what == "json" && value->is_object())))
      continue;
    TP_RETURN_IF_ERROR(take(name.field, ReadOne(name.field, name.what, *value)));
  }
  return spec;
}

}  // namespace tidepool
