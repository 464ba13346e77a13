#pragma once

#include <cstdint>
#include <string>
#include <string_view>

// Character properties (utf8proc's tables), for the tokenizer's components and for the template engine's
// string methods, which follow Python's `str`.
namespace tidepool::unicode {

bool IsWhiteSpace(uint32_t cp);   // the property White_Space, as Rust has it
bool IsSpace(uint32_t cp);        // White_Space and U+001C..U+001F: Python's str.isspace
bool IsNumeric(uint32_t cp);      // general category Nd, Nl or No
bool IsPunctuation(uint32_t cp);  // ASCII punctuation and symbols, or general category P*
bool IsWord(uint32_t cp);         // regex \w: letters, marks, numbers, connector punctuation
bool IsLetter(uint32_t cp);
bool IsUpper(uint32_t cp);
bool IsLower(uint32_t cp);
bool IsPrintable(uint32_t cp);  // what Python's repr() shows as it is

// Simple (one to one) case mapping; U+00DF is upper-cased to SS as Python does.
std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Title(std::string_view text);       // str.title(): a capital after every non-letter
std::string Capitalize(std::string_view text);  // str.capitalize()

// Without the white space (IsSpace; IsWhiteSpace) at either end.
std::string_view Strip(std::string_view text, bool left, bool right);
std::string_view StripWhiteSpace(std::string_view text, bool left, bool right);
// Without the characters of `chars` at either end.
std::string_view StripChars(std::string_view text, std::string_view chars, bool left, bool right);

}  // namespace tidepool::unicode
