#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "server/structured/expression.h"

namespace tidepool::structured {

// GBNF, as llama.cpp and vLLM take it:
//
//   grammar  := rule*                          `root` is where it starts; # begins a comment
//   rule     := name "::=" choice              a rule ends where the next one begins; name: [A-Za-z0-9_-]+
//   choice   := sequence ("|" sequence)*
//   sequence := (atom repeat*)*
//   atom     := name | "literal" | [class] | [^class] | . | (choice)
//   repeat   := * | + | ? | {m} | {m,} | {m,n}
//
// Escapes in literals and classes: \n \r \t \" \\ \[ \] \- \^ \' \xHH \uHHHH \UHHHHHHHH. `.` and negated
// classes are any character, line ends included. Recursion is allowed except left recursion. Errors:
// InvalidArgument with line and column; Unimplemented for <token> references.
absl::StatusOr<ExpressionPool::Id> ParseEbnf(std::string_view grammar, ExpressionPool& pool);

}  // namespace tidepool::structured
