#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

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

// AddedTokens: finds added tokens in a text, leftmost-longest, by a byte trie. Immutable once built,
// thread-safe. Source of the rules: huggingface/tokenizers, tokenizer/added_vocabulary.rs.
class AddedTokens {
 public:
  struct Part {
    size_t begin, end;  // [begin, end), bytes
    int32_t id;         // -1: plain text
  };

  // `pattern` is what is looked for: the content, or the normalised content for `normalized` ones.
  void Add(const AddedToken& token, std::string_view pattern);

  // Cuts `text` (valid UTF-8) into tokens and plain text, in order, covering it all. Of the two sets,
  // `normalized` says which; special ones are taken for plain text unless `parse_special`.
  std::vector<Part> Split(std::string_view text, bool normalized, bool parse_special) const;

  bool empty(bool normalized) const { return tries_[normalized].nodes.size() <= 1; }

 private:
  struct Node {
    absl::flat_hash_map<uint8_t, uint32_t> next;
    int32_t token = -1;  // index into tokens_
  };
  struct Trie {
    std::vector<Node> nodes{1};
    bool first_byte[256] = {};
  };
  Trie tries_[2];  // by AddedToken::normalized
  std::vector<AddedToken> tokens_;
};

}  // namespace tidepool
