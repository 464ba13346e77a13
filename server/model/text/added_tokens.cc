#include "server/model/text/added_tokens.h"

#include <algorithm>

#include "server/model/text/unicode.h"
#include "server/model/text/utf8.h"

namespace tidepool {

namespace {

bool EndsWithWord(std::string_view text) {
  if (text.empty()) return false;
  size_t pos = text.size() - 1;
  while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  return unicode::IsWord(utf8::Next(text, pos));
}

bool StartsWithWord(std::string_view text) {
  size_t pos = 0;
  return !text.empty() && unicode::IsWord(utf8::Next(text, pos));
}

}  // namespace

void AddedTokens::Add(const AddedToken& token, std::string_view pattern) {
  if (pattern.empty()) return;
  Trie& trie = tries_[token.normalized];
  uint32_t at = 0;
  for (const char c : pattern) {
    const auto byte = static_cast<uint8_t>(c);
    const auto it = trie.nodes[at].next.find(byte);
    if (it != trie.nodes[at].next.end()) {
      at = it->second;
      continue;
    }
    const auto fresh = static_cast<uint32_t>(trie.nodes.size());
    trie.nodes[at].next.emplace(byte, fresh);
    trie.nodes.emplace_back();
    at = fresh;
  }
  trie.first_byte[static_cast<uint8_t>(pattern[0])] = true;
  if (trie.nodes[at].token < 0) trie.nodes[at].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::vector<AddedTokens::Part> AddedTokens::Split(std::string_view text, bool normalized,
                                                  bool parse_special) const {
  const Trie& trie = tries_[normalized];
  std::vector<Part> parts;
  size_t done = 0;
  for (size_t pos = 0; pos < text.size();) {
    if (!trie.first_byte[static_cast<uint8_t>(text[pos])]) {
      ++pos;
      continue;
    }
    // The longest token that begins here. Each start walks at most the longest token's bytes.
    int32_t found = -1;
    size_t found_end = pos;
    uint32_t at = 0;
    for (size_t i = pos; i < text.size(); ++i) {
      const auto it = trie.nodes[at].next.find(static_cast<uint8_t>(text[i]));
      if (it == trie.nodes[at].next.end()) break;
      at = it->second;
      if (trie.nodes[at].token >= 0) {
        found = trie.nodes[at].token;
        found_end = i + 1;
      }
    }
    if (found < 0) {
      ++pos;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found)];
    size_t begin = pos, end = found_end;
    pos = found_end;
    if (token.special && !parse_special) continue;
    if (token.single_word && (EndsWithWord(text.substr(0, begin)) || StartsWithWord(text.substr(end))))
      continue;
    if (token.lstrip) {
      const std::string_view before = text.substr(done, begin - done);
      begin = done + unicode::StripWhiteSpace(before, false, true).size();
    }
    if (token.rstrip) {
      const std::string_view after = text.substr(end);
      end += after.size() - unicode::StripWhiteSpace(after, true, false).size();
      pos = end;
    }
    if (begin > done) parts.push_back({done, begin, -1});
    parts.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), -1});
  return parts;
}

}  // namespace tidepool
