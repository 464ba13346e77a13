#include "server/gateway/structured_output.h"

#include <chrono>

#include "server/gateway/chat/constraint.h"

namespace tidepool {
namespace {

// All that the grammar is made from.
std::string Source(const InferenceRequest& request, ThoughtState thought) {
  OrderedJson parts = OrderedJson::array({static_cast<int>(thought)});
  if (request.structured) {
    const StructuredSpec& spec = *request.structured;
    parts.push_back({static_cast<int>(spec.kind), spec.schema, spec.text, spec.choices, spec.compact});
  }
  parts.push_back({static_cast<int>(request.tools.choice), request.tools.parallel});
  for (const Tool& tool : request.tools.tools) parts.push_back({tool.name, tool.parameters, tool.strict});
  return DumpJson(parts);
}

}  // namespace

std::variant<GrammarCompiler::Grammar, ApiError> GrammarCompiler::Compile(const InferenceRequest& request,
                                                                          std::string_view prompt,
                                                                          std::string_view salt) {
  if (!IsConstrained(request)) return Grammar();
  const ThoughtState thought = FindThoughtState(format_, request, prompt);
  const std::string key = GrammarCache::Key(salt, Source(request, thought));
  if (Grammar found = cache_.Find(key)) {
    probe_.grammar_hits.Add();
    return found;
  }
  probe_.grammar_misses.Add();
  const auto start = std::chrono::steady_clock::now();
  GrammarBuilder builder(limits_);
  auto node = BuildConstraint(request, format_, thought, builder);
  absl::StatusOr<Grammar> grammar;
  if (auto* root = std::get_if<GrammarBuilder::Node>(&node)) grammar = builder.Build(*root);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  probe_.grammar_compile.Observe(took.count());
  if (auto* error = std::get_if<ApiError>(&node)) {
    probe_.grammar_refused.Add();
    return std::move(*error);
  }
  if (!grammar.ok()) {
    probe_.grammar_refused.Add();
    return GrammarError(request.structured ? request.structured->field : "tools", grammar.status());
  }
  cache_.Put(key, *grammar);
  probe_.grammar_bytes.Set(static_cast<double>(cache_.stats().bytes));
  return *std::move(grammar);
}

}  // namespace tidepool
