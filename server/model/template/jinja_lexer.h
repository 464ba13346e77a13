#pragma once

#include <string>
#include <string_view>
#include <vector>

// Template source → tokens, with Jinja2's white space rules for trim_blocks and lstrip_blocks both on and
// keep_trailing_newline off. Internal to the template engine; errors are thrown as jinja::Failure.
namespace tidepool::jinja {

enum class TokenKind {
  kText,  // text between tags, white space already cut
  kVariableBegin,
  kVariableEnd,  // {{ }}
  kBlockBegin,
  kBlockEnd,  // {% %}
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string text;  // kString: the value, escapes resolved
  int line;
};

// "line N: message" as a Failure of type TemplateSyntaxError.
[[noreturn]] void SyntaxError(int line, std::string message);

std::vector<Token> Tokenize(std::string_view source);

}  // namespace tidepool::jinja
