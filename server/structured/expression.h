#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "server/structured/automaton.h"
#include "server/structured/budget.h"
#include "server/structured/char_set.h"
#include "server/structured/grammar_builder.h"

namespace tidepool::structured {

class JsonPieces;

// ExpressionPool: the expressions of one GrammarBuilder, and their way into an Automaton. Nodes are indices.
// Owned by one thread.
class ExpressionPool {
 public:
  using Id = uint32_t;

  explicit ExpressionPool(const CompileLimits& limits);
  ~ExpressionPool();

  Budget& budget() { return budget_; }

  Id Literal(std::string_view bytes);
  Id Token(int32_t id);
  Id Sequence(std::vector<Id> parts);
  Id Choice(std::vector<Id> options);
  Id Repeat(Id node, uint32_t min, uint32_t max);  // max UINT32_MAX: no limit
  Id Set(CharSet set);
  // An empty Dfa is an expression that nothing matches.
  Id Automatic(Dfa dfa);
  // `loop` is C*X with X a closing byte (automaton.h): X behind [min, max] units.
  Id Counted(Dfa loop, uint32_t min, uint32_t max);
  Id Nothing() { return Choice({}); }

  // A rule may be used before it is defined. Each one that is used has to be defined.
  uint32_t AddRule(std::string name);
  void DefineRule(uint32_t rule, Id body) { rules_[rule].body = body; }
  Id Rule(uint32_t rule);

  // A graph of expressions, for what is no tree (the properties of an object). State 0 is its start, 1 its
  // end. An arc without a node is taken without reading.
  struct Graph {
    struct Arc {
      uint32_t from, to;
      std::optional<Id> node;
    };
    uint32_t states = 2;
    std::vector<Arc> arcs;

    uint32_t Add() { return states++; }
    void Connect(uint32_t from, Id node, uint32_t to) { arcs.push_back({from, to, node}); }
    void Skip(uint32_t from, uint32_t to) { arcs.push_back({from, to, std::nullopt}); }
  };
  Id FromGraph(Graph graph);

  // Rules whose body is to be made into finite automata wherever it can be (EBNF, which spells everything out
  // in characters): far cheaper to match than calls and bytes.
  void MergeRegular(uint32_t rule) { rules_[rule].merge = true; }

  // The first error of the functions that have no status to return.
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const absl::Status& status() const { return status_; }

  // The pieces of JSON for one white-space style, made when first asked for.
  JsonPieces& Json(JsonWhitespace whitespace);

  // Trimmed, not finished (automaton.h).
  absl::StatusOr<std::unique_ptr<Automaton>> Compile(Id root);

 private:
  friend class Emitter;
  enum class Kind : uint8_t { kLiteral, kToken, kSequence, kChoice, kRepeat, kSet, kTerminal, kRule, kGraph };
  struct Node {
    Kind kind;
    std::string bytes;
    std::vector<Id> parts;
    CharSet set;
    uint32_t a = 0, b = 0;  // kToken: id; kRepeat: min, max; kTerminal, kRule, kGraph: index
  };
  struct RuleEntry {
    std::string name;
    std::optional<Id> body;
    bool merge = false;
  };
  Id Add(Node node);
  Id AddTerminal(Terminal terminal);

  Budget budget_;
  absl::Status status_;
  std::vector<Node> nodes_;
  std::vector<RuleEntry> rules_;
  std::vector<Graph> graphs_;
  std::vector<Terminal> terminals_;
  absl::flat_hash_map<std::string, uint32_t> terminal_index_;  // by content
  std::unique_ptr<JsonPieces> json_[2];
};

}  // namespace tidepool::structured
