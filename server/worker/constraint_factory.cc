#include "server/worker/constraint_factory.h"

#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"
#include "server/structured/grammar_cache.h"
#include "server/structured/mask_cache.h"
#include "server/structured/matcher.h"
#include "server/structured/token_table.h"

namespace tidepool {
namespace {

class GrammarConstraint final : public TokenConstraint {
 public:
  // `keep`: what the matcher borrows.
  GrammarConstraint(Matcher matcher, std::shared_ptr<const void> keep)
      : keep_(std::move(keep)), matcher_(std::move(matcher)) {}

  absl::Status FillMask(std::span<uint32_t> bits) override { return matcher_.FillMask(bits); }
  absl::Status Accept(int32_t token) override { return matcher_.Accept(token); }
  bool CanEnd() const override { return matcher_.CanEnd(); }
  bool MustEnd() const override { return matcher_.MustEnd(); }

 private:
  const std::shared_ptr<const void> keep_;
  Matcher matcher_;
};

// The metrics of one cache: what rose since it was last shown is added.
class CacheProbe {
 public:
  CacheProbe(MetricRegistry& metrics, const char* cache)
      : hits_(Events(metrics, cache, "hit")),
        misses_(Events(metrics, cache, "miss")),
        evictions_(Events(metrics, cache, "eviction")),
        bytes_(metrics.AddGauge("tidepool_worker_structured_cache_bytes",
                                "Memory of the caches for structured answers.", {{"cache", cache}})) {}

  template <typename Stats>
  void Show(const Stats& stats) {
    std::lock_guard lock(mu_);
    hits_.Add(stats.hits - hits_.value());
    misses_.Add(stats.misses - misses_.value());
    evictions_.Add(stats.evictions - evictions_.value());
    bytes_.Set(static_cast<double>(stats.bytes));
  }

 private:
  static Counter& Events(MetricRegistry& metrics, const char* cache, const char* event) {
    return metrics.AddCounter("tidepool_worker_structured_cache_events_total",
                              "Look-ups in, and removals from, the caches for structured answers.",
                              {{"cache", cache}, {"event", event}});
  }

  std::mutex mu_;
  Counter& hits_;
  Counter& misses_;
  Counter& evictions_;
  Gauge& bytes_;
};

}  // namespace

struct ConstraintFactory::State {
  explicit State(absl::StatusOr<std::shared_ptr<const TokenTable>> t) : table(std::move(t)) {}

  const absl::StatusOr<std::shared_ptr<const TokenTable>> table;
  GrammarCache grammars{kGrammarCacheBytesMax};
  MaskCache masks{kMaskCacheBytesMax};
};

ConstraintFactory::ConstraintFactory(const Tokenizer& tokenizer, uint32_t vocab_size, MetricRegistry& metrics)
    : state_(std::make_shared<State>(TokenTable::Build(tokenizer, static_cast<int32_t>(vocab_size)))) {
  if (!state_->table.ok()) {
    spdlog::warn("structured answers are refused: {}", std::string(state_->table.status().message()));
  }
  auto grammars = std::make_shared<CacheProbe>(metrics, "grammar");
  auto masks = std::make_shared<CacheProbe>(metrics, "mask");
  metrics.AddCollector([state = state_, grammars, masks] {
    grammars->Show(state->grammars.stats());
    masks->Show(state->masks.stats());
  });
}

ConstraintFactory::~ConstraintFactory() = default;

absl::StatusOr<std::unique_ptr<TokenConstraint>> ConstraintFactory::Make(std::string_view grammar,
                                                                         std::string_view salt) {
  if (!state_->table.ok()) {
    return absl::FailedPreconditionError(absl::StrCat("this worker cannot hold answers to a grammar: ",
                                                      std::string(state_->table.status().message())));
  }
  if (grammar.size() > kGrammarBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.grammar has ", grammar.size(),
                                                   " bytes; at most ", kGrammarBytesMax, " are taken"));
  }
  auto parsed = state_->grammars.FindOrMake(GrammarCache::Key(salt, grammar),
                                            [&] { return CompiledGrammar::Parse(grammar); });
  if (!parsed.ok()) return Annotate(parsed.status(), "sampling.grammar");
  Matcher matcher(*std::move(parsed), *state_->table, &state_->masks, salt);
  // The grammar's fault, not this worker's load.
  if (absl::Status s = matcher.status(); !s.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("sampling.grammar: ", std::string(s.message())));
  }
  return std::make_unique<GrammarConstraint>(std::move(matcher), state_);
}

}  // namespace tidepool
