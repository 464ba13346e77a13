#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

// UTF-8 by hand: the few operations that the tokenizer and the template engine share.
namespace tidepool::utf8 {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// Appends `cp` (a scalar value; anything else is written as U+FFFD).
void Append(uint32_t cp, std::string& out);

// Reads the character at `pos` of valid UTF-8 and moves `pos` behind it. `pos` < text.size().
uint32_t Next(std::string_view text, size_t& pos);

// Bytes of the character that begins with `lead` (valid UTF-8); 1 for any other byte.
inline size_t SequenceLength(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// How a byte sequence begins: a whole character, the beginning of one, or neither.
struct Prefix {
  enum Kind { kWhole, kPartial, kInvalid } kind;
  // kWhole: the character's bytes. kInvalid: the bytes that one U+FFFD stands for (the maximal subpart,
  // Unicode 15, section 3.9, as WHATWG and Rust's from_utf8_lossy do). kPartial: all bytes left.
  size_t bytes;
};
// `bytes` must not be empty.
Prefix Classify(std::string_view bytes);

bool IsValid(std::string_view bytes);

// Invalid bytes become U+FFFD, one per maximal subpart.
std::string Sanitize(std::string_view bytes);

// Characters (code points) in valid UTF-8.
size_t Count(std::string_view text);

}  // namespace tidepool::utf8
