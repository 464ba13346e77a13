#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tidepool {

namespace structured {
struct Automaton;  // automaton.h
}  // namespace structured

// CompiledGrammar: what a request's output is held to, as an automaton over bytes (and single vocabulary
// tokens): a pushdown of byte edges, calls and finite automata. It knows no vocabulary, so that one compiled
// in the gateway serves every worker of the model. Immutable, thread-safe. Made by GrammarBuilder::Build.
class CompiledGrammar {
 public:
  // Reads what bytes() gave. Distrusts its input: any other bytes give InvalidArgument (which part, and why),
  // never a crash, and what is accepted is as sound as what Build makes: no state is a dead end. Limits:
  // kParseBytesMax.
  static absl::StatusOr<std::shared_ptr<const CompiledGrammar>> Parse(std::string_view bytes);
  static constexpr size_t kParseBytesMax = size_t{16} << 20;

  ~CompiledGrammar();
  CompiledGrammar(const CompiledGrammar&) = delete;
  CompiledGrammar& operator=(const CompiledGrammar&) = delete;

  // Versioned, checksummed serialisation (its byte grammar is in compiled_grammar.cc); equal for equal
  // sources.
  const std::string& bytes() const { return bytes_; }
  // SHA-256 of bytes(), 32 raw bytes.
  const std::string& digest() const { return digest_; }
  // Memory that this object holds, for caches that have a byte cap.
  size_t memory_bytes() const { return memory_bytes_; }
  // States of all its automata.
  size_t state_count() const;

  const structured::Automaton& automaton() const { return *automaton_; }

 private:
  friend class GrammarBuilder;
  CompiledGrammar(std::unique_ptr<const structured::Automaton> automaton, std::string bytes);

  std::unique_ptr<const structured::Automaton> automaton_;
  std::string bytes_, digest_;
  size_t memory_bytes_ = 0;
};

}  // namespace tidepool
