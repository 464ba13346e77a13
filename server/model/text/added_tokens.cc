#include "server/model/text/added_tokens.h"

#include <algorithm>

#include "server/model/strings/unicode.h"
#include "server/model/strings/utf8.h"
#include "server/model/text/unicode_classes.h"

namespace tidepool {

namespace {

bool IsWordCharacter(uint32_t cp) { return unicode_classes::Table::Get().Is(cp, unicode_classes::kWord); }

bool EndsWithWord(std::string_view text) {
  if (text.empty()) return false;
  size_t pos = text.size() - 1;
  while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80) --pos;
  return IsWordCharacter(utf8::Next(text, pos));
}

bool StartsWithWord(std::string_view text) {
  size_t pos = 0;
  return !text.empty() && IsWordCharacter(utf8::Next(text, pos));
}

bool Overlaps(std::span<const ByteRange> data, size_t begin, size_t end) {
  const auto it = std::upper_bound(data.begin(), data.end(), begin,
                                   [](size_t at, const ByteRange& range) { return at < range.end; });
  return it != data.end() && it->begin < end;
}

}  // namespace

void AddedTokens::Add(const AddedToken& token, std::string pattern) {
  if (pattern.empty()) return;
  patterns_[token.normalized].push_back({std::move(pattern), static_cast<int32_t>(tokens_.size())});
  special_in_normalized_ |= token.special && token.normalized;
  tokens_.push_back(token);
}

void AddedTokens::Build() {
  for (size_t set = 0; set < 2; ++set) {
    std::vector<Pattern>& patterns = patterns_[set];
    std::stable_sort(patterns.begin(), patterns.end(),
                     [](const Pattern& a, const Pattern& b) { return a.text < b.text; });
    Trie& trie = tries_[set];
    // Breadth first, so that a node's edges lie together; no recursion, since a token may be long.
    struct Work {
      uint32_t node;
      size_t begin, end, depth;
    };
    std::vector<Work> work{{0, 0, patterns.size(), 0}};
    for (size_t w = 0; w < work.size(); ++w) {
      auto [node, begin, end, depth] = work[w];
      if (begin < end && patterns[begin].text.size() == depth) trie.nodes[node].token = patterns[begin].token;
      while (begin < end && patterns[begin].text.size() == depth) ++begin;
      trie.nodes[node].first_edge = static_cast<uint32_t>(trie.edges.size());
      while (begin < end) {
        const char byte = patterns[begin].text[depth];
        size_t last = begin + 1;
        while (last < end && patterns[last].text[depth] == byte) ++last;
        const auto child = static_cast<uint32_t>(trie.nodes.size());
        trie.nodes.emplace_back();
        trie.edges.push_back({static_cast<uint8_t>(byte), child});
        ++trie.nodes[node].edges;
        work.push_back({child, begin, last, depth + 1});
        begin = last;
      }
    }
    trie.root.fill(-1);
    for (uint32_t e = 0; e < trie.nodes[0].edges; ++e) {
      trie.root[trie.edges[e].byte] = static_cast<int32_t>(trie.edges[e].node);
    }
    patterns.clear();
    patterns.shrink_to_fit();
  }
}

void AddedTokens::Split(std::string_view text, bool normalized, bool parse_special,
                        std::span<const ByteRange> data, std::vector<Part>& parts) const {
  const Trie& trie = tries_[normalized];
  parts.clear();
  const auto accepted = [&](const AddedToken& token, size_t begin, size_t end) {
    return data.empty() || !token.special || !Overlaps(data, begin, end);
  };
  size_t done = 0;
  for (size_t pos = 0; pos < text.size();) {
    const int32_t root = trie.root[static_cast<uint8_t>(text[pos])];
    if (root < 0) {
      ++pos;
      continue;
    }
    // The longest token that begins here. Each start walks at most the longest token's bytes.
    int32_t found = -1;
    size_t found_end = pos;
    const Node* node = &trie.nodes[static_cast<size_t>(root)];
    for (size_t i = pos + 1;; ++i) {
      if (node->token >= 0 && accepted(tokens_[static_cast<size_t>(node->token)], pos, i)) {
        found = node->token;
        found_end = i;
      }
      if (i == text.size()) break;
      const Edge* edge = trie.edges.data() + node->first_edge;
      const Edge* const last = edge + node->edges;
      while (edge < last && edge->byte != static_cast<uint8_t>(text[i])) ++edge;
      if (edge == last) break;
      node = &trie.nodes[edge->node];
    }
    if (found < 0) {
      ++pos;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found)];
    size_t begin = pos, end = found_end;
    pos = found_end;
    // A match that is refused from here on still takes its bytes, as in the library.
    if (token.special && !parse_special) continue;
    if (token.single_word && (EndsWithWord(text.substr(0, begin)) || StartsWithWord(text.substr(end))))
      continue;
    if (token.lstrip) {
      // A match inside what the one before has stripped keeps its own place.
      const size_t from = std::min(done, begin);
      begin = std::max(done,
                       from + unicode::StripWhiteSpace(text.substr(from, begin - from), false, true).size());
    }
    if (token.rstrip) {
      const std::string_view after = text.substr(end);
      end += after.size() - unicode::StripWhiteSpace(after, true, false).size();
    }
    if (begin > done) parts.push_back({done, begin, -1});
    parts.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), -1});
}

}  // namespace tidepool
