#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "server/model/strings/marked_text.h"

namespace tidepool {

// One entry of tokenizer.json's `added_tokens`.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool lstrip = false, rstrip = false;  // the match takes the white space before (behind) it
  bool single_word = false;             // matches only between non-word characters
  bool normalized = false;              // looked for in the normalised text rather than in the raw one
};

// AddedTokens: finds added tokens in a text, leftmost-longest, by a byte trie. Immutable once built (Add,
// then Build), thread-safe. Source of the rules: huggingface/tokenizers, tokenizer/added_vocabulary.rs.
class AddedTokens {
 public:
  struct Part {
    size_t begin, end;  // [begin, end), bytes
    int32_t id;         // -1: plain text
  };

  // `pattern` is what is looked for: the content, or the normalised content for `normalized` ones. Of two
  // tokens with one pattern the first counts.
  void Add(const AddedToken& token, std::string pattern);
  // Call once, after the last Add.
  void Build();

  // Cuts `text` (valid UTF-8) into tokens and plain text, in order, covering it all. Of the two sets,
  // `normalized` says which. Special ones are taken for plain text unless `parse_special`, and where they
  // overlap a range of `data` (sorted, disjoint): a shorter token, or one that begins later, is then found in
  // their place, so that nobody's data hides a token of the template.
  void Split(std::string_view text, bool normalized, bool parse_special, std::span<const ByteRange> data,
             std::vector<Part>& parts) const;

  bool empty(bool normalized) const { return tries_[normalized].nodes.size() <= 1; }
  // Whether a special token is looked for in the normalised text.
  bool special_in_normalized() const { return special_in_normalized_; }

 private:
  struct Node {
    uint32_t first_edge = 0, edges = 0;  // in Trie::edges, sorted by byte
    int32_t token = -1;                  // index into tokens_
  };
  struct Edge {
    uint8_t byte;
    uint32_t node;
  };
  struct Trie {
    std::vector<Node> nodes{1};
    std::vector<Edge> edges;
    std::array<int32_t, 256> root;  // the root's children by byte, -1: none
  };
  struct Pattern {
    std::string text;
    int32_t token;
  };

  std::array<Trie, 2> tries_;  // by AddedToken::normalized
  std::array<std::vector<Pattern>, 2> patterns_;
  std::vector<AddedToken> tokens_;
  bool special_in_normalized_ = false;
};

}  // namespace tidepool
