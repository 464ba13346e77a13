#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "base/probe.h"
#include "server/engine/token_constraint.h"

namespace tidepool {

class Tokenizer;

// ConstraintFactory: makes what the engine holds structured answers to, of the grammars that gateways send.
// One a worker: it holds the vocabulary's trie, and the caches of parsed grammars and of masks, each of
// bounded size. Thread-safe.
class ConstraintFactory {
 public:
  // Of a grammar's serialisation, so that it fits a message beside the longest prompt (cluster.proto).
  static constexpr size_t kGrammarBytesMax = size_t{4} << 20;
  static constexpr size_t kGrammarCacheBytesMax = size_t{64} << 20;
  static constexpr size_t kMaskCacheBytesMax = size_t{64} << 20;

  // Of the served model's vocabulary, `vocab_size` logits wide. Takes some 100 ms at 150k tokens. A
  // vocabulary that no grammar can be applied to refuses every structured request, and nothing else.
  ConstraintFactory(const Tokenizer& tokenizer, uint32_t vocab_size, MetricRegistry& metrics);
  ~ConstraintFactory();

  // `grammar`: CompiledGrammar::bytes(). Nothing that is cached for one `salt` is found with another.
  // InvalidArgument: too large, no grammar, or too ambiguous a one. FailedPrecondition: this worker has no
  // usable vocabulary.
  absl::StatusOr<std::unique_ptr<TokenConstraint>> Make(std::string_view grammar, std::string_view salt);

 private:
  struct State;
  const std::shared_ptr<State> state_;  // its constraints and the metrics' collector use it, too
};

}  // namespace tidepool
