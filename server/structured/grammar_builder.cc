#include "server/structured/grammar_builder.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/structured/automaton.h"
#include "server/structured/ebnf.h"
#include "server/structured/expression.h"
#include "server/structured/json_pieces.h"
#include "server/structured/json_schema.h"
#include "server/structured/regex.h"
#include "server/structured/serialize.h"

namespace tidepool {

using structured::ExpressionPool;

namespace {

std::vector<ExpressionPool::Id> Ids(std::span<const GrammarBuilder::Node> nodes) {
  std::vector<ExpressionPool::Id> out;
  for (const GrammarBuilder::Node node : nodes) out.push_back(node.index);
  return out;
}

}  // namespace

GrammarBuilder::GrammarBuilder(const CompileLimits& limits)
    : pool_(std::make_unique<ExpressionPool>(limits)) {}
GrammarBuilder::~GrammarBuilder() = default;

GrammarBuilder::Node GrammarBuilder::Literal(std::string_view bytes) { return {pool_->Literal(bytes)}; }

GrammarBuilder::Node GrammarBuilder::SpecialToken(int32_t id) { return {pool_->Token(id)}; }

GrammarBuilder::Node GrammarBuilder::Sequence(std::span<const Node> parts) {
  return {pool_->Sequence(Ids(parts))};
}

GrammarBuilder::Node GrammarBuilder::Choice(std::span<const Node> options) {
  return {pool_->Choice(Ids(options))};
}

GrammarBuilder::Node GrammarBuilder::OneOf(std::vector<std::string> texts) {
  absl::StatusOr<structured::Dfa> dfa = structured::OneOf(std::move(texts), pool_->budget());
  if (!dfa.ok()) {
    pool_->Fail(dfa.status());
    return {pool_->Nothing()};
  }
  return {pool_->Automatic(*std::move(dfa))};
}

GrammarBuilder::Node GrammarBuilder::Repeat(Node node, uint32_t min, std::optional<uint32_t> max) {
  return {pool_->Repeat(node.index, min, max.value_or(UINT32_MAX))};
}

GrammarBuilder::Node GrammarBuilder::TextWithout(std::vector<std::string> stops) {
  for (const std::string& stop : stops) {
    if (stop.empty()) {
      pool_->Fail(absl::InvalidArgumentError("a stop string is empty"));
      return {pool_->Nothing()};
    }
  }
  absl::StatusOr<structured::Dfa> dfa = structured::Utf8Without(stops, pool_->budget());
  if (!dfa.ok()) {
    pool_->Fail(dfa.status());
    return {pool_->Nothing()};
  }
  return {pool_->Automatic(*std::move(dfa))};
}

absl::StatusOr<GrammarBuilder::Node> GrammarBuilder::Regex(std::string_view pattern,
                                                           const RegexOptions& options) {
  structured::RegexSyntax syntax;
  syntax.case_insensitive = options.case_insensitive;
  TP_ASSIGN_OR_RETURN(const structured::Regex regex,
                      structured::Regex::Parse(pattern, syntax, pool_->budget()));
  TP_ASSIGN_OR_RETURN(structured::Dfa dfa, regex.ToDfa(pool_->budget()));
  if (dfa.empty()) return absl::InvalidArgumentError("pattern: no text matches it");
  return Node{pool_->Automatic(std::move(dfa))};
}

absl::StatusOr<GrammarBuilder::Node> GrammarBuilder::Ebnf(std::string_view grammar) {
  TP_ASSIGN_OR_RETURN(const ExpressionPool::Id id, structured::ParseEbnf(grammar, *pool_));
  return Node{id};
}

absl::StatusOr<GrammarBuilder::Node> GrammarBuilder::JsonSchema(const nlohmann::ordered_json& schema,
                                                                JsonWhitespace whitespace) {
  TP_ASSIGN_OR_RETURN(const ExpressionPool::Id id, structured::CompileJsonSchema(schema, whitespace, *pool_));
  return Node{id};
}

absl::StatusOr<GrammarBuilder::Node> GrammarBuilder::JsonSchemaText(std::string_view schema,
                                                                    JsonWhitespace whitespace) {
  TP_ASSIGN_OR_RETURN(const nlohmann::ordered_json json,
                      structured::ParseSchemaText(schema, pool_->budget().limits()));
  return JsonSchema(json, whitespace);
}

GrammarBuilder::Node GrammarBuilder::JsonObject(JsonWhitespace whitespace) {
  return {pool_->Json(whitespace).Object()};
}

GrammarBuilder::Node GrammarBuilder::JsonValue(JsonWhitespace whitespace) {
  return {pool_->Json(whitespace).Value()};
}

absl::StatusOr<std::shared_ptr<const CompiledGrammar>> GrammarBuilder::Build(Node root) {
  TP_ASSIGN_OR_RETURN(std::unique_ptr<structured::Automaton> automaton, pool_->Compile(root.index));
  std::string bytes = structured::Serialize(*automaton);
  const size_t limit = pool_->budget().limits().bytes_max;
  if (bytes.size() > limit) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "its automaton takes ", bytes.size(), " bytes, more than the limit of ", limit, "; simplify it"));
  }
  TP_RETURN_IF_ERROR(structured::Finish(*automaton));
  TP_RETURN_IF_ERROR(pool_->budget().LookNow());
  return std::shared_ptr<const CompiledGrammar>(new CompiledGrammar(std::move(automaton), std::move(bytes)));
}

}  // namespace tidepool
