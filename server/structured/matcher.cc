#include "server/structured/matcher.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/rng.h"
#include "base/status.h"
#include "server/structured/automaton.h"
#include "server/structured/expression.h"
#include "server/structured/json_pieces.h"
#include "server/structured/token_class.h"

namespace tidepool {
namespace {

using structured::Automaton;
using structured::Edge;
using structured::kDead;
using structured::kDepthMax;
using structured::Terminal;
using structured::TokenClass;

using Key = MaskCache::Key;

Key Combine(const Key& a, uint64_t b) {
  return {Mix64(a.first ^ Mix64(b)), Mix64(a.second + Mix64(b ^ 0x5bd1e9955bd1e995ULL))};
}
Key Combine(const Key& a, const Key& b) { return Combine(Combine(a, b.first), b.second); }

Key DigestKey(std::string_view what, std::string_view scope, std::string_view rest) {
  const Sha256Digest digest = Sha256().UpdateField(what).UpdateField(scope).UpdateField(rest).Finish();
  Key key;
  std::memcpy(&key.first, digest.data(), 8);
  std::memcpy(&key.second, digest.data() + 8, 8);
  return key;
}

// Wide states that every grammar with JSON strings has: their classes say nothing about anybody's grammar.
const std::vector<std::unique_ptr<Automaton>>& PublicAutomata() {
  static const auto* automata = [] {
    auto* out = new std::vector<std::unique_ptr<Automaton>>();
    CompileLimits limits;
    limits.cpu_time_max = absl::InfiniteDuration();
    for (int which = 0; which < 3; ++which) {
      structured::ExpressionPool pool(limits);
      structured::JsonPieces& json = pool.Json(JsonWhitespace::kCompact);
      uint32_t node = 0;
      if (which == 0) node = json.String();
      if (which == 1) node = json.StringOfLength(1, 2);
      if (which == 2) {
        const auto text = structured::AnyUtf8(pool.budget());
        TP_CHECK(text.ok());
        const auto string = json.StringOf(*text);
        TP_CHECK(string.ok());
        node = *string;
      }
      auto automaton = pool.Compile(node);
      TP_CHECK(automaton.ok() && structured::Finish(**automaton).ok());
      out->push_back(*std::move(automaton));
    }
    return out;
  }();
  return *automata;
}

template <typename Visit>
void EachPublicState(const Visit& visit) {
  for (const auto& automaton : PublicAutomata()) {
    for (const Terminal& t : automaton->terminals) {
      for (uint32_t s = 0; s < t.dfa.states(); ++s) {
        if (t.wide[s] != 0 && t.reference[s] == s) visit(t, s);
      }
    }
  }
}

const absl::flat_hash_set<Key>& PublicResiduals() {
  static const auto* keys = [] {
    auto* out = new absl::flat_hash_set<Key>();
    EachPublicState([&](const Terminal& t, uint32_t s) { out->insert(t.residual[s]); });
    return out;
  }();
  return *keys;
}

Key ClassKey(const Key& scope, const Key& residual) {
  static const Key open = DigestKey("token class", "", "");
  return Combine(PublicResiduals().contains(residual) ? open : scope, residual);
}

}  // namespace

// What the matcher knows of its grammar so far: stacks and states, each interned, so that equal ones have
// equal numbers. A *stack* is a set: of frames (return state, the stack below) and perhaps of the bottom.
// Sets of configurations that differ in their stacks only are one configuration with the union of the stacks,
// so the number of configurations is bounded by that of states.
class Matcher::Impl {
 public:
  Impl(std::shared_ptr<const CompiledGrammar> grammar, std::shared_ptr<const TokenTable> table,
       MaskCache* cache, std::string_view scope)
      : grammar_(std::move(grammar)), table_(std::move(table)), cache_(cache), a_(grammar_->automaton()) {
    state_key_ = DigestKey("mask", scope, grammar_->digest());
    class_key_ = DigestKey("token class of", scope, "");
    scratch_.resize(table_->mask_words());
    Reset();
  }

  void Reset() {
    ClearArena();
    Begin(kStepsMax, kArenaBytesMax);
    accepted_ = 0;
    status_ = absl::OkStatus();
    items_.clear();
    accepting_ = false;
    Add(kRule, a_.rules[0], 0, kBottom);
    now_ = CloseAndIntern();
    if (!out_) {
      TP_CHECK(now_ != kDead);
      return;
    }
    // It stands nowhere: neither at an end nor before anything.
    status_ = TooAmbiguous();
    ClearArena();
    now_ = 0;
    states_.push_back({0, 0, false, false, {}, {}});
  }

  const absl::Status& status() const { return status_; }

  absl::Status FillMask(std::span<uint32_t> bits) {
    TP_CHECK(bits.size() == table_->mask_words());
    if (!status_.ok()) {
      std::fill(bits.begin(), bits.end(), 0);
      return status_;
    }
    accepted_ = 0;
    MaybeShrink();
    Begin(kStepsMax, kArenaBytesMax);
    ++stats_.masks;
    const State state = states_[now_];
    if (!state.live) {
      std::fill(bits.begin(), bits.end(), 0);
      return absl::OkStatus();
    }
    const Key key = Combine(state_key_, state.hash);
    if (cache_ != nullptr) {
      if (const MaskCache::Mask mask = cache_->FindMask(key); mask != nullptr) {
        ++stats_.cached;
        std::copy(mask->begin(), mask->end(), bits.begin());
        return absl::OkStatus();
      }
    }
    std::fill(bits.begin(), bits.end(), 0);
    bits_ = bits;
    const uint64_t nodes_before = stats_.trie_nodes, classes_before = stats_.classes;
    // Wide terminals by their classes, all else by walking the trie.
    items_.clear();
    accepting_ = false;
    bool rest_is_all = true;
    std::vector<Config> narrow;
    for (uint32_t i = 0; i < state.count && !Out(); ++i) {
      const Config config = configs_[state.begin + i];
      if (config.term == kRule) {
        for (const Edge& e : EdgesOf(config.state)) {
          if (e.kind == Edge::kToken && e.arg < static_cast<uint32_t>(table_->vocab_size()) &&
              Viable(e.target, config.stack)) {
            SetBit(static_cast<int32_t>(e.arg));
          }
        }
      } else if (a_.terminals[config.term].wide[config.state] != 0 &&
                 stats_.classes - classes_before < kClassesPerMaskMax) {
        const std::shared_ptr<const TokenClass> token_class = ClassOf(config.term, config.state);
        if (token_class->usable) {
          steps_ += bits.size() / 16 + 1;
          ApplyClass(config, *token_class);
          rest_is_all = false;
          continue;
        }
      }
      narrow.push_back(config);
    }
    if (rest_is_all) {
      Walk(table_->trie(), table_->order().data(), 0, now_);
    } else if (!narrow.empty()) {
      items_.clear();
      accepting_ = false;
      for (const Config& c : narrow) Add(c.term, c.state, c.count, c.stack);
      if (const uint32_t rest = CloseAndIntern(); rest != kDead) {
        Walk(table_->trie(), table_->order().data(), 0, rest);
      }
    }
    if (Out()) {
      std::fill(bits.begin(), bits.end(), 0);
      return TooAmbiguous();
    }
    if (!state.accepting && std::all_of(bits.begin(), bits.end(), [](uint32_t w) { return w == 0; })) {
      return absl::FailedPreconditionError(
          "the vocabulary has no token for what the grammar asks for at this place");
    }
    constexpr uint64_t kWorthKeeping = 512;
    if (cache_ != nullptr &&
        (stats_.trie_nodes - nodes_before > kWorthKeeping || stats_.classes > classes_before)) {
      cache_->PutMask(key, std::make_shared<const std::vector<uint32_t>>(bits.begin(), bits.end()));
    }
    return absl::OkStatus();
  }

  uint32_t Target(int32_t token) {
    if (token < 0 || token >= table_->vocab_size()) return kDead;
    const std::string_view bytes = table_->TokenBytes(token);
    const uint32_t by_bytes = bytes.empty() ? kDead : StepAll(now_, bytes);
    const State state = states_[now_];
    bool by_id = false;
    for (uint32_t i = 0; i < state.count && !by_id; ++i) {
      const Config config = configs_[state.begin + i];
      if (config.term != kRule) continue;
      for (const Edge& e : EdgesOf(config.state)) {
        by_id |= e.kind == Edge::kToken && e.arg == static_cast<uint32_t>(token);
      }
    }
    if (!by_id) return by_bytes;
    items_.clear();
    accepting_ = false;
    for (uint32_t i = 0; i < state.count; ++i) {
      const Config config = configs_[state.begin + i];
      if (config.term != kRule) continue;
      for (const Edge& e : EdgesOf(config.state)) {
        if (e.kind == Edge::kToken && e.arg == static_cast<uint32_t>(token)) {
          Add(kRule, e.target, 0, config.stack);
        }
      }
    }
    if (by_bytes != kDead) {
      const State other = states_[by_bytes];
      for (uint32_t i = 0; i < other.count; ++i) {
        const Config c = configs_[other.begin + i];
        Add(c.term, c.state, c.count, c.stack);
      }
      accepting_ |= other.accepting;
    }
    return CloseAndIntern();
  }

  absl::Status Accept(int32_t token) {
    if (!status_.ok()) return status_;
    // FillMask tidies up. Only who accepts without asking for masks does it here.
    if (++accepted_ > 1) MaybeShrink();
    Begin(kAcceptStepsMax, arena_bytes_ + kBytesMax);
    const uint32_t to = Target(token);
    if (out_) return TooAmbiguous();
    if (to == kDead) {
      return absl::InvalidArgumentError(absl::StrCat("token ", token, " is not allowed by the grammar here"));
    }
    now_ = to;
    return absl::OkStatus();
  }

  bool Allows(int32_t token) {
    if (!status_.ok()) return false;
    MaybeShrink();
    Begin(kStepsMax, kArenaBytesMax);
    return Target(token) != kDead;
  }

  absl::Status AcceptBytes(std::string_view bytes) {
    if (!status_.ok()) return status_;
    MaybeShrink();
    uint32_t at = now_;
    for (size_t i = 0; i < bytes.size(); ++i) {
      Begin(kStepsMax, kArenaBytesMax);
      at = Step(at, static_cast<uint8_t>(bytes[i]));
      if (out_) return TooAmbiguous();
      if (at == kDead) {
        return absl::InvalidArgumentError(absl::StrCat("byte ", i, " is not allowed by the grammar"));
      }
      if (arena_bytes_ > kBytesMax) Shrink({&now_, &at});
    }
    now_ = at;
    return absl::OkStatus();
  }

  // Of the operation that is out.
  absl::Status TooAmbiguous() const {
    return absl::ResourceExhaustedError(
        absl::StrCat("the grammar is too ambiguous here: one token takes more than the limit of ", steps_max_,
                     " steps or ", kArenaBytesMax >> 20, " MiB"));
  }

  bool CanEnd() const { return states_[now_].accepting; }
  bool MustEnd() const { return states_[now_].accepting && !states_[now_].live; }
  const Stats& stats() const { return stats_; }

 private:
  static constexpr uint32_t kRule = UINT32_MAX;  // Config::term of a rule's state
  static constexpr uint32_t kBottom = 0;         // the stack that holds nothing but the bottom
  // Beyond that many new ones, what a wide state allows is found by walking, which takes steps.
  static constexpr uint64_t kClassesPerMaskMax = 16;
  // Arena bytes while one mask is made; beyond, it is given up as too ambiguous.
  static constexpr size_t kArenaBytesMax = size_t{64} << 20;

  struct Config {
    uint32_t term, state, count, stack;
    bool operator==(const Config&) const = default;
  };
  struct Frame {
    uint32_t ret, below;
  };
  struct Stack {
    uint32_t begin, count;
    bool bottom;
    uint32_t depth;
    Key hash;
  };
  struct State {
    uint32_t begin, count;
    bool accepting, live;
    Terminal::Bytes first;
    Key hash;
  };

  std::span<const Edge> EdgesOf(uint32_t s) const {
    return {a_.edges.data() + a_.edge_begin[s], a_.edge_begin[s + 1] - a_.edge_begin[s]};
  }
  void SetBit(int32_t id) { bits_[static_cast<size_t>(id) / 32] |= 1u << (static_cast<size_t>(id) % 32); }

  // ---- stacks

  void ClearArena() {
    todo_.clear();
    frames_.clear();
    stacks_.clear();
    stack_index_.clear();
    configs_.clear();
    states_.clear();
    state_index_.clear();
    steps_to_.clear();
    returned_.clear();
    unions_.clear();
    ends_.clear();
    arena_bytes_ = 0;
    InternStack({}, true);
  }

  uint32_t InternStack(std::span<const Frame> frames, bool bottom) {
    Key hash{bottom ? 1u : 2u, frames.size()};
    for (const Frame& f : frames) hash = Combine(Combine(hash, f.ret), stacks_[f.below].hash);
    const auto [it, fresh] = stack_index_.emplace(hash, static_cast<uint32_t>(stacks_.size()));
    if (fresh) {
      Stack stack{static_cast<uint32_t>(frames_.size()), static_cast<uint32_t>(frames.size()), bottom, 0,
                  hash};
      for (const Frame& f : frames) {
        stack.depth = std::max(stack.depth, stacks_[f.below].depth + 1);
        frames_.push_back(f);
      }
      stacks_.push_back(stack);
      arena_bytes_ += sizeof(Stack) + frames.size() * sizeof(Frame) + 32;
    }
    return it->second;
  }

  uint32_t Push(uint32_t ret, uint32_t below) {
    if (a_.pure_final[ret] != 0) return below;
    const Frame frame{ret, below};
    return InternStack({&frame, 1}, false);
  }

  uint32_t Union(uint32_t x, uint32_t y) {
    if (x == y) return x;
    if (x > y) std::swap(x, y);
    const uint64_t pair = uint64_t{x} << 32 | y;
    if (const auto it = unions_.find(pair); it != unions_.end()) return it->second;
    if (Out()) return x;
    std::vector<Frame> merged;
    const Stack a = stacks_[x], b = stacks_[y];
    uint32_t i = 0, j = 0;
    while (i < a.count || j < b.count) {
      if (j == b.count || (i < a.count && frames_[a.begin + i].ret < frames_[b.begin + j].ret)) {
        merged.push_back(frames_[a.begin + i++]);
      } else if (i == a.count || frames_[b.begin + j].ret < frames_[a.begin + i].ret) {
        merged.push_back(frames_[b.begin + j++]);
      } else {
        const Frame f = frames_[a.begin + i++], g = frames_[b.begin + j++];
        merged.push_back({f.ret, Union(f.below, g.below)});
      }
    }
    steps_ += merged.size() + 1;
    if (out_) return x;
    const uint32_t out = InternStack(merged, a.bottom || b.bottom);
    unions_.emplace(pair, out);
    arena_bytes_ += 24;
    return out;
  }

  bool Viable(uint32_t rule_state, uint32_t stack) const {
    return stacks_[stack].depth + a_.height[rule_state] <= kDepthMax;
  }

  // ---- states

  // Adds a configuration to the set that is being made.
  void Add(uint32_t term, uint32_t state, uint32_t count, uint32_t stack) {
    if (Out() || (term == kRule && !Viable(state, stack))) return;
    size_t at = items_.size();
    if (items_.size() <= kLinearMax) {
      for (size_t i = 0; i < items_.size(); ++i) {
        if (items_[i].state == state && items_[i].term == term && items_[i].count == count) {
          at = i;
          break;
        }
      }
    } else {
      if (item_index_.empty()) {
        for (size_t i = 0; i < items_.size(); ++i) {
          item_index_.emplace(std::tuple(items_[i].term, items_[i].state, items_[i].count), i);
        }
      }
      at = item_index_.emplace(std::tuple(term, state, count), at).first->second;
    }
    if (at == items_.size()) {
      items_.push_back({term, state, count, stack});
      todo_.push_back(at);
      return;
    }
    const uint32_t both = Union(items_[at].stack, stack);
    if (both == items_[at].stack) return;
    items_[at].stack = both;
    todo_.push_back(at);
  }

  void Return(uint32_t stack) {
    const Stack s = stacks_[stack];
    accepting_ |= s.bottom;
    for (uint32_t i = 0; i < s.count; ++i) {
      const Frame f = frames_[s.begin + i];
      Add(kRule, f.ret, 0, f.below);
    }
  }

  // Follows what is reached without reading; the number of the resulting state, kDead for the empty set.
  // Where Out(), kDead says nothing, and nothing may be remembered of it.
  uint32_t CloseAndIntern() {
    while (!todo_.empty() && !Out()) {
      const size_t at = todo_.back();
      todo_.pop_back();
      const Config item = items_[at];
      ++steps_;
      if (item.term != kRule) {
        if (a_.terminals[item.term].dfa.IsFinal(item.state)) Return(item.stack);
        continue;
      }
      if (a_.final[item.state] != 0) Return(item.stack);
      const std::span<const Edge> edges = EdgesOf(item.state);
      steps_ += edges.size() / 8;
      for (const Edge& e : edges) {
        if (Out()) break;
        if (e.kind == Edge::kEpsilon) {
          Add(kRule, e.target, 0, item.stack);
        } else if (e.kind == Edge::kCall) {
          if (Viable(e.target, item.stack)) Add(kRule, a_.rules[e.arg], 0, Push(e.target, item.stack));
        } else if (e.kind == Edge::kTerminal) {
          if (Viable(e.target, item.stack) && stacks_[item.stack].depth < kDepthMax) {
            Add(e.arg, 0, 0, Push(e.target, item.stack));
          }
        }
      }
    }
    item_index_.clear();
    if (Out()) {
      todo_.clear();
      items_.clear();
      return kDead;
    }
    // What can still read.
    std::erase_if(items_, [&](const Config& c) {
      if (c.term != kRule) return a_.terminals[c.term].live[c.state] == 0;
      for (const Edge& e : EdgesOf(c.state)) {
        if (e.kind == Edge::kByte || e.kind == Edge::kToken) return false;
      }
      return true;
    });
    return Intern();
  }

  // The number of the state whose closed set is items_.
  uint32_t Intern() {
    if (items_.empty() && !accepting_) return kDead;
    std::sort(items_.begin(), items_.end(), [](const Config& x, const Config& y) {
      return std::tie(x.term, x.state, x.count) < std::tie(y.term, y.state, y.count);
    });
    Key hash{accepting_ ? 3u : 4u, items_.size()};
    for (const Config& c : items_) {
      hash = Combine(Combine(hash, uint64_t{c.term} << 32 | c.state), c.count);
      hash = Combine(hash, stacks_[c.stack].hash);
    }
    const auto [it, fresh] = state_index_.emplace(hash, static_cast<uint32_t>(states_.size()));
    if (fresh) {
      State state{static_cast<uint32_t>(configs_.size()),
                  static_cast<uint32_t>(items_.size()),
                  accepting_,
                  !items_.empty(),
                  {},
                  hash};
      for (const Config& c : items_) {
        configs_.push_back(c);
        if (c.term != kRule) {
          const Terminal::Bytes& first = a_.terminals[c.term].first[c.state];
          for (size_t w = 0; w < 4; ++w) state.first[w] |= first[w];
          continue;
        }
        for (const Edge& e : EdgesOf(c.state)) {
          if (e.kind != Edge::kByte) continue;
          for (size_t b = e.lo; b <= e.hi; ++b) state.first[b / 64] |= 1ULL << (b % 64);
        }
      }
      states_.push_back(state);
      arena_bytes_ += sizeof(State) + items_.size() * sizeof(Config) + 32;
    }
    return it->second;
  }

  // The state of a terminal behind a byte; false: none.
  bool StepTerminal(uint32_t term, uint32_t& state, uint32_t& count, uint8_t byte) const {
    const Terminal& t = a_.terminals[term];
    const uint32_t to = t.dfa.Next(state, byte);
    if (to == kDead) return false;
    if (t.counted && state == 0) {
      if (t.dfa.IsFinal(to)) {
        if (count < t.min) return false;
        count = 0;
      } else if (t.max == UINT32_MAX) {
        count = std::min(count + 1, t.min);  // more need not be told apart
      } else {
        if (count >= t.max) return false;
        ++count;
      }
    }
    state = to;
    return true;
  }

  uint32_t Step(uint32_t from, uint8_t byte) {
    if ((states_[from].first[byte / 64] >> (byte % 64) & 1) == 0) return kDead;
    const uint64_t key = uint64_t{from} << 8 | byte;
    if (const auto it = steps_to_.find(key); it != steps_to_.end()) return it->second;
    items_.clear();
    accepting_ = false;
    const State state = states_[from];
    steps_ += state.count;
    for (uint32_t i = 0; i < state.count; ++i) {
      Config c = configs_[state.begin + i];
      if (c.term != kRule) {
        if (StepTerminal(c.term, c.state, c.count, byte)) Add(c.term, c.state, c.count, c.stack);
        continue;
      }
      const std::span<const Edge> edges = EdgesOf(c.state);
      steps_ += edges.size() / 8;
      for (const Edge& e : edges) {
        if (e.kind == Edge::kByte && e.lo <= byte && byte <= e.hi) Add(kRule, e.target, 0, c.stack);
      }
    }
    const uint32_t to = CloseAndIntern();
    if (out_) return kDead;
    steps_to_.emplace(key, to);
    arena_bytes_ += 32;
    return to;
  }

  uint32_t StepAll(uint32_t at, std::string_view bytes) {
    for (const char c : bytes) {
      at = Step(at, static_cast<uint8_t>(c));
      if (at == kDead) break;
    }
    return at;
  }

  // The state behind the end of a terminal with this stack, kDead if nothing is read after it.
  uint32_t Returned(uint32_t stack) {
    if (const auto it = returned_.find(stack); it != returned_.end()) return it->second;
    items_.clear();
    accepting_ = false;
    Return(stack);
    const uint32_t to = CloseAndIntern();
    if (out_) return kDead;
    returned_.emplace(stack, to);
    arena_bytes_ += 16;
    return to;
  }

  // The state where a terminal may end and may go on; kDead only where Out().
  uint32_t Ended(uint32_t term, uint32_t state, uint32_t count, uint32_t stack) {
    const auto key = std::tuple(term, state, count, stack);
    if (const auto it = ends_.find(key); it != ends_.end()) return it->second;
    items_.clear();
    accepting_ = false;
    Add(term, state, count, stack);
    const uint32_t to = CloseAndIntern();
    if (out_) return kDead;
    ends_.emplace(key, to);
    arena_bytes_ += 32;
    return to;
  }

  // What one operation may take from here on.
  void Begin(uint64_t steps_max, size_t arena_bytes_max) {
    steps_ = 0;
    steps_max_ = steps_max;
    arena_bytes_max_ = arena_bytes_max;
    out_ = false;
  }
  // The operation has taken more. Stays so until the next begins.
  bool Out() {
    out_ = out_ || steps_ > steps_max_ || arena_bytes_ > arena_bytes_max_;
    return out_;
  }

  // ---- masks

  // Sets the bits of all tokens below node `v` of a trie that lead on from state `at`, which was reached at
  // v.
  void Walk(std::span<const TokenTable::TrieNode> trie, const int32_t* tokens, uint32_t v, uint32_t at) {
    if (Out()) return;
    const State state = states_[at];
    if (!state.live) return;
    if (state.count == 1 && configs_[state.begin].term != kRule) {
      const Config c = configs_[state.begin];
      WalkTerminal(trie, tokens, v, c.term, c.state, c.count, c.stack);
      return;
    }
    const auto child = [&](uint32_t c) {
      ++stats_.trie_nodes;
      const uint8_t byte = trie[c].byte;
      if ((state.first[byte / 64] >> (byte % 64) & 1) == 0) return;
      const uint32_t to = Step(at, byte);
      if (to == kDead) return;
      for (uint32_t i = trie[c].tokens; i < trie[c + 1].tokens; ++i) {
        if (tokens[i] >= 0) SetBit(tokens[i]);
      }
      if (trie[c].end > c + 1) Walk(trie, tokens, c, to);
    };
    if (v == 0 && trie.data() == table_->trie().data()) {
      for (size_t w = 0; w < 4; ++w) {
        for (uint64_t rest = state.first[w]; rest != 0; rest &= rest - 1) {
          const auto byte = static_cast<uint8_t>(w * 64 + static_cast<size_t>(std::countr_zero(rest)));
          if (const uint32_t c = table_->root_child(byte); c != 0) child(c);
        }
      }
      return;
    }
    for (uint32_t c = v + 1; c < trie[v].end; c = trie[c].end) child(c);
  }

  // The same inside one terminal: by its table, without making states.
  void WalkTerminal(std::span<const TokenTable::TrieNode> trie, const int32_t* tokens, uint32_t v,
                    uint32_t term, uint32_t state, uint32_t count, uint32_t stack) {
    const Terminal& t = a_.terminals[term];
    const auto child = [&](uint32_t c) {
      ++stats_.trie_nodes;
      ++steps_;
      uint32_t to = state, units = count;
      if (!StepTerminal(term, to, units, trie[c].byte)) return;
      for (uint32_t i = trie[c].tokens; i < trie[c + 1].tokens; ++i) {
        if (tokens[i] >= 0) SetBit(tokens[i]);
      }
      if (trie[c].end == c + 1) return;
      if (!t.dfa.IsFinal(to)) {
        WalkTerminal(trie, tokens, c, term, to, units, stack);
      } else if (t.live[to] == 0) {
        if (const uint32_t next = Returned(stack); next != kDead) Walk(trie, tokens, c, next);
      } else if (const uint32_t next = Ended(term, to, units, stack); next != kDead) {
        Walk(trie, tokens, c, next);
      }
    };
    if (v == 0 && trie.data() == table_->trie().data()) {
      const Terminal::Bytes& first = t.first[state];
      for (size_t w = 0; w < 4; ++w) {
        for (uint64_t rest = first[w]; rest != 0; rest &= rest - 1) {
          const auto byte = static_cast<uint8_t>(w * 64 + static_cast<size_t>(std::countr_zero(rest)));
          if (const uint32_t c = table_->root_child(byte); c != 0) child(c);
        }
      }
      return;
    }
    for (uint32_t c = v + 1; c < trie[v].end; c = trie[c].end) child(c);
  }

  void ApplyClass(const Config& c, const TokenClass& token_class) {
    const Terminal& t = a_.terminals[c.term];
    if (t.counted) {
      ApplyCounted(c, t, token_class);
      return;
    }
    if (token_class.base == nullptr) {
      for (size_t w = 0; w < bits_.size(); ++w) bits_[w] |= token_class.inside[w];
      ApplyExits(c, token_class);
      return;
    }
    // What the other state gives, corrected, in a mask of its own: other configurations' bits stay.
    const std::span<uint32_t> out = bits_;
    std::copy(token_class.base->inside.begin(), token_class.base->inside.end(), scratch_.begin());
    bits_ = scratch_;
    ApplyExits(c, *token_class.base);
    for (const int32_t id : token_class.clear) {
      bits_[static_cast<size_t>(id) / 32] &= ~(1u << (static_cast<size_t>(id) % 32));
    }
    for (const int32_t id : token_class.set) SetBit(id);
    ApplyExits(c, token_class);
    bits_ = out;
    for (size_t w = 0; w < bits_.size(); ++w) bits_[w] |= scratch_[w];
  }

  void ApplyExits(const Config& c, const TokenClass& token_class) {
    if (token_class.exits.empty()) return;
    const uint32_t next = Returned(c.stack);
    if (next == kDead) return;
    exit_ids_.clear();
    for (const TokenClass::Exit& exit : token_class.exits) exit_ids_.push_back(exit.token);
    Walk(token_class.exit_trie, exit_ids_.data(), 0, next);
  }

  void ApplyCounted(const Config& c, const Terminal& t, const TokenClass& token_class) {
    // Where the state is not the loop's head a unit has begun, and is in `count` already.
    const uint64_t left = t.max == UINT32_MAX ? UINT32_MAX : t.max - c.count;
    const uint64_t wanted = c.count < t.min ? t.min - c.count : 0;
    const auto fits = [&](uint32_t units) { return units <= left && units >= wanted; };
    const std::span<uint32_t> out = bits_;
    const std::vector<uint32_t>& inside =
        left < TokenClass::kFew ? token_class.few[static_cast<size_t>(left)] : token_class.inside;
    bool too_long = false;
    if (left >= TokenClass::kFew && !token_class.by_units.empty() && token_class.by_units[0].units > left) {
      too_long = true;
      std::copy(inside.begin(), inside.end(), scratch_.begin());
      for (const TokenClass::Exit& token : token_class.by_units) {
        if (token.units <= left) break;
        scratch_[static_cast<size_t>(token.token) / 32] &= ~(1u << (static_cast<size_t>(token.token) % 32));
      }
    }
    const uint32_t* from = too_long ? scratch_.data() : inside.data();
    for (size_t w = 0; w < out.size(); ++w) out[w] |= from[w];
    for (const TokenClass::Exit& token : token_class.closed) {
      if (fits(token.units)) SetBit(token.token);
    }
    if (token_class.exits.empty()) return;
    const uint32_t next = Returned(c.stack);
    if (next == kDead) return;
    exit_ids_.clear();
    for (const TokenClass::Exit& exit : token_class.exits) {
      exit_ids_.push_back(fits(exit.units) ? exit.token : -1);
    }
    Walk(token_class.exit_trie, exit_ids_.data(), 0, next);
  }

  std::shared_ptr<const TokenClass> ClassOf(uint32_t term, uint32_t state) {
    const uint64_t local = uint64_t{term} << 32 | state;
    if (const auto it = classes_.find(local); it != classes_.end()) return it->second;
    const Terminal& t = a_.terminals[term];
    const Key key = ClassKey(class_key_, t.residual[state]);
    std::shared_ptr<const TokenClass> out = cache_ == nullptr ? nullptr : cache_->FindClass(key);
    if (out == nullptr) {
      ++stats_.classes;
      const uint32_t reference = t.reference[state];
      std::shared_ptr<const TokenClass> base;
      if (reference != state) base = ClassOf(term, reference);
      out = base != nullptr && base->usable ? structured::MakeOverlay(t, state, *table_, std::move(base))
                                            : structured::MakeTokenClass(t, state, *table_);
      if (cache_ != nullptr) cache_->PutClass(key, out, out->MemoryBytes());
    }
    if (classes_.size() >= kClassesMax) classes_.clear();
    classes_.emplace(local, out);
    return out;
  }

  // ---- memory

  void MaybeShrink() {
    if (arena_bytes_ > kBytesMax) Shrink({&now_});
  }

  // Forgets all but the given states, and renumbers these.
  void Shrink(std::initializer_list<uint32_t*> keep) {
    ++stats_.arena_resets;
    struct Kept {
      uint32_t* at;
      State state;
    };
    std::vector<Kept> kept;
    for (uint32_t* at : keep) kept.push_back({at, states_[*at]});
    const std::vector<Frame> frames = std::move(frames_);
    const std::vector<Stack> stacks = std::move(stacks_);
    const std::vector<Config> configs = std::move(configs_);
    ClearArena();
    absl::flat_hash_map<uint32_t, uint32_t> moved;
    const auto move = [&](const auto& self, uint32_t old) -> uint32_t {
      if (const auto it = moved.find(old); it != moved.end()) return it->second;
      std::vector<Frame> copy;
      for (uint32_t i = 0; i < stacks[old].count; ++i) {
        const Frame f = frames[stacks[old].begin + i];
        copy.push_back({f.ret, self(self, f.below)});
      }
      const uint32_t fresh = InternStack(copy, stacks[old].bottom);
      moved.emplace(old, fresh);
      return fresh;
    };
    for (const Kept& k : kept) {
      items_.clear();
      accepting_ = k.state.accepting;
      for (uint32_t i = 0; i < k.state.count; ++i) {
        const Config c = configs[k.state.begin + i];
        items_.push_back({c.term, c.state, c.count, move(move, c.stack)});
      }
      *k.at = Intern();  // closed as it is
    }
  }

  static constexpr size_t kLinearMax = 16;
  static constexpr size_t kClassesMax = 64;

  std::shared_ptr<const CompiledGrammar> grammar_;
  std::shared_ptr<const TokenTable> table_;
  MaskCache* cache_;
  const Automaton& a_;
  Key state_key_, class_key_;

  std::vector<Frame> frames_;
  std::vector<Stack> stacks_;
  absl::flat_hash_map<Key, uint32_t> stack_index_;
  std::vector<Config> configs_;
  std::vector<State> states_;
  absl::flat_hash_map<Key, uint32_t> state_index_;
  absl::flat_hash_map<uint64_t, uint32_t> steps_to_;  // (state, byte)
  absl::flat_hash_map<uint32_t, uint32_t> returned_;
  absl::flat_hash_map<uint64_t, uint32_t> unions_;
  absl::flat_hash_map<std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>, uint32_t> ends_;
  size_t arena_bytes_ = 0;

  // The set that is being made.
  std::vector<Config> items_;
  std::vector<size_t> todo_;
  absl::flat_hash_map<std::tuple<uint32_t, uint32_t, uint32_t>, size_t> item_index_;
  bool accepting_ = false;

  absl::flat_hash_map<uint64_t, std::shared_ptr<const TokenClass>> classes_;
  std::span<uint32_t> bits_;
  std::vector<uint32_t> scratch_;
  std::vector<int32_t> exit_ids_;
  uint64_t steps_ = 0, steps_max_ = 0;
  size_t arena_bytes_max_ = 0;
  bool out_ = false;
  uint64_t accepted_ = 0;  // since the last mask
  absl::Status status_;    // not OK: there is not even a beginning
  uint32_t now_ = 0;
  Stats stats_;
};

Matcher::Matcher(std::shared_ptr<const CompiledGrammar> grammar, std::shared_ptr<const TokenTable> table,
                 MaskCache* cache, std::string_view scope)
    : impl_(std::make_unique<Impl>(std::move(grammar), std::move(table), cache, scope)) {}
Matcher::~Matcher() = default;
Matcher::Matcher(Matcher&&) noexcept = default;
Matcher& Matcher::operator=(Matcher&&) noexcept = default;

absl::Status Matcher::FillMask(std::span<uint32_t> bits) { return impl_->FillMask(bits); }
absl::Status Matcher::Accept(int32_t token) { return impl_->Accept(token); }
bool Matcher::Allows(int32_t token) { return impl_->Allows(token); }
absl::Status Matcher::AcceptBytes(std::string_view bytes) { return impl_->AcceptBytes(bytes); }
bool Matcher::CanEnd() const { return impl_->CanEnd(); }
bool Matcher::MustEnd() const { return impl_->MustEnd(); }
absl::Status Matcher::status() const { return impl_->status(); }
void Matcher::Reset() { impl_->Reset(); }
const Matcher::Stats& Matcher::stats() const { return impl_->stats(); }

void Matcher::Warm(const TokenTable& table, MaskCache& cache) {
  EachPublicState([&](const Terminal& t, uint32_t s) {
    const Key key = ClassKey({}, t.residual[s]);
    if (cache.FindClass(key) != nullptr) return;
    const std::shared_ptr<const TokenClass> made = structured::MakeTokenClass(t, s, table);
    cache.PutClass(key, made, made->MemoryBytes());
  });
}

}  // namespace tidepool
