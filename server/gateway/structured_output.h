#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <variant>

#include "server/gateway/chat/chat_format.h"
#include "server/gateway/errors.h"
#include "server/gateway/probe.h"
#include "server/gateway/request.h"
#include "server/structured/compiled_grammar.h"
#include "server/structured/grammar_cache.h"
#include "server/structured/limits.h"

namespace tidepool {

// GrammarCompiler: what requests' answers are held to, as grammars for the workers, with a cache of
// `cache_bytes`. A grammar is found again by the tenant only that had it compiled. Thread-safe; one
// compilation takes at most CompileLimits' CPU time of the calling thread, so call it in the WorkPool.
class GrammarCompiler {
 public:
  using Grammar = std::shared_ptr<const CompiledGrammar>;

  // `format` and `probe` are borrowed.
  GrammarCompiler(const ChatFormat& format, size_t cache_bytes, GatewayProbe& probe)
      : format_(format), probe_(probe), cache_(cache_bytes) {}

  // Null: the answer is free. `prompt`: as text, of a chat; `salt`: the tenant's. Errors: 400, naming the
  // field and, of a schema, the JSON pointer of what is wrong or not supported.
  std::variant<Grammar, ApiError> Compile(const InferenceRequest& request, std::string_view prompt,
                                          std::string_view salt);

  GrammarCache::Stats cache_stats() const { return cache_.stats(); }

 private:
  const ChatFormat& format_;
  GatewayProbe& probe_;
  const CompileLimits limits_;
  GrammarCache cache_;
};

}  // namespace tidepool
