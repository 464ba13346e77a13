#include "server/model/text/charsmap.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/model/strings/utf8.h"

namespace tidepool {

absl::StatusOr<Charsmap> Charsmap::Parse(std::string_view base64) {
  std::string bytes;
  if (!absl::Base64Unescape(absl::string_view(base64.data(), base64.size()), &bytes)) {
    return absl::InvalidArgumentError("must be base64");
  }
  const auto word = [&](size_t at) {
    uint32_t value = 0;
    for (size_t i = 0; i < 4; ++i) value |= uint32_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
    return value;
  };
  if (bytes.size() < 4) return absl::InvalidArgumentError("is cut short: no size of the trie");
  const size_t trie_bytes = word(0);
  if (trie_bytes == 0 || trie_bytes % 4 != 0 || trie_bytes > bytes.size() - 4) {
    return absl::InvalidArgumentError(absl::StrCat("says that its trie has ", trie_bytes,
                                                   " bytes; it must be a multiple of 4, not 0 and at most ",
                                                   bytes.size() - 4));
  }
  Charsmap map;
  map.trie_.reserve(trie_bytes / 4);
  for (size_t i = 0; i < trie_bytes / 4; ++i) map.trie_.push_back(word(4 + 4 * i));
  map.replacements_ = bytes.substr(4 + trie_bytes);
  if (!utf8::IsValid(map.replacements_))
    return absl::InvalidArgumentError("has replacements that are not UTF-8");
  return map;
}

std::optional<std::string_view> Charsmap::Find(std::string_view chunk) const {
  // A unit of the double array: bits 0-7 and 31 the label, bit 8 whether a leaf hangs on it, the rest the
  // offset.
  const auto offset = [](uint32_t unit) { return (unit >> 10) << ((unit & (1u << 9)) >> 6); };
  size_t at = offset(trie_[0]);
  for (const char c : chunk) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte == 0) break;
    at ^= byte;
    if (at >= trie_.size()) return std::nullopt;
    const uint32_t unit = trie_[at];
    if ((unit & ((1u << 31) | 0xFF)) != byte) return std::nullopt;
    at ^= offset(unit);
    if ((unit >> 8 & 1) == 0) continue;
    if (at >= trie_.size()) return std::nullopt;
    const size_t begin = trie_[at] & ((1u << 31) - 1);
    if (begin >= replacements_.size())
      return begin == replacements_.size() ? std::optional("") : std::nullopt;
    // An offset into the middle of a character would give half of one.
    if ((static_cast<unsigned char>(replacements_[begin]) & 0xC0) == 0x80) return std::nullopt;
    const size_t end = std::min(replacements_.find('\0', begin), replacements_.size());
    return std::string_view(replacements_).substr(begin, end - begin);
  }
  return std::nullopt;
}

}  // namespace tidepool
