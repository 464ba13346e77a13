#include "server/structured/automaton.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <span>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/rng.h"

namespace tidepool::structured {
namespace {

constexpr uint32_t kInfinite = UINT32_MAX;

std::span<const Edge> EdgesOf(const Automaton& a, size_t s) {
  return {a.edges.data() + a.edge_begin[s], a.edge_begin[s + 1] - a.edge_begin[s]};
}

// Heights by Knuth's generalisation of Dijkstra's algorithm: values are small whole numbers, so the queue is
// a bucket per value. kInfinite: no way to the end.
std::vector<uint32_t> Heights(const Automaton& a) {
  const size_t n = a.states();
  // Who has to be looked at again when a state's height is known: the sources of edges into it, and the
  // callers where it is a rule's start.
  std::vector<uint32_t> begin(n + 1, 0);
  const auto each = [&](const auto& visit) {
    for (uint32_t s = 0; s < n; ++s) {
      for (const Edge& e : EdgesOf(a, s)) {
        visit(e.target, s, e);
        if (e.kind == Edge::kCall) visit(a.rules[e.arg], s, e);
      }
    }
  };
  each([&](uint32_t at, uint32_t, const Edge&) { ++begin[at + 1]; });
  for (size_t i = 0; i < n; ++i) begin[i + 1] += begin[i];
  struct Use {
    uint32_t source;
    const Edge* edge;
  };
  std::vector<Use> uses(begin[n]);
  std::vector<uint32_t> fill(begin.begin(), begin.end() - 1);
  each([&](uint32_t at, uint32_t source, const Edge& e) { uses[fill[at]++] = {source, &e}; });

  std::vector<uint32_t> height(n, kInfinite);
  std::vector<uint8_t> done(n, 0);
  std::vector<std::vector<uint32_t>> buckets(1);
  const auto offer = [&](uint32_t s, uint32_t value) {
    if (value >= height[s]) return;
    height[s] = value;
    if (buckets.size() <= value) buckets.resize(value + 1);
    buckets[value].push_back(s);
  };
  for (uint32_t s = 0; s < n; ++s) {
    if (a.final[s] != 0) offer(s, 0);
  }
  for (size_t value = 0; value < buckets.size(); ++value) {
    for (size_t i = 0; i < buckets[value].size(); ++i) {
      const uint32_t s = buckets[value][i];
      if (done[s] != 0 || height[s] != value) continue;
      done[s] = 1;
      for (uint32_t u = begin[s]; u < begin[s + 1]; ++u) {
        const Edge& e = *uses[u].edge;
        if (height[e.target] == kInfinite) continue;
        uint32_t cost = height[e.target];
        if (e.kind == Edge::kTerminal) {
          cost = std::max(cost, 1u);
        } else if (e.kind == Edge::kCall) {
          const uint32_t inner = height[a.rules[e.arg]];
          if (inner == kInfinite) continue;
          cost = std::max(cost, inner + 1);
        }
        offer(uses[u].source, cost);
      }
    }
  }
  return height;
}

// Whether a rule matches the empty text, by the states that reach its end without reading.
std::vector<uint8_t> NullableStates(const Automaton& a) {
  const size_t n = a.states();
  std::vector<uint8_t> nullable(a.final);
  // Reverse lists of zero-width edges.
  std::vector<std::vector<uint32_t>> sources(n);
  for (uint32_t s = 0; s < n; ++s) {
    for (const Edge& e : EdgesOf(a, s)) {
      const bool zero =
          e.kind == Edge::kEpsilon || e.kind == Edge::kCall ||
          (e.kind == Edge::kTerminal && !a.terminals[e.arg].counted && a.terminals[e.arg].dfa.IsFinal(0));
      if (!zero) continue;
      sources[e.target].push_back(s);
      if (e.kind == Edge::kCall) sources[a.rules[e.arg]].push_back(s);
    }
  }
  std::vector<uint32_t> work;
  for (uint32_t s = 0; s < n; ++s) {
    if (nullable[s] != 0) work.push_back(s);
  }
  while (!work.empty()) {
    const uint32_t at = work.back();
    work.pop_back();
    for (const uint32_t s : sources[at]) {
      if (nullable[s] != 0) continue;
      for (const Edge& e : EdgesOf(a, s)) {
        const bool zero =
            e.kind == Edge::kEpsilon || (e.kind == Edge::kCall && nullable[a.rules[e.arg]] != 0) ||
            (e.kind == Edge::kTerminal && !a.terminals[e.arg].counted && a.terminals[e.arg].dfa.IsFinal(0));
        if (!zero || nullable[e.target] == 0) continue;
        nullable[s] = 1;
        work.push_back(s);
        break;
      }
    }
  }
  return nullable;
}

// `walks_left`: states that the search for common parts may still look at.
absl::Status FinishTerminal(Terminal& t, size_t index, size_t& walks_left) {
  const Dfa& dfa = t.dfa;
  const size_t n = dfa.states();
  const auto bad = [&](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("terminal ", index, ": ", std::string(what)));
  };
  if (n == 0) return bad("matches nothing");
  // Each state reaches a final one (the matcher never looks for dead ends).
  std::vector<std::vector<uint32_t>> sources(n);
  t.first.assign(n, {});
  t.live.assign(n, 0);
  std::vector<Terminal::Bytes> column_bytes(dfa.columns, Terminal::Bytes{});
  for (size_t byte = 0; byte < 256; ++byte) column_bytes[dfa.classes[byte]][byte / 64] |= 1ULL << (byte % 64);
  for (uint32_t s = 0; s < n; ++s) {
    for (uint32_t c = 0; c < dfa.columns; ++c) {
      const uint32_t to = dfa.next[size_t{s} * dfa.columns + c];
      if (to == kDead) continue;
      for (size_t w = 0; w < 4; ++w) t.first[s][w] |= column_bytes[c][w];
      if (sources[to].empty() || sources[to].back() != s) sources[to].push_back(s);
    }
    for (const uint64_t word : t.first[s]) t.live[s] |= word != 0 ? 1 : 0;
  }
  std::vector<uint8_t> good(dfa.final);
  std::vector<uint32_t> work;
  for (uint32_t s = 0; s < n; ++s) {
    if (good[s] != 0) work.push_back(s);
  }
  size_t reached = work.size();
  while (!work.empty()) {
    const uint32_t at = work.back();
    work.pop_back();
    for (const uint32_t s : sources[at]) {
      if (good[s] != 0) continue;
      good[s] = 1;
      ++reached;
      work.push_back(s);
    }
  }
  if (reached != n) return bad("a state is a dead end");
  if (t.counted) {
    if (t.min > t.max) return bad("its least count is above its largest");
    if (dfa.IsFinal(0)) return bad("a counted one must not be final at its start");
    bool unit = false;
    for (uint32_t s = 0; s < n; ++s) {
      if (dfa.IsFinal(s) && t.live[s] != 0) return bad("a counted one must end at its closing byte");
      for (uint32_t c = 0; c < dfa.columns; ++c) {
        const uint32_t to = dfa.next[size_t{s} * dfa.columns + c];
        if (to == kDead) continue;
        if (s != 0 && dfa.IsFinal(to)) return bad("a counted one closes inside a unit");
        if (s == 0 && !dfa.IsFinal(to)) unit = true;
      }
    }
    if (!unit && t.min > 0) return bad("a counted one has no units");
  } else if (t.min != 0 || t.max != UINT32_MAX) {
    return bad("has a count and is not counted");
  }

  constexpr size_t kWideBytes = 24;
  constexpr size_t kDigestStatesMax = 64;
  // Of a terminal's states, that turn out to reach too many.
  constexpr int kTooLargeMax = 64;
  // Targets of a state that are told apart; which one is found only decides what is shared.
  constexpr size_t kTotalsMax = 32;
  t.wide.assign(n, 0);
  t.residual.assign(n, {0, 0});
  t.reference.resize(n);
  std::vector<uint32_t> column_size(dfa.columns, 0);
  for (size_t byte = 0; byte < 256; ++byte) ++column_size[dfa.classes[byte]];
  // The state that most bytes lead to.
  std::vector<std::pair<uint32_t, uint32_t>> totals;
  const auto favourite = [&](uint32_t s) {
    totals.clear();
    for (uint32_t c = 0; c < dfa.columns; ++c) {
      const uint32_t to = dfa.next[size_t{s} * dfa.columns + c];
      if (to == kDead) continue;
      auto it =
          std::find_if(totals.begin(), totals.end(), [to](const auto& total) { return total.first == to; });
      if (it == totals.end()) {
        if (totals.size() == kTotalsMax) continue;
        it = totals.insert(totals.end(), {to, 0});
      }
      it->second += column_size[c];
    }
    std::pair<uint32_t, uint32_t> best{s, 0};
    for (const auto& total : totals) {
      if (total.second > best.second) best = total;
    }
    return best.first;
  };
  for (uint32_t s = 0; s < n; ++s) {
    // ASCII only: what can follow the lead byte of a longer character is many bytes, but few tokens.
    const size_t bytes =
        static_cast<size_t>(std::popcount(t.first[s][0])) + static_cast<size_t>(std::popcount(t.first[s][1]));
    t.wide[s] = bytes >= kWideBytes ? 1 : 0;
  }
  const auto digest_of = [](const std::string& text) {
    const Sha256Digest digest = Sha256().Update(text).Finish();
    std::pair<uint64_t, uint64_t> out;
    std::memcpy(&out.first, digest.data(), sizeof out.first);
    std::memcpy(&out.second, digest.data() + sizeof out.first, sizeof out.second);
    return out;
  };
  std::optional<std::pair<uint64_t, uint64_t>>
      whole;  // of the automaton, where there is a state that needs it
  int too_large = 0;
  for (uint32_t s = 0; s < n; ++s) {
    t.reference[s] = s;
    if (t.wide[s] == 0) continue;
    const uint32_t r = favourite(s);
    if (!t.counted && r != s && t.wide[r] != 0 && favourite(r) == r) t.reference[s] = r;
    // What is reachable from s, numbered in the order of discovery. Only for loops, which different automata
    // share: the rest of a string after a name that none of theirs is.
    bool small =
        (r == s || n <= kDigestStatesMax) && too_large < kTooLargeMax && walks_left > kDigestStatesMax;
    if (small) {
      absl::flat_hash_map<uint32_t, uint32_t> number{{s, 0}};
      std::vector<uint32_t> order{s};
      std::string text;
      const auto put = [&text](uint32_t v) { text.append(reinterpret_cast<const char*>(&v), sizeof v); };
      for (size_t at = 0; small && at < order.size(); ++at) {
        put(dfa.IsFinal(order[at]) ? 1 : 0);
        // Runs of bytes with the same target: byte classes differ from automaton to automaton.
        for (size_t byte = 0; byte < 256; ++byte) {
          const uint32_t to = dfa.Next(order[at], static_cast<uint8_t>(byte));
          if (byte < 255 && dfa.Next(order[at], static_cast<uint8_t>(byte + 1)) == to) continue;
          uint32_t id = kDead;
          if (to != kDead) {
            const auto [it, fresh] = number.emplace(to, static_cast<uint32_t>(order.size()));
            if (fresh) order.push_back(to);
            id = it->second;
          }
          put(static_cast<uint32_t>(byte));
          put(id);
        }
        small = order.size() <= kDigestStatesMax;
        --walks_left;
      }
      if (!small) ++too_large;
      // A counted one's units are told by its state 0.
      put(t.counted ? 1 : 0);
      if (t.counted) put(number.contains(0) ? number[0] : kDead);
      if (small) t.residual[s] = digest_of(text);
    }
    if (!small) {
      if (!whole) {
        std::string text(reinterpret_cast<const char*>(dfa.classes.data()), dfa.classes.size());
        text.append(reinterpret_cast<const char*>(dfa.next.data()), dfa.next.size() * sizeof(uint32_t));
        text.append(reinterpret_cast<const char*>(dfa.final.data()), dfa.final.size());
        text.push_back(t.counted ? 'c' : '-');
        whole = digest_of(text);
      }
      t.residual[s] = {Mix64(whole->first ^ Mix64(s)), Mix64(whole->second + s)};
    }
  }
  return absl::OkStatus();
}

}  // namespace

size_t Automaton::StateCount() const {
  size_t out = states();
  for (const Terminal& t : terminals) out += t.dfa.states();
  return out;
}

size_t Automaton::MemoryBytes() const {
  size_t out = sizeof(Automaton) + edges.capacity() * sizeof(Edge) +
               states() * (sizeof(uint32_t) + 2 + sizeof(uint16_t)) + rules.size() * sizeof(uint32_t);
  for (const Terminal& t : terminals) {
    out += sizeof(Terminal) + t.dfa.bytes() +
           t.dfa.states() * (sizeof(Terminal::Bytes) + 2 + sizeof(std::pair<uint64_t, uint64_t>) + 4);
  }
  return out;
}

bool Trim(Automaton& a) {
  const std::vector<uint32_t> height = Heights(a);
  if (height[a.rules[0]] == kInfinite) return false;
  const auto useful = [&](const Edge& e) {
    return height[e.target] != kInfinite && (e.kind != Edge::kCall || height[a.rules[e.arg]] != kInfinite);
  };
  constexpr uint32_t kNone = UINT32_MAX;
  std::vector<uint32_t> state_number(a.states(), kNone), rule_number(a.rules.size(), kNone),
      terminal_number(a.terminals.size(), kNone);
  Automaton out;
  std::vector<uint32_t> order;
  const auto visit = [&](uint32_t s) {
    if (state_number[s] == kNone) {
      state_number[s] = static_cast<uint32_t>(order.size());
      order.push_back(s);
    }
    return state_number[s];
  };
  const auto visit_rule = [&](uint32_t r) {
    if (rule_number[r] == kNone) {
      rule_number[r] = static_cast<uint32_t>(out.rules.size());
      out.rules.push_back(visit(a.rules[r]));
    }
    return rule_number[r];
  };
  visit_rule(0);
  for (size_t at = 0; at < order.size(); ++at) {
    const uint32_t s = order[at];
    out.final.push_back(a.final[s]);
    for (Edge e : EdgesOf(a, s)) {
      if (!useful(e)) continue;
      e.target = visit(e.target);
      if (e.kind == Edge::kCall) e.arg = visit_rule(e.arg);
      if (e.kind == Edge::kTerminal) {
        uint32_t& number = terminal_number[e.arg];
        if (number == kNone) {
          number = static_cast<uint32_t>(out.terminals.size());
          out.terminals.push_back(std::move(a.terminals[e.arg]));
        }
        e.arg = number;
      }
      out.edges.push_back(e);
    }
    out.edge_begin.push_back(static_cast<uint32_t>(out.edges.size()));
  }
  a = std::move(out);
  return true;
}

int FindLeftRecursion(const Automaton& a) {
  const size_t n = a.states();
  const std::vector<uint8_t> nullable = NullableStates(a);
  // Depth-first over what is reached without reading. Tarjan's strongly connected components, iteratively; a
  // call inside one is left recursion.
  const auto zero_targets = [&](uint32_t s, std::vector<uint32_t>& out) {
    out.clear();
    for (const Edge& e : EdgesOf(a, s)) {
      if (e.kind == Edge::kEpsilon) out.push_back(e.target);
      if (e.kind == Edge::kCall) {
        out.push_back(a.rules[e.arg]);
        if (nullable[a.rules[e.arg]] != 0) out.push_back(e.target);
      }
      if (e.kind == Edge::kTerminal && !a.terminals[e.arg].counted && a.terminals[e.arg].dfa.IsFinal(0)) {
        out.push_back(e.target);
      }
    }
  };
  std::vector<uint32_t> index(n, kInfinite), low(n, 0), component(n, kInfinite), stack;
  struct Frame {
    uint32_t state;
    std::vector<uint32_t> targets;
    size_t next = 0;
  };
  std::vector<Frame> frames;
  uint32_t counter = 0, components = 0;
  for (uint32_t root = 0; root < n; ++root) {
    if (index[root] != kInfinite) continue;
    const auto enter = [&](uint32_t s) {
      index[s] = low[s] = counter++;
      stack.push_back(s);
      Frame frame{s, {}, 0};
      zero_targets(s, frame.targets);
      frames.push_back(std::move(frame));
    };
    enter(root);
    while (!frames.empty()) {
      Frame& frame = frames.back();
      if (frame.next < frame.targets.size()) {
        const uint32_t to = frame.targets[frame.next++];
        if (index[to] == kInfinite) {
          enter(to);
        } else if (component[to] == kInfinite) {
          low[frame.state] = std::min(low[frame.state], index[to]);
        }
        continue;
      }
      const uint32_t s = frame.state;
      frames.pop_back();
      if (!frames.empty()) low[frames.back().state] = std::min(low[frames.back().state], low[s]);
      if (low[s] != index[s]) continue;
      while (true) {
        const uint32_t member = stack.back();
        stack.pop_back();
        component[member] = components;
        if (member == s) break;
      }
      ++components;
    }
  }
  for (uint32_t s = 0; s < n; ++s) {
    for (const Edge& e : EdgesOf(a, s)) {
      if (e.kind == Edge::kCall && component[a.rules[e.arg]] == component[s]) return static_cast<int>(e.arg);
    }
  }
  return -1;
}

absl::Status Finish(Automaton& a) {
  // Some tens of milliseconds; what is left out is cached for this grammar alone.
  size_t walks_left = size_t{1} << 16;
  for (size_t i = 0; i < a.terminals.size(); ++i) {
    TP_RETURN_IF_ERROR(FinishTerminal(a.terminals[i], i, walks_left));
  }
  const std::vector<uint32_t> height = Heights(a);
  a.height.resize(a.states());
  a.pure_final.resize(a.states());
  for (size_t s = 0; s < a.states(); ++s) {
    if (height[s] == kInfinite)
      return absl::InvalidArgumentError(absl::StrCat("state ", s, " is a dead end"));
    for (const Edge& e : EdgesOf(a, s)) {
      if (e.kind == Edge::kCall && height[a.rules[e.arg]] == kInfinite) {
        return absl::InvalidArgumentError(absl::StrCat("rule ", e.arg, " is a dead end"));
      }
    }
    a.height[s] = static_cast<uint16_t>(std::min<uint32_t>(height[s], UINT16_MAX));
    a.pure_final[s] = a.final[s] != 0 && a.edge_begin[s] == a.edge_begin[s + 1] ? 1 : 0;
  }
  if (height[a.rules[0]] > kDepthMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("all that it matches is nested deeper than the limit of ", kDepthMax));
  }
  if (const int rule = FindLeftRecursion(a); rule >= 0) {
    return absl::InvalidArgumentError(absl::StrCat("rule ", rule, " is left recursive"));
  }
  return absl::OkStatus();
}

}  // namespace tidepool::structured
