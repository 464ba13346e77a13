#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/structured/dfa.h"

// What a CompiledGrammar holds: a recursive transition network over bytes.
//
// A *rule* is a nondeterministic automaton whose edges read a byte, read exactly one vocabulary token, run a
// *terminal* (a Dfa) or call a rule. A *configuration* of a parse is (state, stack of return states); the
// matcher runs the set of all configurations. Where an edge runs a terminal the configuration is (terminal,
// its state, stack), with the edge's target on the stack: a terminal is a call too.
namespace tidepool::structured {

// Deepest stack of a parse: about half as many levels of nested JSON. A branch that could end only beyond is
// not taken, see Automaton::height.
inline constexpr uint32_t kDepthMax = 512;

// Terminal: a Dfa, or the *counted* form, which stands for C{min,max} and a closing byte: all that is final
// is reached from state 0 alone, by that byte; each path from state 0 back to it is one unit. A counter
// beside the state says how many units have begun.
struct Terminal {
  Dfa dfa;
  bool counted = false;
  uint32_t min = 0, max = UINT32_MAX;  // UINT32_MAX: no limit

  // Derived (Finish).
  using Bytes = std::array<uint64_t, 4>;
  std::vector<Bytes> first;   // by state: bytes that may follow
  std::vector<uint8_t> live;  // by state: whether any byte may follow
  // Wide states, at which many tokens fit: worth a token class (token_class.h) that is kept.
  std::vector<uint8_t> wide;
  // Of a wide state: digest of what follows it, equal for equal languages in any grammar.
  std::vector<std::pair<uint64_t, uint64_t>> residual;
  // Of a wide state: the state that most bytes lead to, if that in turn leads to itself for most; else
  // itself.
  std::vector<uint32_t> reference;
};

struct Edge {
  enum Kind : uint8_t { kByte, kEpsilon, kTerminal, kCall, kToken };
  Kind kind = kEpsilon;
  uint8_t lo = 0, hi = 0;  // kByte: [lo, hi]
  uint32_t arg = 0;        // kTerminal: its index; kCall: the rule; kToken: the vocabulary id
  uint32_t target = 0;
};

struct Automaton {
  std::vector<Terminal> terminals;
  std::vector<uint32_t> rules;  // their start states; rule 0 is the grammar
  // States of all rules; the edges of s are edges[edge_begin[s], edge_begin[s + 1]).
  std::vector<uint32_t> edge_begin{0};
  std::vector<Edge> edges;
  std::vector<uint8_t> final;

  // Derived (Finish): height[s]: the least number of stack levels above its own that a way from s to the end
  // of its rule needs. A configuration with `d` levels below it can be completed within kDepthMax if and only
  // if d + height[s] <= kDepthMax, so that dropping all others never leads into a dead end.
  std::vector<uint16_t> height;
  std::vector<uint8_t> pure_final;  // final, without edges: a call that returns there need not be remembered

  size_t states() const { return final.size(); }
  size_t StateCount() const;  // with the terminals'
  size_t MemoryBytes() const;
};

// Removes states that nothing reaches or that reach no end, and rules and terminals that are not used. False:
// nothing is left, the grammar matches nothing.
bool Trim(Automaton& automaton);

// Derives what is derived and checks what the matcher relies on. InvalidArgument: a state is a dead end, a
// rule calls itself before it has read anything (left recursion), a counted terminal is malformed, or all
// that matches is nested deeper than kDepthMax. Indices must be in range.
absl::Status Finish(Automaton& automaton);

// The rule that is left recursive, or -1.
int FindLeftRecursion(const Automaton& automaton);

}  // namespace tidepool::structured
