#include "server/structured/token_class.h"

#include <algorithm>
#include <string_view>

namespace tidepool::structured {
namespace {

void SetBit(std::vector<uint32_t>& bits, int32_t id) {
  bits[static_cast<size_t>(id) / 32] |= 1u << (static_cast<size_t>(id) % 32);
}

struct Rest {
  std::string_view text;
  TokenClass::Exit exit;
};

void FinishExits(std::vector<Rest>& rests, TokenClass& out) {
  std::sort(rests.begin(), rests.end(), [](const Rest& a, const Rest& b) {
    return a.text != b.text ? a.text < b.text : a.exit.token < b.exit.token;
  });
  std::vector<std::string_view> keys;
  keys.reserve(rests.size());
  for (const Rest& rest : rests) {
    keys.push_back(rest.text);
    out.exits.push_back(rest.exit);
  }
  out.exit_trie = TokenTable::MakeTrie(keys);
}

class ClassWalk {
 public:
  ClassWalk(const Terminal& terminal, const TokenTable& table, TokenClass& out)
      : terminal_(terminal), dfa_(terminal.dfa), table_(table), trie_(table.trie()), out_(out) {}

  void Run(uint32_t state) {
    out_.inside.assign(table_.mask_words(), 0);
    if (terminal_.counted) out_.few.assign(TokenClass::kFew, out_.inside);
    Walk(0, state, 0, 0);
    if (!out_.usable) {
      out_ = TokenClass{};
      out_.usable = false;
      return;
    }
    for (size_t k = 1; k < out_.few.size(); ++k) {
      for (size_t w = 0; w < out_.few[k].size(); ++w) out_.few[k][w] |= out_.few[k - 1][w];
    }
    std::sort(out_.by_units.begin(), out_.by_units.end(), [](const auto& a, const auto& b) {
      return a.units != b.units ? a.units > b.units : a.token < b.token;
    });
    FinishExits(rests_, out_);
  }

 private:
  struct End {
    size_t bytes;
    uint32_t units;
  };

  // Node `v`, `bytes` deep, was reached in `state`.
  void Walk(uint32_t v, uint32_t state, size_t bytes, uint32_t units) {
    for (uint32_t c = v + 1; c < trie_[v].end; c = trie_[c].end) {
      const uint32_t to = dfa_.Next(state, trie_[c].byte);
      if (to == kDead) {
        if (!ends_.empty()) AddExits(c);
        if (!out_.usable) return;
        continue;
      }
      const bool final = dfa_.IsFinal(to);
      const uint32_t begun = units + (terminal_.counted && state == 0 && !final ? 1 : 0);
      for (uint32_t i = trie_[c].tokens; i < trie_[c + 1].tokens; ++i)
        AddInside(table_.order()[i], begun, final);
      if (trie_[c].end == c + 1) continue;
      if (final) ends_.push_back({bytes + 1, begun});
      Walk(c, to, bytes + 1, begun);
      if (final) ends_.pop_back();
      if (!out_.usable) return;
    }
  }

  void AddInside(int32_t token, uint32_t units, bool final) {
    if (!terminal_.counted) {
      SetBit(out_.inside, token);
      return;
    }
    if (final) {
      out_.closed.push_back({token, units});
      return;
    }
    SetBit(out_.inside, token);
    if (units < TokenClass::kFew) {
      SetBit(out_.few[units], token);
    } else {
      out_.by_units.push_back({token, units});
    }
  }

  void AddExits(uint32_t node) {
    for (uint32_t i = trie_[node].tokens; i < trie_[trie_[node].end].tokens; ++i) {
      const int32_t token = table_.order()[i];
      for (const End& end : ends_) {
        rests_.push_back({table_.TokenBytes(token).substr(end.bytes), {token, end.units}});
      }
    }
    if (rests_.size() > TokenClass::kExitsMax) out_.usable = false;
  }

  const Terminal& terminal_;
  const Dfa& dfa_;
  const TokenTable& table_;
  const std::span<const TokenTable::TrieNode> trie_;
  TokenClass& out_;
  std::vector<End> ends_;
  std::vector<Rest> rests_;
};

// Walks the vocabulary from two states at once, as long as they differ.
class OverlayWalk {
 public:
  OverlayWalk(const Terminal& terminal, const TokenTable& table, TokenClass& out)
      : dfa_(terminal.dfa), table_(table), trie_(table.trie()), out_(out) {}

  void Run(uint32_t state, uint32_t reference) {
    Walk(0, state, reference, 0, 0);
    FinishExits(rests_, out_);
    if (rests_.size() > TokenClass::kExitsMax) out_.usable = false;
  }

 private:
  // `theirs`: how many ends the reference met on the way here.
  void Walk(uint32_t v, uint32_t state, uint32_t reference, size_t bytes, size_t theirs) {
    for (uint32_t c = v + 1; c < trie_[v].end; c = trie_[c].end) {
      const uint8_t byte = trie_[c].byte;
      const uint32_t a = state == kDead ? kDead : dfa_.Next(state, byte);
      const uint32_t b = reference == kDead ? kDead : dfa_.Next(reference, byte);
      // From here on both do the same with the same past, or nothing any more.
      const bool same_past = ends_.empty() && theirs == 0;
      if (a == b && same_past) continue;
      const bool a_final = a != kDead && dfa_.IsFinal(a), b_final = b != kDead && dfa_.IsFinal(b);
      for (uint32_t i = trie_[c].tokens; i < trie_[c + 1].tokens; ++i) {
        const int32_t token = table_.order()[i];
        if (a == kDead) {
          for (const size_t end : ends_) rests_.push_back({table_.TokenBytes(token).substr(end), {token, 0}});
        }
        if (b != kDead || theirs > 0) out_.clear.push_back(token);
        if (a != kDead) out_.set.push_back(token);
      }
      if (trie_[c].end == c + 1) continue;
      if (a == kDead && b == kDead && same_past) continue;
      if (a_final) ends_.push_back(bytes + 1);
      Walk(c, a, b, bytes + 1, theirs + (b_final ? 1 : 0));
      if (a_final) ends_.pop_back();
    }
  }

  const Dfa& dfa_;
  const TokenTable& table_;
  const std::span<const TokenTable::TrieNode> trie_;
  TokenClass& out_;
  std::vector<size_t> ends_;
  std::vector<Rest> rests_;
};

}  // namespace

size_t TokenClass::MemoryBytes() const {
  size_t out = sizeof(*this) + (clear.capacity() + set.capacity() + inside.capacity()) * 4 +
               exit_trie.capacity() * sizeof(TokenTable::TrieNode) +
               (exits.capacity() + by_units.capacity() + closed.capacity()) * sizeof(Exit);
  for (const auto& bits : few) out += bits.capacity() * 4;
  return out;
}

std::shared_ptr<const TokenClass> MakeTokenClass(const Terminal& terminal, uint32_t state,
                                                 const TokenTable& table) {
  auto out = std::make_shared<TokenClass>();
  ClassWalk(terminal, table, *out).Run(state);
  return out;
}

std::shared_ptr<const TokenClass> MakeOverlay(const Terminal& terminal, uint32_t state,
                                              const TokenTable& table,
                                              std::shared_ptr<const TokenClass> base) {
  auto out = std::make_shared<TokenClass>();
  OverlayWalk(terminal, table, *out).Run(state, terminal.reference[state]);
  out->base = std::move(base);
  return out;
}

}  // namespace tidepool::structured
