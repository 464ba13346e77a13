// Schemas, patterns, grammars and compiled grammars of strangers: each ends in a status within its limits,
// and what is accepted can be walked: a mask is empty only where the output has to end, and a token is
// accepted if and only if its bit is set.
//
// The first byte says what the rest is: s schema, S the same without white space, r regex, e EBNF, b the
// bytes of a compiled grammar (whose checksum is put right), t stop strings separated by 0x1E.
#include <time.h>

#include <bit>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/rng.h"
#include "server/structured/grammar_builder.h"
#include "server/structured/matcher.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

std::shared_ptr<const TokenTable> Table() {
  static const auto* table = [] {
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    for (const char* longer :
         {"{\"", "\":",  "\": \"", "\",", "\", \"", "\"}", "true", "null",     "[]",
          "],",  "]}",   ", ",     "foo", "12",     "0.5", "\n  ", "\xC3\xA9", "\xE6\x97\xA5\xE6\x9C",
          "\\n", "aaaa", "ab",     "(((", "))"}) {
      tokens.emplace_back(longer);
    }
    return new std::shared_ptr<const TokenTable>(*TokenTable::FromBytes(std::move(tokens)));
  }();
  return *table;
}

int64_t CpuNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

CompileLimits Limits() {
  CompileLimits limits;
  // Small, so that the fuzzer is quick; time is no criterion of its own under sanitizers.
  limits.states_max = 20'000;
  limits.cpu_time_max = absl::Milliseconds(400);
  return limits;
}

absl::StatusOr<std::shared_ptr<const CompiledGrammar>> Compile(char kind, std::string_view source) {
  GrammarBuilder builder(Limits());
  absl::StatusOr<GrammarBuilder::Node> node = GrammarBuilder::Node{};
  switch (kind) {
    case 's':
      node = builder.JsonSchemaText(source, JsonWhitespace::kFlexible);
      break;
    case 'S':
      node = builder.JsonSchemaText(source, JsonWhitespace::kCompact);
      break;
    case 'r':
      node = builder.Regex(source);
      break;
    case 'e':
      node = builder.Ebnf(source);
      break;
    case 't': {
      std::vector<std::string> stops;
      for (const std::string_view stop : fuzz::Split(source, 3)) {
        if (!stop.empty()) stops.emplace_back(stop);
      }
      node = builder.Sequence({builder.TextWithout(stops), builder.Literal("<end>")});
      break;
    }
    default: {
      if (source.size() < 16) return absl::InvalidArgumentError("short");
      std::string bytes(source);
      std::memcpy(bytes.data(), "TPGR\1\0\0\0", 8);
      const uint64_t sum = PayloadChecksum(std::as_bytes(std::span(bytes).subspan(16)));
      std::memcpy(bytes.data() + 8, &sum, sizeof sum);
      return CompiledGrammar::Parse(bytes);
    }
  }
  if (!node.ok()) return node.status();
  return builder.Build(*node);
}

void Walk(const std::shared_ptr<const CompiledGrammar>& grammar, uint64_t seed) {
  static MaskCache cache(size_t{4} << 20);
  Matcher matcher(grammar, Table(), &cache, std::to_string(seed % 4));
  Rng rng(seed);
  std::vector<uint32_t> mask(Table()->mask_words());
  // Ambiguous grammars get slower as they go; there is nothing new to be seen then.
  constexpr uint64_t kNodesMax = 50'000;
  const int64_t end_ns = CpuNs() + 150'000'000;
  for (int step = 0; step < 200 && !matcher.MustEnd(); ++step) {
    if (matcher.stats().trie_nodes > kNodesMax || CpuNs() > end_ns) return;
    const absl::Status status = matcher.FillMask(mask);
    if (absl::IsResourceExhausted(status)) return;
    std::vector<int32_t> allowed;
    for (size_t w = 0; w < mask.size(); ++w) {
      for (uint32_t rest = mask[w]; rest != 0; rest &= rest - 1) {
        allowed.push_back(static_cast<int32_t>(w * 32 + static_cast<size_t>(std::countr_zero(rest))));
      }
    }
    // Each byte is a token: only a grammar that asks for a vocabulary's token by its id (as bytes of a
    // compiled one may) can be stuck.
    if (!status.ok()) {
      TP_CHECK(absl::IsFailedPrecondition(status) && allowed.empty());
      return;
    }
    if (allowed.empty()) {
      TP_CHECK(matcher.CanEnd());
      return;
    }
    for (int probe = 0; probe < 6; ++probe) {
      const auto id = static_cast<int32_t>(rng.Below(static_cast<uint64_t>(Table()->vocab_size())));
      TP_CHECK(matcher.Allows(id) == ((mask[static_cast<size_t>(id) / 32] >> (id % 32) & 1) != 0));
    }
    const absl::Status accepted = matcher.Accept(allowed[rng.Below(allowed.size())]);
    if (absl::IsResourceExhausted(accepted)) return;
    TP_CHECK(accepted.ok());
  }
  TP_CHECK(!matcher.MustEnd() || matcher.CanEnd());
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(structured) {
  if (input.empty()) return;
  const char kind = input[0];
  const std::string_view source = input.substr(1);
  const auto grammar = Compile(kind, source);
  if (!grammar.ok()) {
    TP_CHECK(absl::IsInvalidArgument(grammar.status()) || absl::IsUnimplemented(grammar.status()) ||
             absl::IsResourceExhausted(grammar.status()));
    TP_CHECK(!grammar.status().message().empty());
    return;
  }
  const auto parsed = CompiledGrammar::Parse((*grammar)->bytes());
  TP_CHECK(parsed.ok());
  for (uint64_t seed = 1; seed <= 2; ++seed) Walk(*parsed, seed * 7919 + source.size());
}

}  // namespace tidepool
