#include "server/structured/token_table.h"

#include <algorithm>
#include <utility>

#include "server/model/text/tokenizer.h"

namespace tidepool {

TokenTable::~TokenTable() = default;

absl::StatusOr<std::shared_ptr<const TokenTable>> TokenTable::Build(const Tokenizer& tokenizer,
                                                                    int32_t vocab_size) {
  if (vocab_size <= 0) return absl::InvalidArgumentError("the vocabulary is empty");
  std::vector<std::string> tokens(static_cast<size_t>(vocab_size));
  for (int32_t id = 0; id < std::min(vocab_size, tokenizer.vocab_size()); ++id) {
    if (!tokenizer.is_special(id)) tokens[static_cast<size_t>(id)] = tokenizer.TokenText(id);
  }
  return FromBytes(std::move(tokens));
}

std::vector<TokenTable::TrieNode> TokenTable::MakeTrie(std::span<const std::string_view> sorted) {
  std::vector<TrieNode> nodes{{0, 0, 0}};
  std::vector<uint32_t> path{0};  // nodes from the root to the key before
  std::string_view before;
  for (size_t i = 0; i < sorted.size(); ++i) {
    const std::string_view key = sorted[i];
    const auto differ = std::mismatch(key.begin(), key.end(), before.begin(), before.end()).first;
    const auto common = static_cast<size_t>(differ - key.begin());
    const auto here = static_cast<uint32_t>(nodes.size());
    while (path.size() > common + 1) {
      nodes[path.back()].end = here;
      path.pop_back();
    }
    for (size_t at = common; at < key.size(); ++at) {
      path.push_back(static_cast<uint32_t>(nodes.size()));
      nodes.push_back({0, static_cast<uint32_t>(i), static_cast<uint8_t>(key[at])});
    }
    before = key;
  }
  const auto end = static_cast<uint32_t>(nodes.size());
  for (const uint32_t n : path) nodes[n].end = end;
  nodes.push_back({end + 1, static_cast<uint32_t>(sorted.size()), 0});
  return nodes;
}

absl::StatusOr<std::shared_ptr<const TokenTable>> TokenTable::FromBytes(std::vector<std::string> tokens) {
  std::shared_ptr<TokenTable> table(new TokenTable());
  table->vocab_size_ = static_cast<int32_t>(tokens.size());
  table->begin_.reserve(tokens.size() + 1);
  table->begin_.push_back(0);
  for (const std::string& token : tokens) {
    table->bytes_ += token;
    table->begin_.push_back(static_cast<uint32_t>(table->bytes_.size()));
  }
  for (int32_t id = 0; id < table->vocab_size_; ++id) {
    if (!table->TokenBytes(id).empty()) table->order_.push_back(id);
  }
  if (table->order_.empty()) return absl::InvalidArgumentError("no token of the vocabulary has any text");
  std::sort(table->order_.begin(), table->order_.end(), [&](int32_t a, int32_t b) {
    const std::string_view x = table->TokenBytes(a), y = table->TokenBytes(b);
    return x != y ? x < y : a < b;
  });
  std::vector<std::string_view> keys;
  keys.reserve(table->order_.size());
  for (const int32_t id : table->order_) keys.push_back(table->TokenBytes(id));
  table->trie_ = MakeTrie(keys);
  size_t single = 0;
  for (uint32_t child = 1; child < table->trie_[0].end; child = table->trie_[child].end) {
    const TrieNode& node = table->trie_[child];
    table->root_child_[node.byte] = child;
    if (table->trie_[child + 1].tokens > node.tokens) ++single;
  }
  table->covers_all_bytes_ = single == 256;
  return std::shared_ptr<const TokenTable>(std::move(table));
}

size_t TokenTable::memory_bytes() const {
  return sizeof(*this) + bytes_.capacity() + begin_.capacity() * sizeof(uint32_t) +
         trie_.capacity() * sizeof(TrieNode) + order_.capacity() * sizeof(int32_t);
}

}  // namespace tidepool
