#include "server/structured/expression.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/structured/json_pieces.h"

namespace tidepool::structured {

// Emitter: Codec from expressions to an Automaton, Thompson's construction with calls and terminals as edges.
class Emitter {
 public:
  explicit Emitter(ExpressionPool& pool) : pool_(pool), budget_(pool.budget_) {}

  absl::StatusOr<std::unique_ptr<Automaton>> Run(ExpressionPool::Id root) {
    regular_.assign(pool_.nodes_.size(), kUnknown);
    rule_regular_.assign(pool_.rules_.size(), kUnknown);
    rule_number_.assign(pool_.rules_.size(), UINT32_MAX);
    auto out = std::make_unique<Automaton>();
    TP_ASSIGN_OR_RETURN(const uint32_t start, AddState());
    TP_ASSIGN_OR_RETURN(const uint32_t end, AddState());
    final_[end] = 1;
    out->rules.push_back(start);
    TP_RETURN_IF_ERROR(Emit(root, start, end, false, 0));
    // Rules as they are met, so that the stack does not follow chains of calls.
    for (size_t i = 0; i < pending_.size(); ++i) {
      const ExpressionPool::RuleEntry& rule = pool_.rules_[pending_[i]];
      if (!rule.body) return absl::InternalError(absl::StrCat("rule ", rule.name, " is not defined"));
      TP_ASSIGN_OR_RETURN(const uint32_t from, AddState());
      TP_ASSIGN_OR_RETURN(const uint32_t to, AddState());
      final_[to] = 1;
      out->rules.push_back(from);
      TP_RETURN_IF_ERROR(Emit(*rule.body, from, to, rule.merge, 0));
    }
    for (size_t s = 0; s < edges_.size(); ++s) {
      out->edges.insert(out->edges.end(), edges_[s].begin(), edges_[s].end());
      out->edge_begin.push_back(static_cast<uint32_t>(out->edges.size()));
    }
    out->final = std::move(final_);
    out->terminals = pool_.terminals_;
    return out;
  }

  // The pool's rule behind rule `number` of the automaton before trimming.
  const std::string& RuleName(size_t number) const {
    static const std::string kRoot = "root";
    return number == 0 ? kRoot : pool_.rules_[pending_[number - 1]].name;
  }

 private:
  using Id = ExpressionPool::Id;
  using Kind = ExpressionPool::Kind;
  enum : uint8_t { kUnknown, kBusy, kNo, kYes };
  // Chains of rules are followed this far when looking for regular ones.
  static constexpr int kChainMax = 200;
  // Above these an expression stays a network: a finite automaton would be large.
  static constexpr size_t kMergedNfaMax = 4'000;
  static constexpr size_t kMergedDfaMax = 1'500;

  absl::StatusOr<uint32_t> AddState() {
    TP_RETURN_IF_ERROR(budget_.AddStates(1));
    edges_.emplace_back();
    final_.push_back(0);
    return static_cast<uint32_t>(final_.size() - 1);
  }
  void AddEdge(uint32_t from, Edge edge) { edges_[from].push_back(edge); }
  void Skip(uint32_t from, uint32_t to) { AddEdge(from, {Edge::kEpsilon, 0, 0, 0, to}); }

  bool IsRegular(Id id, int depth) {
    if (depth > kChainMax) return false;
    if (regular_[id] == kYes || regular_[id] == kNo) return regular_[id] == kYes;
    const ExpressionPool::Node& node = pool_.nodes_[id];
    bool yes = true;
    switch (node.kind) {
      case Kind::kLiteral:
      case Kind::kSet:
        break;
      case Kind::kTerminal:
        yes = !pool_.terminals_[node.a].counted;
        break;
      case Kind::kSequence:
      case Kind::kChoice:
      case Kind::kRepeat:
        for (const Id part : node.parts) yes = yes && IsRegular(part, depth + 1);
        break;
      case Kind::kRule: {
        uint8_t& known = rule_regular_[node.a];
        if (known == kUnknown) {
          known = kBusy;
          const std::optional<Id> body = pool_.rules_[node.a].body;
          const bool regular = body && IsRegular(*body, depth + 1);
          rule_regular_[node.a] = regular ? kYes : kNo;
        }
        yes = rule_regular_[node.a] == kYes;  // busy: it calls itself
        break;
      }
      case Kind::kToken:
      case Kind::kGraph:
        yes = false;
    }
    regular_[id] = yes ? kYes : kNo;
    return yes;
  }

  // Whether a finite automaton would gain anything: bytes one after the other are as good as edges.
  bool WorthMerging(Id id, int depth) const {
    const ExpressionPool::Node& node = pool_.nodes_[id];
    if (node.kind == Kind::kLiteral) return false;
    if (node.kind != Kind::kSequence || depth > 8) return true;
    for (const Id part : node.parts) {
      if (WorthMerging(part, depth + 1)) return true;
    }
    return false;
  }

  // Appends the expression to an Nfa; false where that gets too large.
  absl::StatusOr<bool> EmitNfa(Id id, Nfa& nfa, uint32_t from, uint32_t to, int depth) {
    TP_RETURN_IF_ERROR(budget_.Work(4));
    if (nfa.states.size() > kMergedNfaMax || depth > kChainMax) return false;
    const ExpressionPool::Node& node = pool_.nodes_[id];
    switch (node.kind) {
      case Kind::kLiteral: {
        uint32_t at = from;
        if (node.bytes.empty()) nfa.Epsilon(from, to);
        for (size_t i = 0; i < node.bytes.size(); ++i) {
          const uint32_t next = i + 1 == node.bytes.size() ? to : nfa.Add();
          nfa.Connect(at, static_cast<uint8_t>(node.bytes[i]), static_cast<uint8_t>(node.bytes[i]), next);
          at = next;
        }
        return true;
      }
      case Kind::kSet:
        TP_RETURN_IF_ERROR(budget_.Work(node.set.ranges().size()));
        node.set.AddTo(nfa, from, to);
        return true;
      case Kind::kTerminal: {
        const Dfa& dfa = pool_.terminals_[node.a].dfa;
        TP_RETURN_IF_ERROR(budget_.Work(dfa.states() * 8));
        if (nfa.states.size() + dfa.states() > kMergedNfaMax) return false;
        AddTo(dfa, nfa, from, to);
        return true;
      }
      case Kind::kSequence: {
        uint32_t at = from;
        if (node.parts.empty()) nfa.Epsilon(from, to);
        for (size_t i = 0; i < node.parts.size(); ++i) {
          const uint32_t next = i + 1 == node.parts.size() ? to : nfa.Add();
          TP_ASSIGN_OR_RETURN(const bool fits, EmitNfa(node.parts[i], nfa, at, next, depth + 1));
          if (!fits) return false;
          at = next;
        }
        return true;
      }
      case Kind::kChoice:
        for (const Id part : node.parts) {
          const uint32_t begin = nfa.Add(), end = nfa.Add();
          nfa.Epsilon(from, begin);
          nfa.Epsilon(end, to);
          TP_ASSIGN_OR_RETURN(const bool fits, EmitNfa(part, nfa, begin, end, depth + 1));
          if (!fits) return false;
        }
        return true;
      case Kind::kRepeat: {
        uint32_t at = nfa.Add();
        nfa.Epsilon(from, at);
        for (uint32_t i = 0; i < node.a || (node.b != UINT32_MAX && i < node.b); ++i) {
          if (i >= node.a) nfa.Epsilon(at, to);
          const uint32_t next = nfa.Add();
          TP_ASSIGN_OR_RETURN(const bool fits, EmitNfa(node.parts[0], nfa, at, next, depth + 1));
          if (!fits) return false;
          at = next;
        }
        if (node.b == UINT32_MAX) {
          const uint32_t begin = nfa.Add(), end = nfa.Add();
          nfa.Epsilon(at, begin);
          nfa.Epsilon(end, begin);
          nfa.Epsilon(begin, to);
          return EmitNfa(node.parts[0], nfa, begin, end, depth + 1);
        }
        nfa.Epsilon(at, to);
        return true;
      }
      case Kind::kRule:
        return EmitNfa(*pool_.rules_[node.a].body, nfa, from, to, depth + 1);
      case Kind::kToken:
      case Kind::kGraph:
        break;
    }
    return absl::InternalError("not a regular expression");
  }

  // The regular expressions `parts`, one after the other (`choice`: one of them), as one terminal; false
  // where that is too large.
  absl::StatusOr<bool> EmitMerged(std::span<const Id> parts, bool choice, uint32_t from, uint32_t to) {
    Nfa nfa;
    const uint32_t start = nfa.Add(), end = nfa.Add();
    uint32_t at = start;
    for (size_t i = 0; i < parts.size(); ++i) {
      const uint32_t begin = choice ? nfa.Add() : at;
      if (choice) nfa.Epsilon(start, begin);
      const uint32_t next = choice || i + 1 < parts.size() ? nfa.Add() : end;
      TP_ASSIGN_OR_RETURN(const bool fits, EmitNfa(parts[i], nfa, begin, next, 0));
      if (!fits) return false;
      if (choice) nfa.Epsilon(next, end);
      at = next;
    }
    // Its own small limit of states, within what is left of the budget.
    TP_ASSIGN_OR_RETURN(std::optional<Dfa> dfa, DeterminizeUpTo(nfa, start, end));
    if (!dfa) return false;
    if (dfa->empty()) return true;
    const Id terminal = pool_.Automatic(*std::move(dfa));
    AddEdge(from, {Edge::kTerminal, 0, 0, pool_.nodes_[terminal].a, to});
    regular_.resize(pool_.nodes_.size(), kUnknown);
    return true;
  }

  absl::StatusOr<std::optional<Dfa>> DeterminizeUpTo(const Nfa& nfa, uint32_t start, uint32_t end) {
    CompileLimits small = budget_.limits();
    small.states_max = std::min(small.states_max, kMergedDfaMax);
    Budget inner(small);
    absl::StatusOr<Dfa> dfa = Determinize(nfa, start, end, inner);
    TP_RETURN_IF_ERROR(budget_.LookNow());
    if (!dfa.ok()) return std::nullopt;
    return std::optional<Dfa>(*std::move(dfa));
  }

  // `merge`: parts that are regular become terminals.
  absl::Status Emit(Id id, uint32_t from, uint32_t to, bool merge, int depth) {
    TP_RETURN_IF_ERROR(budget_.Work(4));
    if (depth > 4 * budget_.limits().nesting_max) {
      return absl::InvalidArgumentError(
          absl::StrCat("nested deeper than the limit of ", budget_.limits().nesting_max));
    }
    if (merge && WorthMerging(id, 0) && IsRegular(id, 0)) {
      const Id parts[] = {id};
      TP_ASSIGN_OR_RETURN(const bool merged, EmitMerged(parts, false, from, to));
      if (merged) return absl::OkStatus();
    }
    // By value: EmitMerged may move the pool's nodes.
    const ExpressionPool::Node node = pool_.nodes_[id];
    switch (node.kind) {
      case Kind::kLiteral: {
        uint32_t at = from;
        if (node.bytes.empty()) Skip(from, to);
        for (size_t i = 0; i < node.bytes.size(); ++i) {
          uint32_t next = to;
          if (i + 1 < node.bytes.size()) {
            TP_ASSIGN_OR_RETURN(next, AddState());
          }
          const auto byte = static_cast<uint8_t>(node.bytes[i]);
          AddEdge(at, {Edge::kByte, byte, byte, 0, next});
          at = next;
        }
        return absl::OkStatus();
      }
      case Kind::kToken:
        AddEdge(from, {Edge::kToken, 0, 0, node.a, to});
        return absl::OkStatus();
      case Kind::kSet: {
        Nfa nfa;
        const uint32_t start = nfa.Add(), end = nfa.Add();
        node.set.AddTo(nfa, start, end);
        TP_ASSIGN_OR_RETURN(Dfa dfa, Determinize(nfa, start, end, budget_));
        if (dfa.empty()) return absl::OkStatus();
        const Id terminal = pool_.Automatic(std::move(dfa));
        AddEdge(from, {Edge::kTerminal, 0, 0, pool_.nodes_[terminal].a, to});
        return absl::OkStatus();
      }
      case Kind::kTerminal:
        if (!pool_.terminals_[node.a].dfa.empty()) AddEdge(from, {Edge::kTerminal, 0, 0, node.a, to});
        return absl::OkStatus();
      case Kind::kRule:
        AddEdge(from, {Edge::kCall, 0, 0, RuleNumber(node.a), to});
        return absl::OkStatus();
      case Kind::kSequence: {
        uint32_t at = from;
        if (node.parts.empty()) Skip(from, to);
        for (size_t i = 0; i < node.parts.size();) {
          // Neighbours that are regular together.
          size_t last = i + 1;
          bool merged = false;
          if (merge && IsRegular(node.parts[i], 0)) {
            bool worth = WorthMerging(node.parts[i], 0);
            while (last < node.parts.size() && IsRegular(node.parts[last], 0)) {
              worth |= WorthMerging(node.parts[last++], 0);
            }
            if (!worth || last == i + 1) last = i + 1;
          }
          uint32_t next = to;
          if (last < node.parts.size()) {
            TP_ASSIGN_OR_RETURN(next, AddState());
          }
          if (last > i + 1) {
            TP_ASSIGN_OR_RETURN(merged,
                                EmitMerged(std::span(node.parts).subspan(i, last - i), false, at, next));
            if (!merged && last == node.parts.size()) {
              TP_ASSIGN_OR_RETURN(next, AddState());
            }
          }
          if (!merged) {
            last = i + 1;
            if (last == node.parts.size()) next = to;
            TP_RETURN_IF_ERROR(Emit(node.parts[i], at, next, merge, depth + 1));
          }
          at = next;
          i = last;
        }
        return absl::OkStatus();
      }
      case Kind::kChoice: {
        std::vector<Id> regular;
        for (const Id part : node.parts) {
          if (merge && IsRegular(part, 0)) regular.push_back(part);
        }
        bool merged = false;
        if (regular.size() > 1) {
          TP_ASSIGN_OR_RETURN(merged, EmitMerged(regular, true, from, to));
        }
        for (const Id part : node.parts) {
          if (merged && IsRegular(part, 0)) continue;
          TP_ASSIGN_OR_RETURN(const uint32_t begin, AddState());
          TP_ASSIGN_OR_RETURN(const uint32_t end, AddState());
          Skip(from, begin);
          Skip(end, to);
          TP_RETURN_IF_ERROR(Emit(part, begin, end, merge, depth + 1));
        }
        return absl::OkStatus();
      }
      case Kind::kRepeat: {
        TP_ASSIGN_OR_RETURN(uint32_t at, AddState());
        Skip(from, at);
        for (uint32_t i = 0; i < node.a || (node.b != UINT32_MAX && i < node.b); ++i) {
          if (i >= node.a) Skip(at, to);
          TP_ASSIGN_OR_RETURN(const uint32_t next, AddState());
          TP_RETURN_IF_ERROR(Emit(node.parts[0], at, next, merge, depth + 1));
          at = next;
        }
        if (node.b == UINT32_MAX) {
          TP_ASSIGN_OR_RETURN(const uint32_t begin, AddState());
          TP_ASSIGN_OR_RETURN(const uint32_t end, AddState());
          Skip(at, begin);
          Skip(end, begin);
          Skip(begin, to);
          return Emit(node.parts[0], begin, end, merge, depth + 1);
        }
        Skip(at, to);
        return absl::OkStatus();
      }
      case Kind::kGraph: {
        const ExpressionPool::Graph& graph = pool_.graphs_[node.a];
        std::vector<uint32_t> states(graph.states);
        for (uint32_t s = 0; s < graph.states; ++s) {
          TP_ASSIGN_OR_RETURN(states[s], AddState());
        }
        Skip(from, states[0]);
        Skip(states[1], to);
        for (const auto& arc : graph.arcs) {
          if (arc.node) {
            TP_RETURN_IF_ERROR(Emit(*arc.node, states[arc.from], states[arc.to], merge, depth + 1));
          } else {
            Skip(states[arc.from], states[arc.to]);
          }
        }
        return absl::OkStatus();
      }
    }
    return absl::InternalError("unknown expression");
  }

  uint32_t RuleNumber(uint32_t rule) {
    if (rule_number_[rule] == UINT32_MAX) {
      pending_.push_back(rule);
      rule_number_[rule] = static_cast<uint32_t>(pending_.size());  // rule 0 is the root expression
    }
    return rule_number_[rule];
  }

  ExpressionPool& pool_;
  Budget& budget_;
  std::vector<std::vector<Edge>> edges_;
  std::vector<uint8_t> final_;
  std::vector<uint8_t> regular_, rule_regular_;
  std::vector<uint32_t> rule_number_, pending_;
};

ExpressionPool::ExpressionPool(const CompileLimits& limits) : budget_(limits) {}
ExpressionPool::~ExpressionPool() = default;

ExpressionPool::Id ExpressionPool::Add(Node node) {
  nodes_.push_back(std::move(node));
  return static_cast<Id>(nodes_.size() - 1);
}

ExpressionPool::Id ExpressionPool::Literal(std::string_view bytes) {
  return Add({.kind = Kind::kLiteral, .bytes = std::string(bytes)});
}

ExpressionPool::Id ExpressionPool::Token(int32_t id) {
  if (id < 0) Fail(absl::InvalidArgumentError(absl::StrCat("token id ", id, " is negative")));
  return Add({.kind = Kind::kToken, .a = static_cast<uint32_t>(id)});
}

ExpressionPool::Id ExpressionPool::Sequence(std::vector<Id> parts) {
  if (parts.size() == 1) return parts[0];
  return Add({.kind = Kind::kSequence, .parts = std::move(parts)});
}

ExpressionPool::Id ExpressionPool::Choice(std::vector<Id> options) {
  if (options.size() == 1) return options[0];
  return Add({.kind = Kind::kChoice, .parts = std::move(options)});
}

ExpressionPool::Id ExpressionPool::Repeat(Id node, uint32_t min, uint32_t max) {
  const uint32_t limit = budget_.limits().repeat_max;
  if (min > limit || (max != UINT32_MAX && max > limit)) {
    Fail(absl::InvalidArgumentError(absl::StrCat("a repetition above the limit of ", limit)));
    return node;
  }
  if (min > max) Fail(absl::InvalidArgumentError("a repetition whose minimum is above its maximum"));
  return Add({.kind = Kind::kRepeat, .parts = {node}, .a = min, .b = max});
}

ExpressionPool::Id ExpressionPool::Set(CharSet set) {
  return Add({.kind = Kind::kSet, .set = std::move(set)});
}

ExpressionPool::Id ExpressionPool::AddTerminal(Terminal terminal) {
  const Dfa& dfa = terminal.dfa;
  std::string key(reinterpret_cast<const char*>(dfa.classes.data()), dfa.classes.size());
  key.append(reinterpret_cast<const char*>(dfa.next.data()), dfa.next.size() * sizeof(uint32_t));
  key.append(reinterpret_cast<const char*>(dfa.final.data()), dfa.final.size());
  absl::StrAppend(&key, terminal.counted ? "c" : "-", terminal.min, ",", terminal.max);
  const auto [it, fresh] = terminal_index_.emplace(std::move(key), static_cast<uint32_t>(terminals_.size()));
  if (fresh) {
    if (absl::Status status = budget_.AddStates(dfa.states()); !status.ok()) Fail(std::move(status));
    terminals_.push_back(std::move(terminal));
  }
  return Add({.kind = Kind::kTerminal, .a = it->second});
}

ExpressionPool::Id ExpressionPool::Automatic(Dfa dfa) {
  if (dfa.empty()) return Nothing();
  Terminal terminal;
  terminal.dfa = std::move(dfa);
  return AddTerminal(std::move(terminal));
}

ExpressionPool::Id ExpressionPool::Counted(Dfa loop, uint32_t min, uint32_t max) {
  if (loop.empty() || min > max) return Nothing();
  Terminal terminal;
  terminal.dfa = std::move(loop);
  terminal.counted = true;
  terminal.min = min;
  terminal.max = max;
  return AddTerminal(std::move(terminal));
}

uint32_t ExpressionPool::AddRule(std::string name) {
  rules_.push_back({std::move(name), std::nullopt, false});
  return static_cast<uint32_t>(rules_.size() - 1);
}

ExpressionPool::Id ExpressionPool::Rule(uint32_t rule) { return Add({.kind = Kind::kRule, .a = rule}); }

ExpressionPool::Id ExpressionPool::FromGraph(Graph graph) {
  graphs_.push_back(std::move(graph));
  return Add({.kind = Kind::kGraph, .a = static_cast<uint32_t>(graphs_.size() - 1)});
}

JsonPieces& ExpressionPool::Json(JsonWhitespace whitespace) {
  auto& pieces = json_[whitespace == JsonWhitespace::kFlexible ? 1 : 0];
  if (pieces == nullptr) pieces = std::make_unique<JsonPieces>(*this, whitespace);
  return *pieces;
}

absl::StatusOr<std::unique_ptr<Automaton>> ExpressionPool::Compile(Id root) {
  TP_RETURN_IF_ERROR(status_);
  Emitter emitter(*this);
  TP_ASSIGN_OR_RETURN(std::unique_ptr<Automaton> automaton, emitter.Run(root));
  TP_RETURN_IF_ERROR(status_);
  TP_RETURN_IF_ERROR(budget_.LookNow());
  // Before trimming, while the rules still have their names.
  if (const int rule = FindLeftRecursion(*automaton); rule >= 0) {
    return absl::InvalidArgumentError(absl::StrCat("rule '", emitter.RuleName(static_cast<size_t>(rule)),
                                                   "' is left recursive: it calls itself before it has "
                                                   "read anything; put what it reads first"));
  }
  if (!Trim(*automaton)) return absl::InvalidArgumentError("nothing at all matches it");
  return automaton;
}

}  // namespace tidepool::structured
