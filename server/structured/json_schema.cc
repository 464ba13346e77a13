#include "server/structured/json_schema.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/structured/json_formats.h"
#include "server/structured/json_numbers.h"
#include "server/structured/json_pieces.h"
#include "server/structured/regex.h"
#include "server/structured/schema_document.h"

namespace tidepool::structured {
namespace {

using NodeId = ExpressionPool::Id;
using Id = SchemaDocument::Id;
// Schemas that all apply, in the order in which they were met.
using Ids = std::vector<Id>;

constexpr uint32_t kNoLimit = UINT32_MAX;

uint32_t CountOf(const Json& value) {
  const double v = value.get<double>();
  return v >= kNoLimit - 1 ? kNoLimit - 1 : static_cast<uint32_t>(v);
}

// One JSON number's text, as the schema's author wrote it but for 1.0, which is 1.
std::string NumberText(const Json& value) {
  if (value.is_number_float()) {
    const double v = value.get<double>();
    if (std::floor(v) == v && std::abs(v) < 1e15) return absl::StrCat(static_cast<int64_t>(v));
  }
  return value.dump();
}

// SchemaCompiler: merges what applies to one value into one description by type, and makes that an
// expression. Each set of schemas that apply together is a rule, so recursion in the schema is recursion of
// rules.
class SchemaCompiler {
 public:
  SchemaCompiler(const Json& schema, JsonWhitespace whitespace, ExpressionPool& pool)
      : document_(schema, pool.budget()), pool_(pool), budget_(pool.budget()), json_(pool.Json(whitespace)) {}

  absl::StatusOr<NodeId> Run() {
    TP_RETURN_IF_ERROR(document_.Open());
    TP_ASSIGN_OR_RETURN(const NodeId root, Value({document_.root()}));
    while (!pending_.empty()) {
      const auto [rule, ids] = std::move(pending_.back());
      pending_.pop_back();
      TP_ASSIGN_OR_RETURN(const NodeId body, Body(ids));
      pool_.DefineRule(rule, body);
    }
    return root;
  }

 private:
  // Alternatives that one value may take, and how many a schema may have.
  static constexpr size_t kAlternativesMax = 256;
  static constexpr size_t kKeyRegionsMax = 64;
  static constexpr int kProofDepthMax = 6;
  static constexpr uint32_t kStepMax = 1'000;

  // ---- what applies

  // A way to meet all of `ids`: schemas without combinators, whose own keywords all apply.
  absl::StatusOr<std::vector<Ids>> Expand(const Ids& ids) {
    std::vector<Ids> out;
    Way way;
    for (const Id id : ids) way.todo.push_back({id, nullptr});
    TP_RETURN_IF_ERROR(Flatten(std::move(way), out));
    return out;
  }

  // What a schema was reached through, for the same value: meeting itself there means that there is no end.
  struct Line {
    Id id;
    std::shared_ptr<const Line> before;
    int length = 0;
  };
  struct Step {
    Id id;
    std::shared_ptr<const Line> line;
  };
  struct Alternatives {
    Id owner = 0;
    std::string keyword;
    Ids options;
    std::shared_ptr<const Line> line = nullptr;
  };
  struct Way {
    std::vector<Step> todo;
    std::set<Id> passed;
    Ids atoms;
    std::vector<Alternatives> choices;
  };

  absl::Status Flatten(Way way, std::vector<Ids>& out) {
    for (size_t at = 0; at < way.todo.size(); ++at) {
      const auto [id, line] = way.todo[at];
      TP_RETURN_IF_ERROR(budget_.Work(32));
      for (const Line* l = line.get(); l != nullptr; l = l->before.get()) {
        TP_RETURN_IF_ERROR(budget_.Work());
        if (l->id == id) return absl::OkStatus();
      }
      if (!way.passed.insert(id).second) continue;
      TP_RETURN_IF_ERROR(document_.Check(id));
      const Json& node = document_.node(id);
      if (node.is_boolean()) {
        if (!node.get<bool>()) return absl::OkStatus();
        continue;
      }
      const int length = line == nullptr ? 0 : line->length + 1;
      if (length > 4 * budget_.limits().nesting_max) {
        return absl::InvalidArgumentError(absl::StrCat(document_.pointer(id), ": more than the limit of ",
                                                       4 * budget_.limits().nesting_max,
                                                       " references and combinators lead to one another"));
      }
      const auto here = std::make_shared<const Line>(Line{id, line, length});
      if (HasOwnKeywords(id)) way.atoms.push_back(id);
      if (document_.Find(id, "$ref") != nullptr) {
        TP_ASSIGN_OR_RETURN(const Id target, document_.Resolve(id));
        way.todo.push_back({target, here});
        if (document_.ref_hides_siblings()) continue;
      }
      if (const Json* never = document_.Find(id, "not"); never != nullptr) {
        if (!never->is_boolean() || never->get<bool>()) return absl::OkStatus();
      }
      if (const Json* all = document_.Find(id, "allOf"); all != nullptr) {
        for (size_t i = 0; i < all->size(); ++i) {
          way.todo.push_back({document_.Child(id, (*all)[i], absl::StrCat("/allOf/", i)), here});
        }
      }
      for (const char* keyword : {"anyOf", "oneOf"}) {
        const Json* any = document_.Find(id, keyword);
        if (any == nullptr) continue;
        Alternatives choice{id, keyword, {}, here};
        for (size_t i = 0; i < any->size(); ++i) {
          choice.options.push_back(document_.Child(id, (*any)[i], absl::StrCat("/", keyword, "/", i)));
        }
        way.choices.push_back(std::move(choice));
      }
      TP_RETURN_IF_ERROR(AddDependencies(id, here, way.choices));
    }
    way.todo.clear();
    // Nothing has all types: no need to look at alternatives.
    if (TypesOf(way.atoms) == 0) return absl::OkStatus();
    if (way.choices.empty()) {
      if (out.size() >= kAlternativesMax) {
        return absl::ResourceExhaustedError(
            absl::StrCat(document_.pointer(way.atoms.empty() ? 0 : way.atoms[0]), ": more than the limit of ",
                         kAlternativesMax, " combinations of alternatives apply to one value"));
      }
      out.push_back(std::move(way.atoms));
      return absl::OkStatus();
    }
    const Alternatives choice = std::move(way.choices.back());
    way.choices.pop_back();
    if (choice.keyword == "oneOf") TP_RETURN_IF_ERROR(ProveExclusive(choice, way.atoms));
    for (const Id option : choice.options) {
      Way next = way;
      next.todo.push_back({option, choice.line});
      TP_RETURN_IF_ERROR(Flatten(std::move(next), out));
    }
    return absl::OkStatus();
  }

  bool HasOwnKeywords(Id id) const {
    if (document_.ref_hides_siblings() && document_.Find(id, "$ref") != nullptr) return false;
    static constexpr const char* kOwn[] = {"type",
                                           "enum",
                                           "const",
                                           "properties",
                                           "required",
                                           "additionalProperties",
                                           "patternProperties",
                                           "propertyNames",
                                           "minProperties",
                                           "maxProperties",
                                           "items",
                                           "prefixItems",
                                           "additionalItems",
                                           "minItems",
                                           "maxItems",
                                           "minLength",
                                           "maxLength",
                                           "pattern",
                                           "format",
                                           "minimum",
                                           "maximum",
                                           "exclusiveMinimum",
                                           "exclusiveMaximum",
                                           "multipleOf"};
    for (const char* keyword : kOwn) {
      if (document_.Find(id, keyword) != nullptr) return true;
    }
    return false;
  }

  // "If the property is there, then ..." as alternatives: it is not there, or ....
  absl::Status AddDependencies(Id id, std::shared_ptr<const Line> line, std::vector<Alternatives>& choices) {
    for (const char* keyword : {"dependentRequired", "dependentSchemas", "dependencies"}) {
      const Json* map = document_.Find(id, keyword);
      if (map == nullptr || (document_.Types(id) & kObject) == 0) continue;
      for (const auto& [property, then] : map->items()) {
        const std::string path = absl::StrCat("/", keyword, "/", PointerToken(property));
        auto& made = dependencies_[{id, path}];
        if (made.options.empty()) {
          Json without = Json::object(), with = Json::object();
          without["properties"][property] = false;
          with["required"] = Json::array({property});
          if (then.is_array()) {
            for (const Json& other : then) with["required"].push_back(other);
          } else {
            with["allOf"] = Json::array({then});
          }
          made = {id,
                  keyword,
                  {document_.Synthetic(id, std::move(without), path),
                   document_.Synthetic(id, std::move(with), path)},
                  nullptr};
        }
        choices.push_back(made);
        choices.back().line = line;
      }
    }
    return absl::OkStatus();
  }

  // ---- oneOf

  absl::Status ProveExclusive(const Alternatives& choice, const Ids& context) {
    // With what else applies to the value it may be easier; without, the proof holds everywhere.
    // While it is being proven it may be met again further down, where it may be taken for granted.
    if (!exclusive_.insert(choice.owner).second) return absl::OkStatus();
    for (size_t i = 0; i < choice.options.size(); ++i) {
      for (size_t j = i + 1; j < choice.options.size(); ++j) {
        Ids both{choice.options[i], choice.options[j]};
        TP_ASSIGN_OR_RETURN(bool proven, ProvablyEmpty(both, 0));
        if (!proven) {
          both.insert(both.end(), context.begin(), context.end());
          TP_ASSIGN_OR_RETURN(proven, ProvablyEmpty(both, 0));
        }
        if (!proven) {
          return document_.Unsupported(
              choice.owner, "oneOf",
              absl::StrCat("its branches ", i, " and ", j,
                           " cannot be shown to exclude each other; use anyOf if a value may match both"));
        }
      }
    }
    const bool everywhere = context.empty() || (context.size() == 1 && context[0] == choice.owner);
    if (!everywhere) exclusive_.erase(choice.owner);
    return absl::OkStatus();
  }

  // True only where no value at all is valid against all of `ids`.
  absl::StatusOr<bool> ProvablyEmpty(const Ids& ids, int depth) {
    if (depth > kProofDepthMax) return false;
    TP_ASSIGN_OR_RETURN(const std::vector<Ids> ways, Expand(ids));
    for (const Ids& atoms : ways) {
      TP_ASSIGN_OR_RETURN(const bool empty, AtomsEmpty(atoms, depth));
      if (!empty) return false;
    }
    return true;
  }

  absl::StatusOr<bool> AtomsEmpty(const Ids& atoms, int depth) {
    TP_RETURN_IF_ERROR(budget_.Work(64));
    TP_ASSIGN_OR_RETURN(const std::optional<std::vector<Json>> values, Constants(atoms));
    if (values) return values->empty();
    const uint32_t types = TypesOf(atoms);
    if ((types & (kNull | kBoolean)) != 0) return false;
    if ((types & kNumber) != 0) {
      TP_ASSIGN_OR_RETURN(const std::optional<NumberRange> range, Range(atoms, types));
      if (!range) return false;
      TP_ASSIGN_OR_RETURN(const Dfa dfa, NumbersIn(*range, budget_));
      // No number of our digits: then perhaps one of more.
      if (!dfa.empty()) return false;
      if (!range->low || !range->high || Decimal::Compare(range->low->value, range->high->value) <= 0) {
        const bool touching = range->low && range->high &&
                              Decimal::Compare(range->low->value, range->high->value) == 0 &&
                              (range->low->exclusive || range->high->exclusive);
        if (!touching) return false;
      }
    }
    if ((types & kString) != 0) {
      TP_ASSIGN_OR_RETURN(const Text text, TextOf(atoms));
      if (text.min <= text.max) {
        if (!text.content) return false;
        if (!text.content->empty() && text.min <= CharactersMax(*text.content) &&
            text.max >= CharactersMin(*text.content)) {
          return false;
        }
      }
    }
    if ((types & kArray) != 0) {
      const Items items = ItemsOf(atoms);
      bool empty = items.min > items.max;
      for (uint32_t i = 0; i < items.min && i <= items.prefix.size() && !empty; ++i) {
        const Ids& item = i < items.prefix.size() ? items.prefix[i] : items.rest;
        if (item.empty()) continue;
        TP_ASSIGN_OR_RETURN(empty, ProvablyEmpty(item, depth + 1));
      }
      if (!empty) return false;
    }
    if ((types & kObject) != 0) {
      TP_ASSIGN_OR_RETURN(const Members members, MembersOf(atoms));
      bool empty = members.min > members.max || members.required > members.max;
      for (const Member& member : members.known) {
        if (empty || !member.required) continue;
        if (member.value.empty()) continue;
        TP_ASSIGN_OR_RETURN(empty, ProvablyEmpty(member.value, depth + 1));
      }
      if (!empty) return false;
    }
    return true;
  }

  // ---- values

  // An expression for what all of `ids` allow; by way of a rule unless it is simple.
  absl::StatusOr<NodeId> Value(const Ids& ids) {
    Ids key = ids;
    std::sort(key.begin(), key.end());
    key.erase(std::unique(key.begin(), key.end()), key.end());
    if (const auto it = values_.find(key); it != values_.end()) return it->second;
    TP_ASSIGN_OR_RETURN(const std::vector<Ids> ways, Expand(ids));
    NodeId node = 0;
    bool simple = ways.size() <= 4;
    for (const Ids& atoms : ways) simple = simple && (TypesOf(atoms) & (kObject | kArray)) == 0;
    if (ways.size() == 1 && ways[0].empty()) {
      node = json_.Value();
    } else if (simple) {
      std::vector<NodeId> options;
      for (const Ids& atoms : ways) {
        TP_ASSIGN_OR_RETURN(const NodeId option, Merged(atoms));
        options.push_back(option);
      }
      node = pool_.Choice(std::move(options));
    } else {
      const uint32_t rule = pool_.AddRule(document_.pointer(ids[0]));
      pending_.emplace_back(rule, ids);
      node = pool_.Rule(rule);
    }
    values_.emplace(std::move(key), node);
    return node;
  }

  absl::StatusOr<NodeId> Body(const Ids& ids) {
    TP_ASSIGN_OR_RETURN(const std::vector<Ids> ways, Expand(ids));
    std::vector<NodeId> options;
    for (const Ids& atoms : ways) {
      Ids key = atoms;
      std::sort(key.begin(), key.end());
      auto it = merged_.find(key);
      if (it == merged_.end()) {
        // The alternatives of different schemas are often the same ones: a rule each.
        const uint32_t rule = pool_.AddRule(document_.pointer(ids[0]));
        it = merged_.emplace(std::move(key), rule).first;
        const uint32_t made = it->second;
        TP_ASSIGN_OR_RETURN(const NodeId body, Merged(atoms));
        pool_.DefineRule(made, body);
        options.push_back(pool_.Rule(made));
      } else {
        options.push_back(pool_.Rule(it->second));
      }
    }
    return pool_.Choice(std::move(options));
  }

  uint32_t TypesOf(const Ids& atoms) const {
    uint32_t types = kAllTypes;
    for (const Id id : atoms) types &= document_.Types(id);
    return types;
  }

  absl::StatusOr<NodeId> Merged(const Ids& atoms) {
    if (atoms.empty()) return json_.Value();
    TP_ASSIGN_OR_RETURN(const std::optional<std::vector<Json>> values, Constants(atoms));
    if (values) return ConstantNode(*values);
    const uint32_t types = TypesOf(atoms);
    std::vector<NodeId> options;
    // Composite types first: the order decides nothing but numbering.
    if ((types & kObject) != 0) {
      TP_ASSIGN_OR_RETURN(const NodeId node, ObjectNode(atoms));
      options.push_back(node);
    }
    if ((types & kArray) != 0) {
      TP_ASSIGN_OR_RETURN(const NodeId node, ArrayNode(atoms));
      options.push_back(node);
    }
    if ((types & kString) != 0) {
      TP_ASSIGN_OR_RETURN(const NodeId node, StringNode(atoms));
      options.push_back(node);
    }
    if ((types & kNumber) != 0) {
      TP_ASSIGN_OR_RETURN(const std::optional<NumberRange> range, Range(atoms, types));
      if (!range) {
        options.push_back((types & kFraction) != 0 ? json_.Number() : json_.Integer());
      } else {
        TP_ASSIGN_OR_RETURN(Dfa dfa, NumbersIn(*range, budget_));
        options.push_back(pool_.Automatic(std::move(dfa)));
      }
    }
    if ((types & kBoolean) != 0) {
      options.push_back(pool_.Literal("true"));
      options.push_back(pool_.Literal("false"));
    }
    if ((types & kNull) != 0) options.push_back(pool_.Literal("null"));
    return pool_.Choice(std::move(options));
  }

  // ---- constants

  // The values of `enum` and `const` that all of `atoms` allow; nullopt where none of them has either.
  absl::StatusOr<std::optional<std::vector<Json>>> Constants(const Ids& atoms) {
    std::optional<std::vector<Json>> out;
    for (const Id id : atoms) {
      const Json* list = document_.Find(id, "enum");
      const Json* one = document_.Find(id, "const");
      if (list == nullptr && one == nullptr) continue;
      if (!out) {
        out.emplace();
        if (one != nullptr) {
          TP_RETURN_IF_ERROR(ChargeValue(*one, budget_));
          out->push_back(*one);
        } else {
          for (const Json& value : *list) {
            TP_RETURN_IF_ERROR(ChargeValue(value, budget_));
            out->push_back(value);
          }
        }
      }
    }
    if (!out) return out;
    std::vector<Json> good;
    for (Json& value : *out) {
      bool valid = true;
      for (const Id id : atoms) {
        TP_ASSIGN_OR_RETURN(valid, Valid(value, id, 0));
        if (!valid) break;
      }
      if (valid) good.push_back(std::move(value));
    }
    return std::optional<std::vector<Json>>(std::move(good));
  }

  absl::StatusOr<NodeId> ConstantNode(const std::vector<Json>& values) {
    std::vector<std::string> scalars;
    std::vector<NodeId> options;
    for (const Json& value : values) {
      if (value.is_structured()) {
        TP_ASSIGN_OR_RETURN(const NodeId constant, Constant(value));
        options.push_back(constant);
      } else {
        scalars.push_back(ScalarText(value));
      }
    }
    if (scalars.size() == 1) {
      options.push_back(pool_.Literal(scalars[0]));
    } else if (!scalars.empty()) {
      TP_ASSIGN_OR_RETURN(Dfa dfa, OneOf(std::move(scalars), budget_));
      options.push_back(pool_.Automatic(std::move(dfa)));
    }
    return pool_.Choice(std::move(options));
  }

  static std::string ScalarText(const Json& value) {
    // nlohmann escapes as json_pieces.h does.
    return value.is_number() ? NumberText(value) : value.dump();
  }

  absl::StatusOr<NodeId> Constant(const Json& value) {
    TP_RETURN_IF_ERROR(budget_.Work(16));
    if (!value.is_structured()) return pool_.Literal(ScalarText(value));
    std::vector<NodeId> parts{json_.Punctuation(value.is_object() ? '{' : '[')};
    bool first = true;
    for (const auto& [name, item] : value.items()) {
      if (!first) parts.push_back(json_.Punctuation(','));
      first = false;
      if (value.is_object()) {
        parts.push_back(pool_.Literal(Json(name).dump()));
        parts.push_back(json_.Punctuation(':'));
      }
      TP_ASSIGN_OR_RETURN(const NodeId constant, Constant(item));
      parts.push_back(constant);
    }
    const char close = value.is_object() ? '}' : ']';
    parts.push_back(first ? pool_.Literal(std::string(1, close)) : json_.Close(close));
    return pool_.Sequence(std::move(parts));
  }

  // ---- numbers

  // nullopt: no limits.
  absl::StatusOr<std::optional<NumberRange>> Range(const Ids& atoms, uint32_t types) {
    NumberRange range;
    range.integer = (types & kFraction) == 0;
    bool any = false;
    const auto tighten = [&](std::optional<NumberRange::Bound>& bound, const Json& value, bool exclusive,
                             int direction) {
      any = true;
      NumberRange::Bound fresh{Decimal::Parse(value.dump()), exclusive};
      if (!bound) {
        bound = std::move(fresh);
        return;
      }
      const int c = Decimal::Compare(fresh.value, bound->value) * direction;
      if (c > 0 || (c == 0 && exclusive)) bound = std::move(fresh);
    };
    for (const Id id : atoms) {
      for (const bool low : {true, false}) {
        const Json* bound = document_.Find(id, low ? "minimum" : "maximum");
        const Json* exclusive = document_.Find(id, low ? "exclusiveMinimum" : "exclusiveMaximum");
        auto& out = low ? range.low : range.high;
        const int direction = low ? 1 : -1;
        const bool flag = exclusive != nullptr && exclusive->is_boolean();
        if (bound != nullptr) tighten(out, *bound, flag && exclusive->get<bool>(), direction);
        if (exclusive != nullptr && !flag) tighten(out, *exclusive, true, direction);
      }
      if (const Json* step = document_.Find(id, "multipleOf"); step != nullptr) {
        TP_RETURN_IF_ERROR(AddStep(id, *step, range));
        any = true;
      }
    }
    if (!any) return std::nullopt;
    return std::optional<NumberRange>(std::move(range));
  }

  absl::Status AddStep(Id id, const Json& value, NumberRange& range) {
    const Decimal step = Decimal::Parse(value.dump());
    const std::string digits = step.whole + step.fraction;
    const double binary = value.get<double>() * 1048576.0;
    if (step.fraction.size() > 6 || std::floor(binary) != binary) {
      return document_.Unsupported(id, "multipleOf",
                                   "a step that binary fractions do not have exactly is not supported");
    }
    uint64_t scaled = 0;
    for (const char c : digits)
      scaled = std::min<uint64_t>(scaled * 10 + static_cast<uint64_t>(c - '0'), 1u << 30);
    auto scale = static_cast<uint32_t>(step.fraction.size());
    if (range.step) {
      // The least common multiple, at the larger scale.
      uint64_t other = *range.step;
      for (; scale < range.step_scale; ++scale) scaled = std::min<uint64_t>(scaled * 10, 1u << 30);
      for (uint32_t s = range.step_scale; s < scale; ++s) other *= 10;
      uint64_t a = scaled, b = other;
      while (b != 0) std::tie(a, b) = std::pair(b, a % b);
      scaled = std::min<uint64_t>(scaled / a * other, 1u << 30);
    }
    if (scaled > kStepMax) {
      return document_.Unsupported(
          id, "multipleOf",
          absl::StrCat("a step of more than ", kStepMax, " units of its last digit is not supported"));
    }
    range.step = static_cast<uint32_t>(scaled);
    range.step_scale = scale;
    return absl::OkStatus();
  }

  // ---- strings

  struct Text {
    uint32_t min = 0, max = kNoLimit;
    std::optional<Dfa> content;                   // what patterns and formats allow
    std::optional<Regex::Repetition> repetition;  // in place of `content`
  };

  absl::StatusOr<Dfa> PatternDfa(const std::string& pattern) {
    if (const auto it = patterns_.find(pattern); it != patterns_.end()) return it->second;
    RegexSyntax syntax;
    syntax.ecma = true;
    syntax.search = true;
    TP_ASSIGN_OR_RETURN(const Regex regex, Regex::Parse(pattern, syntax, budget_));
    TP_ASSIGN_OR_RETURN(Dfa dfa, regex.ToDfa(budget_));
    return patterns_.emplace(pattern, std::move(dfa)).first->second;
  }

  absl::StatusOr<Dfa> FormatDfa(Id id, const std::string& format) {
    const std::string key = absl::StrCat("\nformat ", format);
    if (const auto it = patterns_.find(key); it != patterns_.end()) return it->second;
    const std::optional<std::string_view> pattern = FormatPattern(format);
    if (!pattern) return document_.Unsupported(id, "format", absl::StrCat("'", format, "' is not supported"));
    TP_ASSIGN_OR_RETURN(const Regex regex, Regex::Parse(*pattern, {}, budget_));
    TP_ASSIGN_OR_RETURN(Dfa dfa, regex.ToDfa(budget_));
    return patterns_.emplace(key, std::move(dfa)).first->second;
  }

  absl::StatusOr<Text> TextOf(const Ids& atoms) {
    Text out;
    std::vector<std::pair<Id, std::string>> patterns;
    std::vector<std::pair<Id, std::string>> formats;
    for (const Id id : atoms) {
      if (const Json* min = document_.Find(id, "minLength")) out.min = std::max(out.min, CountOf(*min));
      if (const Json* max = document_.Find(id, "maxLength")) out.max = std::min(out.max, CountOf(*max));
      if (const Json* pattern = document_.Find(id, "pattern"))
        patterns.emplace_back(id, pattern->get<std::string>());
      if (const Json* format = document_.Find(id, "format"))
        formats.emplace_back(id, format->get<std::string>());
    }
    for (const auto& [id, format] : formats) {
      TP_ASSIGN_OR_RETURN(Dfa dfa, FormatDfa(id, format));
      TP_RETURN_IF_ERROR(Narrow(out, std::move(dfa)));
    }
    if (patterns.size() == 1 && formats.empty()) {
      RegexSyntax syntax;
      syntax.ecma = true;
      syntax.search = true;
      const absl::StatusOr<Regex> regex = Regex::Parse(patterns[0].second, syntax, budget_);
      if (!regex.ok()) return At(regex.status(), patterns[0].first, "pattern");
      out.repetition = regex->AsRepetition();
    }
    for (const auto& [id, pattern] : patterns) {
      absl::StatusOr<Dfa> dfa = PatternDfa(pattern);
      if (!dfa.ok()) return At(dfa.status(), id, "pattern");
      if (absl::Status status = Narrow(out, *std::move(dfa)); !status.ok()) return At(status, id, "pattern");
    }
    return out;
  }

  absl::Status At(const absl::Status& status, Id id, std::string_view keyword) const {
    return Annotate(status, absl::StrCat(document_.pointer(id), "/", std::string(keyword)));
  }

  absl::Status Narrow(Text& text, Dfa dfa) {
    if (!text.content) {
      text.content = std::move(dfa);
      return absl::OkStatus();
    }
    TP_ASSIGN_OR_RETURN(text.content, Intersect(*text.content, dfa, budget_));
    return absl::OkStatus();
  }

  // The texts themselves, lengths included.
  absl::StatusOr<Dfa> ContentOf(const Text& text) {
    if (text.min > text.max) return Dfa{};
    if (!text.content) {
      TP_ASSIGN_OR_RETURN(const Dfa any, AnyUtf8(budget_));
      return OfLength(any, text.min, text.max, budget_);
    }
    if (text.content->empty()) return Dfa{};
    const uint32_t shortest = CharactersMin(*text.content), longest = CharactersMax(*text.content);
    const uint32_t min = shortest >= text.min ? 0 : text.min;
    const uint32_t max = longest <= text.max ? kNoLimit : text.max;
    if (min == 0 && max == kNoLimit) return *text.content;
    return OfLength(*text.content, min, max, budget_);
  }

  absl::StatusOr<NodeId> StringNode(const Ids& atoms) {
    TP_ASSIGN_OR_RETURN(const Text text, TextOf(atoms));
    if (text.min > text.max) return pool_.Nothing();
    if (!text.content) return json_.StringOfLength(text.min, text.max);
    if (text.repetition) {
      const Regex::Repetition& r = *text.repetition;
      const uint32_t min = std::max(r.min, text.min), max = std::min(r.max, text.max);
      // A few characters are as well written out.
      constexpr uint32_t kWorthCounting = 8;
      if (min <= max &&
          ((max != kNoLimit && max > kWorthCounting) || (max == kNoLimit && min > kWorthCounting))) {
        return json_.StringOfSet(r.set, min, max);
      }
    }
    absl::StatusOr<Dfa> content = ContentOf(text);
    if (!content.ok()) return Annotate(content.status(), document_.pointer(atoms[0]));
    return json_.StringOf(*content);
  }

  // ---- arrays

  struct Items {
    std::vector<Ids> prefix;
    Ids rest;
    uint32_t min = 0, max = kNoLimit;
  };

  Items ItemsOf(const Ids& atoms) {
    Items out;
    struct Part {
      std::vector<Id> prefix;
      std::optional<Id> rest;
    };
    std::vector<Part> parts;
    size_t longest = 0;
    for (const Id id : atoms) {
      if (const Json* min = document_.Find(id, "minItems")) out.min = std::max(out.min, CountOf(*min));
      if (const Json* max = document_.Find(id, "maxItems")) out.max = std::min(out.max, CountOf(*max));
      Part part;
      const Json* items = document_.Find(id, "items");
      const Json* prefix = document_.Find(id, "prefixItems");
      const char* name = "prefixItems";
      if (prefix == nullptr && items != nullptr && items->is_array()) {
        prefix = items;
        name = "items";
        items = document_.Find(id, "additionalItems");
      }
      if (prefix != nullptr) {
        for (size_t i = 0; i < prefix->size(); ++i) {
          part.prefix.push_back(document_.Child(id, (*prefix)[i], absl::StrCat("/", name, "/", i)));
        }
      }
      if (items != nullptr) part.rest = document_.Child(id, *items, "/items");
      longest = std::max(longest, part.prefix.size());
      parts.push_back(std::move(part));
    }
    out.prefix.resize(longest);
    for (const Part& part : parts) {
      for (size_t i = 0; i < longest; ++i) {
        if (i < part.prefix.size()) {
          out.prefix[i].push_back(part.prefix[i]);
        } else if (part.rest) {
          out.prefix[i].push_back(*part.rest);
        }
      }
      if (part.rest) out.rest.push_back(*part.rest);
    }
    return out;
  }

  // Whether `ids` hold the schema `false` itself.
  bool HasFalse(const Ids& ids) const {
    return std::any_of(ids.begin(), ids.end(), [this](Id id) {
      const Json& node = document_.node(id);
      return node.is_boolean() && !node.get<bool>();
    });
  }

  absl::StatusOr<NodeId> ArrayNode(const Ids& atoms) {
    const Items items = ItemsOf(atoms);
    const uint32_t limit = budget_.limits().repeat_max;
    if (items.min > items.max) return pool_.Nothing();
    if (items.min > limit) {
      return document_.Unsupported(atoms[0], "minItems",
                                   absl::StrCat("more than ", limit, " are not supported"));
    }
    uint32_t max = items.max != kNoLimit && items.max > limit ? limit : items.max;
    // Behind the first item that cannot be there are no others.
    for (uint32_t i = 0; i <= items.prefix.size(); ++i) {
      if (HasFalse(i < items.prefix.size() ? items.prefix[i] : items.rest)) {
        max = std::min(max, i);
        break;
      }
    }
    if (items.min > max) return pool_.Nothing();
    ExpressionPool::Graph graph;
    const uint32_t open = graph.Add(), closing = graph.Add();
    graph.Connect(0, json_.Punctuation('['), open);
    graph.Connect(closing, json_.Close(']'), 1);
    if (items.min == 0) graph.Connect(open, pool_.Literal("]"), 1);
    const auto written = static_cast<uint32_t>(std::max<size_t>(items.prefix.size() + 1, items.min));
    const uint32_t last = max == kNoLimit ? written : max;
    uint32_t before = open;
    const NodeId comma = json_.Punctuation(',');
    for (uint32_t i = 0; i < last; ++i) {
      TP_RETURN_IF_ERROR(budget_.Work(16));
      TP_ASSIGN_OR_RETURN(const NodeId item, Value(i < items.prefix.size() ? items.prefix[i] : items.rest));
      const uint32_t behind = graph.Add();
      graph.Connect(before, item, behind);
      if (i + 1 >= items.min) graph.Skip(behind, closing);
      if (i + 1 < last || max == kNoLimit) {
        before = graph.Add();
        graph.Connect(behind, comma, before);
      }
      if (i + 1 == last && max == kNoLimit) {
        TP_ASSIGN_OR_RETURN(const NodeId more, Value(items.rest));
        graph.Connect(before, more, behind);
      }
    }
    return pool_.FromGraph(std::move(graph));
  }

  // ---- objects

  struct Member {
    std::string name;
    Ids value;
    bool required = false;
  };
  struct Members {
    std::vector<Member> known;  // in the order in which they are written
    uint32_t required = 0;
    uint32_t min = 0, max = kNoLimit;
    std::vector<std::pair<Id, std::string>> patterns;  // of patternProperties, without duplicates
  };

  absl::StatusOr<bool> NameMatches(Id id, const std::string& pattern, const std::string& name) {
    const absl::StatusOr<Dfa> dfa = PatternDfa(pattern);
    if (!dfa.ok()) return At(dfa.status(), id, "patternProperties");
    return dfa->Matches(name);
  }

  absl::StatusOr<Members> MembersOf(const Ids& atoms) {
    Members out;
    absl::flat_hash_map<std::string, size_t> index;
    const auto add = [&](const std::string& name) -> Member& {
      const auto [it, fresh] = index.emplace(name, out.known.size());
      if (fresh) out.known.push_back({name, {}, false});
      return out.known[it->second];
    };
    for (const Id id : atoms) {
      if (const Json* properties = document_.Find(id, "properties")) {
        for (const auto& item : properties->items()) {
          TP_RETURN_IF_ERROR(budget_.Work(16));
          add(item.key());
        }
      }
      if (const Json* min = document_.Find(id, "minProperties")) out.min = std::max(out.min, CountOf(*min));
      if (const Json* max = document_.Find(id, "maxProperties")) out.max = std::min(out.max, CountOf(*max));
      if (const Json* patterns = document_.Find(id, "patternProperties")) {
        for (const auto& item : patterns->items()) {
          const bool known = std::any_of(out.patterns.begin(), out.patterns.end(),
                                         [&](const auto& p) { return p.second == item.key(); });
          if (!known) out.patterns.emplace_back(id, item.key());
        }
      }
    }
    for (const Id id : atoms) {
      const Json* required = document_.Find(id, "required");
      if (required == nullptr) continue;
      for (const Json& name : *required) {
        TP_RETURN_IF_ERROR(budget_.Work(16));
        Member& member = add(name.get<std::string>());
        if (!member.required) ++out.required;
        member.required = true;
      }
    }
    for (Member& member : out.known) {
      TP_RETURN_IF_ERROR(budget_.Work(16 * atoms.size()));
      for (const Id id : atoms) {
        TP_RETURN_IF_ERROR(AppliesTo(id, member.name, member.value));
        if (const Json* names = document_.Find(id, "propertyNames")) {
          TP_ASSIGN_OR_RETURN(const bool valid,
                              Valid(Json(member.name), document_.Child(id, *names, "/propertyNames"), 0));
          if (!valid) member.value.push_back(Never());
        }
      }
    }
    return out;
  }

  Id Never() {
    if (!never_) never_ = document_.Synthetic(document_.root(), Json(false), "");
    return *never_;
  }

  // Appends the schemas of `id` for the value of property `name`.
  absl::Status AppliesTo(Id id, const std::string& name, Ids& out) {
    bool found = false;
    if (const Json* properties = document_.Find(id, "properties")) {
      if (const auto it = properties->find(name); it != properties->end()) {
        out.push_back(document_.Child(id, *it, absl::StrCat("/properties/", PointerToken(name))));
        found = true;
      }
    }
    if (const Json* patterns = document_.Find(id, "patternProperties")) {
      for (const auto& [pattern, schema] : patterns->items()) {
        TP_ASSIGN_OR_RETURN(const bool matches, NameMatches(id, pattern, name));
        if (!matches) continue;
        out.push_back(
            document_.Child(id, schema, absl::StrCat("/patternProperties/", PointerToken(pattern))));
        found = true;
      }
    }
    if (const Json* rest = document_.Find(id, "additionalProperties"); rest != nullptr && !found) {
      out.push_back(document_.Child(id, *rest, "/additionalProperties"));
    }
    return absl::OkStatus();
  }

  // Names that are not known ones, by what their values have to be.
  struct Region {
    std::optional<Dfa> names;   // nullopt: any name at all
    std::vector<bool> matches;  // by pattern
  };

  // The schema says what properties there are and nothing about others: then there are none. Clients mean it
  // so (their libraries leave additionalProperties out of a tool's parameters), and a model that may add to
  // an object without end sometimes does. As xgrammar and llama.cpp have it.
  bool NamesAll(const Ids& atoms, const Members& members) const {
    bool names = false;
    for (const Id id : atoms) {
      names = names || (document_.Find(id, "properties") != nullptr && !document_.IsSynthetic(id));
      for (const char* others : {"additionalProperties", "patternProperties", "propertyNames"}) {
        if (document_.Find(id, others) != nullptr) return false;
      }
    }
    return names && members.min <= members.known.size();
  }

  absl::StatusOr<std::vector<std::pair<NodeId, NodeId>>> Additional(const Ids& atoms,
                                                                    const Members& members) {
    std::vector<std::pair<NodeId, NodeId>> out;  // name, value
    std::vector<Region> regions(1);
    const auto any = [this] { return AnyUtf8(budget_); };
    // Where nothing may follow anyway, the names need not be told apart.
    const bool closed = members.patterns.empty() && std::any_of(atoms.begin(), atoms.end(), [&](Id id) {
                          const Json* rest = document_.Find(id, "additionalProperties");
                          return rest != nullptr && rest->is_boolean() && !rest->get<bool>();
                        });
    if (closed || NamesAll(atoms, members)) return out;
    if (!members.known.empty()) {
      std::vector<std::string> names;
      for (const Member& member : members.known) names.push_back(member.name);
      TP_ASSIGN_OR_RETURN(const Dfa known, OneOf(std::move(names), budget_));
      TP_ASSIGN_OR_RETURN(const Dfa all, any());
      TP_ASSIGN_OR_RETURN(regions[0].names, Subtract(all, known, budget_));
    }
    for (const Id id : atoms) {
      const Json* names = document_.Find(id, "propertyNames");
      if (names == nullptr) continue;
      TP_ASSIGN_OR_RETURN(const Dfa good, NamesOf(id, document_.Child(id, *names, "/propertyNames")));
      if (!regions[0].names) {
        regions[0].names = good;
      } else {
        TP_ASSIGN_OR_RETURN(regions[0].names, Intersect(*regions[0].names, good, budget_));
      }
    }
    for (const auto& [id, pattern] : members.patterns) {
      absl::StatusOr<Dfa> dfa = PatternDfa(pattern);
      if (!dfa.ok()) return At(dfa.status(), id, "patternProperties");
      std::vector<Region> split;
      for (Region& region : regions) {
        if (!region.names) {
          TP_ASSIGN_OR_RETURN(region.names, any());
        }
        TP_ASSIGN_OR_RETURN(Dfa inside, Intersect(*region.names, *dfa, budget_));
        TP_ASSIGN_OR_RETURN(Dfa outside, Subtract(*region.names, *dfa, budget_));
        for (const bool in : {true, false}) {
          Dfa& part = in ? inside : outside;
          if (part.empty()) continue;
          Region fresh{std::move(part), region.matches};
          fresh.matches.push_back(in);
          split.push_back(std::move(fresh));
        }
      }
      if (split.size() > kKeyRegionsMax) {
        return document_.Unsupported(
            id, "patternProperties",
            absl::StrCat("its patterns overlap in more ways than the limit of ", kKeyRegionsMax));
      }
      regions = std::move(split);
    }
    for (const Region& region : regions) {
      if (region.names && region.names->empty()) continue;
      Ids value;
      for (const Id id : atoms) {
        bool found = false;
        if (const Json* patterns = document_.Find(id, "patternProperties")) {
          for (size_t p = 0; p < members.patterns.size(); ++p) {
            if (!region.matches[p]) continue;
            const auto it = patterns->find(members.patterns[p].second);
            if (it == patterns->end()) continue;
            found = true;
            value.push_back(document_.Child(
                id, *it, absl::StrCat("/patternProperties/", PointerToken(members.patterns[p].second))));
          }
        }
        if (const Json* rest = document_.Find(id, "additionalProperties"); rest != nullptr && !found) {
          value.push_back(document_.Child(id, *rest, "/additionalProperties"));
        }
      }
      if (HasFalse(value)) continue;
      NodeId name = json_.String();
      if (region.names) {
        TP_ASSIGN_OR_RETURN(name, json_.StringOf(*region.names));
      }
      TP_ASSIGN_OR_RETURN(const NodeId node, Value(value));
      out.emplace_back(name, node);
    }
    return out;
  }

  // The texts that a schema of strings allows.
  absl::StatusOr<Dfa> NamesOf(Id owner, Id id) {
    TP_ASSIGN_OR_RETURN(const std::vector<Ids> ways, Expand({id}));
    if (ways.empty()) return Dfa{};
    if (ways.size() > 1)
      return document_.Unsupported(owner, "propertyNames", "alternatives are not supported");
    TP_ASSIGN_OR_RETURN(const std::optional<std::vector<Json>> values, Constants(ways[0]));
    if (values) {
      std::vector<std::string> names;
      for (const Json& value : *values) {
        if (value.is_string()) names.push_back(value.get<std::string>());
      }
      return OneOf(std::move(names), budget_);
    }
    if ((TypesOf(ways[0]) & kString) == 0) return Dfa{};
    TP_ASSIGN_OR_RETURN(const Text text, TextOf(ways[0]));
    return ContentOf(text);
  }

  absl::StatusOr<NodeId> ObjectNode(const Ids& atoms) {
    TP_ASSIGN_OR_RETURN(const Members members, MembersOf(atoms));
    if (members.min > members.max) return pool_.Nothing();
    TP_ASSIGN_OR_RETURN(const auto additional, Additional(atoms, members));
    std::vector<std::optional<NodeId>> values;  // nullopt: may not be there
    uint32_t possible = 0;
    for (const Member& member : members.known) {
      if (HasFalse(member.value)) {
        if (member.required) return pool_.Nothing();
        values.push_back(std::nullopt);
        continue;
      }
      TP_ASSIGN_OR_RETURN(const NodeId value, Value(member.value));
      values.push_back(value);
      ++possible;
    }
    // Additional properties may come twice, so only one of them is sure to count.
    const uint32_t distinct = possible + (additional.empty() ? 0 : 1);
    if (members.min > distinct) {
      if (additional.empty()) return pool_.Nothing();
      for (const Id id : atoms) {
        if (document_.Find(id, "minProperties") == nullptr) continue;
        return document_.Unsupported(id, "minProperties",
                                     absl::StrCat("more than the named properties and one more (", distinct,
                                                  ") cannot be guaranteed"));
      }
    }
    const bool count_min = members.min > members.required;
    const uint32_t limit = budget_.limits().repeat_max;
    const bool count_max = members.max < possible || (members.max != kNoLimit && !additional.empty());
    const uint32_t max = std::min(members.max, std::max(limit, members.required));

    ExpressionPool::Graph graph;
    const uint32_t closing = graph.Add();
    graph.Connect(closing, json_.Close('}'), 1);
    const NodeId comma = json_.Punctuation(','), colon = json_.Punctuation(':');
    const auto n = static_cast<uint32_t>(members.known.size());
    // The last required property, behind which the object may end.
    uint32_t needed = 0;
    for (uint32_t i = 0; i < n; ++i) {
      if (members.known[i].required) needed = i + 1;
    }
    // Where the writer stands: next property; properties that count for the minimum, for the maximum (0 where
    // there is none); whether an additional one was there.
    using Place = std::tuple<uint32_t, uint32_t, uint32_t, bool>;
    std::map<Place, uint32_t> choose, behind;  // about to write a name; behind a property
    std::vector<std::pair<Place, bool>> todo;  // and whether it is a `choose`
    const auto at = [&](std::map<Place, uint32_t>& map, const Place& place, bool is_choose) {
      const auto [it, fresh] = map.emplace(place, 0);
      if (fresh) {
        it->second = graph.Add();
        todo.emplace_back(place, is_choose);
      }
      return it->second;
    };
    const auto may_end = [&](const Place& place) {
      return std::get<0>(place) >= needed && (!count_min || std::get<1>(place) >= members.min);
    };
    const auto after = [&](const Place& place, uint32_t next, bool extra) -> std::optional<Place> {
      auto [i, low, high, had_extra] = place;
      if (count_max && ++high > max) return std::nullopt;
      if (count_min && !(extra && had_extra)) low = std::min(low + 1, members.min);
      return Place{next, low, high, count_min && (had_extra || extra)};
    };
    const Place begin{0, 0, 0, false};
    const uint32_t open = graph.Add();
    graph.Connect(0, json_.Punctuation('{'), open);
    graph.Skip(open, at(choose, begin, true));
    if (may_end(begin)) graph.Connect(open, pool_.Literal("}"), 1);
    while (!todo.empty()) {
      const auto [place, is_choose] = todo.back();
      todo.pop_back();
      TP_RETURN_IF_ERROR(budget_.Work(64));
      if (graph.states > budget_.limits().states_max / 8)
        return budget_.AddStates(budget_.limits().states_max);
      if (!is_choose) {
        const uint32_t state = behind.at(place);
        if (may_end(place)) graph.Skip(state, closing);
        graph.Connect(state, comma, at(choose, place, true));
        continue;
      }
      const uint32_t state = choose.at(place);
      const auto& [i, low, high, had_extra] = place;
      if (i < n) {
        if (values[i]) {
          if (const std::optional<Place> next = after(place, i + 1, false)) {
            const NodeId name = pool_.Literal(Json(members.known[i].name).dump());
            graph.Connect(state, pool_.Sequence({name, colon, *values[i]}), at(behind, *next, false));
          }
        }
        if (!members.known[i].required) {
          graph.Skip(state, at(choose, {i + 1, low, high, had_extra}, true));
        }
        continue;
      }
      for (const auto& [name, value] : additional) {
        if (const std::optional<Place> next = after(place, n, true)) {
          graph.Connect(state, pool_.Sequence({name, colon, value}), at(behind, *next, false));
        }
      }
    }
    return pool_.FromGraph(std::move(graph));
  }

  // ---- validation, of constants

  absl::StatusOr<bool> Valid(const Json& value, Id id, int depth) {
    TP_RETURN_IF_ERROR(budget_.Work(32));
    if (depth > 2 * budget_.limits().nesting_max) {
      return absl::InvalidArgumentError(absl::StrCat(document_.pointer(id), ": references without end"));
    }
    TP_RETURN_IF_ERROR(document_.Check(id));
    const Json& node = document_.node(id);
    if (node.is_boolean()) return node.get<bool>();
    if (document_.Find(id, "$ref") != nullptr) {
      TP_ASSIGN_OR_RETURN(const Id target, document_.Resolve(id));
      TP_ASSIGN_OR_RETURN(const bool valid, Valid(value, target, depth + 1));
      if (!valid || document_.ref_hides_siblings()) return valid;
    }
    const TypeBit type = TypeOf(value);
    if ((document_.Types(id) & type) == 0) return false;
    if (const Json* never = document_.Find(id, "not")) {
      if (!never->is_boolean() || never->get<bool>()) return false;
    }
    if (const Json* one = document_.Find(id, "const"); one != nullptr) {
      TP_ASSIGN_OR_RETURN(const bool equal, JsonEqual(*one, value, budget_));
      if (!equal) return false;
    }
    if (const Json* list = document_.Find(id, "enum")) {
      bool found = false;
      for (const Json& option : *list) {
        TP_ASSIGN_OR_RETURN(found, JsonEqual(option, value, budget_));
        if (found) break;
      }
      if (!found) return false;
    }
    for (const char* keyword : {"allOf", "anyOf", "oneOf"}) {
      const Json* parts = document_.Find(id, keyword);
      if (parts == nullptr) continue;
      size_t good = 0;
      for (size_t i = 0; i < parts->size(); ++i) {
        TP_ASSIGN_OR_RETURN(
            const bool valid,
            Valid(value, document_.Child(id, (*parts)[i], absl::StrCat("/", keyword, "/", i)), depth + 1));
        good += valid ? 1 : 0;
      }
      const std::string_view name = keyword;
      if (name == "allOf" ? good != parts->size() : name == "anyOf" ? good == 0 : good != 1) return false;
    }
    std::vector<Alternatives> choices;
    TP_RETURN_IF_ERROR(AddDependencies(id, nullptr, choices));
    for (const Alternatives& choice : choices) {
      bool any = false;
      for (const Id option : choice.options) {
        TP_ASSIGN_OR_RETURN(const bool valid, Valid(value, option, depth + 1));
        any |= valid;
      }
      if (type == kObject && !any) return false;
    }
    const Ids self{id};
    if ((type & kNumber) != 0) {
      TP_ASSIGN_OR_RETURN(const std::optional<NumberRange> range, Range(self, kNumber));
      if (range && !InRange(value, *range)) return false;
    }
    if (type == kString) {
      const auto& text = value.get_ref<const std::string&>();
      TP_ASSIGN_OR_RETURN(const Text rules, TextOf(self));
      size_t characters = 0;
      for (const char c : text) characters += (static_cast<uint8_t>(c) & 0xC0) != 0x80 ? 1 : 0;
      if (characters < rules.min || (rules.max != kNoLimit && characters > rules.max)) return false;
      if (rules.content && !rules.content->Matches(text)) return false;
    }
    if (type == kArray) {
      const Items items = ItemsOf(self);
      if (value.size() < items.min || (items.max != kNoLimit && value.size() > items.max)) return false;
      for (size_t i = 0; i < value.size(); ++i) {
        for (const Id item : i < items.prefix.size() ? items.prefix[i] : items.rest) {
          TP_ASSIGN_OR_RETURN(const bool valid, Valid(value[i], item, depth + 1));
          if (!valid) return false;
        }
      }
    }
    if (type == kObject) {
      TP_ASSIGN_OR_RETURN(const Members members, MembersOf(self));
      if (value.size() < members.min || (members.max != kNoLimit && value.size() > members.max)) return false;
      for (const Member& member : members.known) {
        if (member.required && !value.contains(member.name)) return false;
      }
      const Json* names = document_.Find(id, "propertyNames");
      for (const auto& [name, item] : value.items()) {
        Ids schemas;
        TP_RETURN_IF_ERROR(AppliesTo(id, name, schemas));
        for (const Id schema : schemas) {
          TP_ASSIGN_OR_RETURN(const bool valid, Valid(item, schema, depth + 1));
          if (!valid) return false;
        }
        if (names == nullptr) continue;
        TP_ASSIGN_OR_RETURN(const bool valid,
                            Valid(Json(name), document_.Child(id, *names, "/propertyNames"), depth + 1));
        if (!valid) return false;
      }
    }
    return true;
  }

  static bool InRange(const Json& value, const NumberRange& range) {
    const Decimal number = Decimal::Parse(value.dump());
    if (range.low) {
      const int c = Decimal::Compare(number, range.low->value);
      if (c < 0 || (c == 0 && range.low->exclusive)) return false;
    }
    if (range.high) {
      const int c = Decimal::Compare(number, range.high->value);
      if (c > 0 || (c == 0 && range.high->exclusive)) return false;
    }
    if (!range.step) return true;
    if (number.fraction.size() > range.step_scale) return false;
    std::string digits = number.whole + number.fraction;
    digits.append(range.step_scale - number.fraction.size(), '0');
    uint64_t rest = 0;
    for (const char c : digits) rest = (rest * 10 + static_cast<uint64_t>(c - '0')) % *range.step;
    return rest == 0;
  }

  SchemaDocument document_;
  ExpressionPool& pool_;
  Budget& budget_;
  JsonPieces& json_;
  std::map<Ids, NodeId> values_;
  std::map<Ids, uint32_t> merged_;  // rules
  std::vector<std::pair<uint32_t, Ids>> pending_;
  absl::flat_hash_map<std::string, Dfa> patterns_;
  std::map<std::pair<Id, std::string>, Alternatives> dependencies_;
  absl::flat_hash_set<Id> exclusive_;
  std::optional<Id> never_;
};

}  // namespace

absl::StatusOr<ExpressionPool::Id> CompileJsonSchema(const nlohmann::ordered_json& schema,
                                                     JsonWhitespace whitespace, ExpressionPool& pool) {
  return SchemaCompiler(schema, whitespace, pool).Run();
}

}  // namespace tidepool::structured
