#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "base/status.h"
#include "server/structured/budget.h"

// Finite automata over bytes.
namespace tidepool::structured {

inline constexpr uint32_t kDead = UINT32_MAX;

// Nfa: with epsilon edges; one start, one end. The regular expressions' first form.
struct Nfa {
  struct Edge {
    uint8_t lo, hi;
    uint32_t to;
  };
  struct State {
    std::vector<Edge> edges;
    std::vector<uint32_t> epsilon;
  };
  std::vector<State> states;

  uint32_t Add() {
    states.emplace_back();
    return static_cast<uint32_t>(states.size() - 1);
  }
  void Connect(uint32_t from, uint8_t lo, uint8_t hi, uint32_t to) {
    states[from].edges.push_back({lo, hi, to});
  }
  void Epsilon(uint32_t from, uint32_t to) { states[from].epsilon.push_back(to); }
};

// Dfa: trimmed: each state is reachable and reaches a final one; what does neither is kDead. State 0 is the
// start. A language without any text has no states at all.
struct Dfa {
  std::array<uint8_t, 256> classes{};  // byte to column
  uint32_t columns = 1;
  std::vector<uint32_t> next;  // [state][column]
  std::vector<uint8_t> final;  // [state]

  size_t states() const { return final.size(); }
  bool empty() const { return final.empty(); }
  uint32_t Next(uint32_t state, uint8_t byte) const { return next[state * columns + classes[byte]]; }
  bool IsFinal(uint32_t state) const { return final[state] != 0; }
  // Whether the text matches.
  bool Matches(std::string_view text) const;
  // Bytes of memory.
  size_t bytes() const { return sizeof(Dfa) + next.size() * 4 + final.size(); }
};

// Minimal Dfa of what leads from `start` to `end`.
absl::StatusOr<Dfa> Determinize(const Nfa& nfa, uint32_t start, uint32_t end, Budget& budget);

// Adds the paths of `dfa` between two states.
void AddTo(const Dfa& dfa, Nfa& nfa, uint32_t from, uint32_t to);

// The minimal, trimmed form; states in breadth-first order, so equal languages give equal automata.
absl::StatusOr<Dfa> Minimize(const Dfa& dfa, Budget& budget);

// What both match; what `a` matches and `b` does not. Minimal.
absl::StatusOr<Dfa> Intersect(const Dfa& a, const Dfa& b, Budget& budget);
absl::StatusOr<Dfa> Subtract(const Dfa& a, const Dfa& b, Budget& budget);

// Whether no text matches both.
absl::StatusOr<bool> Disjoint(const Dfa& a, const Dfa& b, Budget& budget);

// Exactly these texts.
absl::StatusOr<Dfa> OneOf(std::vector<std::string> texts, Budget& budget);

// Any valid UTF-8 text.
absl::StatusOr<Dfa> AnyUtf8(Budget& budget);

// The texts of `dfa`, valid UTF-8 all, that have [min, max] characters; max UINT32_MAX is no limit.
absl::StatusOr<Dfa> OfLength(const Dfa& dfa, uint32_t min, uint32_t max, Budget& budget);

// Any valid UTF-8 text that holds none of `stops`.
absl::StatusOr<Dfa> Utf8Without(const std::vector<std::string>& stops, Budget& budget);

// A Dfa by exploring a deterministic machine: states of type S (absl-hashable, comparable), step(state, byte)
// -> std::optional<S>, final(state) -> bool. Only the bytes of `alphabet` are tried. Minimal.
template <typename S, typename Step, typename Final>
absl::StatusOr<Dfa> Explore(const S& start, std::string_view alphabet, const Step& step, const Final& final,
                            Budget& budget) {
  Dfa dfa;
  dfa.columns = static_cast<uint32_t>(alphabet.size()) + 1;
  dfa.classes.fill(static_cast<uint8_t>(alphabet.size()));
  for (size_t i = 0; i < alphabet.size(); ++i) {
    dfa.classes[static_cast<uint8_t>(alphabet[i])] = static_cast<uint8_t>(i);
  }
  absl::flat_hash_map<S, uint32_t> index{{start, 0}};
  std::vector<S> states{start};
  for (size_t at = 0; at < states.size(); ++at) {
    TP_RETURN_IF_ERROR(budget.AddStates(1));
    TP_RETURN_IF_ERROR(budget.Work(alphabet.size()));
    const S from = states[at];
    dfa.final.push_back(final(from) ? 1 : 0);
    for (const char byte : alphabet) {
      const std::optional<S> to = step(from, static_cast<uint8_t>(byte));
      uint32_t target = kDead;
      if (to) {
        const auto [found, fresh] = index.emplace(*to, static_cast<uint32_t>(states.size()));
        if (fresh) states.push_back(*to);
        target = found->second;
      }
      dfa.next.push_back(target);
    }
    dfa.next.push_back(kDead);
  }
  budget.DropStates(states.size());
  return Minimize(dfa, budget);
}

// Largest number of UTF-8 characters in a text of the language, UINT32_MAX if there is no largest.
uint32_t CharactersMax(const Dfa& dfa);
// Smallest.
uint32_t CharactersMin(const Dfa& dfa);

}  // namespace tidepool::structured
