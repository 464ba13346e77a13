#include "tools/simulate/workload.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <queue>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/rng.h"
#include "base/status.h"

namespace tidepool {

namespace {

constexpr uint64_t kRequestsMax = 50'000'000;
constexpr uint64_t kIdsMax = uint64_t{1} << 31;

absl::Status OutOfRange(std::string_view field, double value, std::string_view range) {
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(field), " is ", value, "; it must be ", std::string(range)));
}

}  // namespace

BlockKey SimBlockKey(uint64_t id) {
  BlockKey key;
  const uint64_t mixed = Mix64(id);
  std::memcpy(key.bytes.data(), &mixed, sizeof mixed);
  std::memcpy(key.bytes.data() + sizeof mixed, &id, sizeof id);
  return key;
}

void Workload::Keys(const SimRequest& request, uint32_t tokens, uint32_t block_tokens,
                    std::vector<BlockKey>& out) const {
  out.clear();
  const uint64_t each = stretch_tokens / block_tokens;
  const uint64_t n = std::min<uint64_t>(tokens / block_tokens, request.count * each);
  out.reserve(n);
  for (uint64_t i = 0; i < n; ++i)
    out.push_back(SimBlockKey(ids[request.first + i / each] * each + i % each));
}

absl::StatusOr<Workload> FromTrace(const Trace& trace, std::string name, const TraceOptions& options) {
  if (!(options.speed > 0) || !std::isfinite(options.speed))
    return OutOfRange("speed", options.speed, "above 0");
  if (!(options.length_scale > 0) || options.length_scale > 1000)
    return OutOfRange("length-scale", options.length_scale, "above 0 and at most 1000");
  Workload w;
  w.name = std::move(name);
  w.format = trace.format;
  w.left_out = trace.left_out;
  const double stretch = 512 * options.length_scale;
  w.stretch_tokens = static_cast<uint32_t>(std::max(1.0, std::round(stretch)));
  const auto scaled = [&](uint32_t tokens) {
    return static_cast<uint32_t>(std::max(1.0, std::round(tokens * options.length_scale)));
  };
  absl::flat_hash_map<uint64_t, uint32_t> dense;
  uint32_t next = 0;
  for (const TraceEntry& entry : trace.entries) {
    if (options.requests > 0 && w.requests.size() >= options.requests) break;
    SimRequest r;
    r.at = static_cast<SimTime>(std::llround(absl::ToDoubleNanoseconds(entry.at) / options.speed));
    r.prompt_tokens = scaled(entry.input_tokens);
    r.output_tokens = scaled(entry.output_tokens);
    r.first = w.ids.size();
    for (const uint64_t id : entry.blocks) {
      const auto [it, fresh] = dense.try_emplace(id, next);
      if (fresh) ++next;
      w.ids.push_back(it->second);
    }
    if (entry.blocks.empty()) {
      for (uint32_t t = 0; t < r.prompt_tokens / w.stretch_tokens; ++t) w.ids.push_back(next++);
    }
    if (w.ids.size() > kIdsMax) return absl::ResourceExhaustedError("the trace has too many blocks");
    r.count = static_cast<uint32_t>(w.ids.size() - r.first);
    w.requests.push_back(r);
  }
  if (w.requests.empty()) return absl::InvalidArgumentError(w.name + ": holds no request");
  return w;
}

absl::StatusOr<Workload> MakeSynthetic(const SyntheticOptions& o, uint64_t seed) {
  if (!(o.rate > 0) || !std::isfinite(o.rate)) return OutOfRange("rate", o.rate, "above 0");
  if (o.requests == 0 || o.requests > kRequestsMax)
    return OutOfRange("requests", static_cast<double>(o.requests), "from 1 to 50 million");
  if (!(o.burst > 0) || o.burst > 100) return OutOfRange("burst", o.burst, "above 0 and at most 100");
  if (o.think_seconds < 0) return OutOfRange("think", o.think_seconds, "0 or more seconds");
  if (o.interactive_share < 0 || o.batch_share < 0 || o.interactive_share + o.batch_share > 1)
    return OutOfRange("interactive-share + batch-share", o.interactive_share + o.batch_share,
                      "at most 1, both at least 0");
  if (o.tenants.empty()) return absl::InvalidArgumentError("tenants is empty; name at least one");

  Workload w;
  w.name = "synthetic";
  w.format = "synthetic";
  w.stretch_tokens = o.stretch_tokens;
  w.tenants.clear();
  double weights = 0;
  for (const TenantShare& t : o.tenants) {
    w.tenants.push_back(t.name);
    weights += t.weight;
  }
  Rng rng(seed ^ 0x51b0);
  std::vector<uint32_t> system_tokens;
  std::vector<std::vector<uint32_t>> system_ids(o.tenants.size());
  uint32_t next = 0;
  const auto extend = [&](std::vector<uint32_t>& chain, uint64_t tokens) {
    while (chain.size() < tokens / o.stretch_tokens) chain.push_back(next++);
  };
  for (size_t t = 0; t < o.tenants.size(); ++t) {
    system_tokens.push_back(o.system.Draw(rng));
    extend(system_ids[t], system_tokens[t]);
  }
  double mean_turns = 0;
  for (int i = 0; i < 4096; ++i) mean_turns += o.turns.Draw(rng) / 4096.0;
  const double gap = mean_turns / o.rate;
  const double shape = 1 / (o.burst * o.burst);
  // Sessions begin before the first request that counts, so that the mix of turns is steady from then on.
  const double warm_up = 3 * mean_turns * (o.answer_seconds + o.think_seconds);
  double at = mean_turns > 1 ? -warm_up : 0;
  // Those that lie behind the latest session's start: none can come between them any more.
  uint64_t certain = 0;
  std::priority_queue<double, std::vector<double>, std::greater<>> times;
  while (certain < o.requests) {
    at += gap * DrawGamma(rng, shape) / shape;
    while (!times.empty() && times.top() <= at) {
      times.pop();
      ++certain;
    }
    double pick = rng.Uniform() * weights;
    uint32_t tenant = 0;
    while (tenant + 1 < o.tenants.size() && pick >= o.tenants[tenant].weight)
      pick -= o.tenants[tenant++].weight;
    const double cls = rng.Uniform();
    const SloClass slo_class = cls < o.interactive_share                   ? SloClass::kInteractive
                               : cls < o.interactive_share + o.batch_share ? SloClass::kBatch
                                                                           : SloClass::kStandard;
    // One chain for the whole session: a turn's prompt is a head of it, its answer follows.
    std::vector<uint32_t> chain = system_ids[tenant];
    uint64_t tokens = system_tokens[tenant];
    double when = at;
    const uint64_t first = w.ids.size();
    bool first_turn = true;
    for (uint32_t turns = o.turns.Draw(rng); turns > 0; --turns) {
      tokens += o.input.Draw(rng);
      const uint32_t output = o.output.Draw(rng);
      if (o.prompt_max > 0 && tokens > o.prompt_max && !first_turn) break;
      first_turn = false;
      SimRequest r;
      r.at = FromSeconds(when);
      r.prompt_tokens =
          static_cast<uint32_t>(o.prompt_max > 0 ? std::min<uint64_t>(tokens, o.prompt_max) : tokens);
      tokens = r.prompt_tokens;
      r.output_tokens = output;
      r.tenant = tenant;
      r.slo_class = slo_class;
      r.first = first;
      tokens += output;
      extend(chain, tokens);
      r.count = static_cast<uint32_t>(chain.size());
      if (when >= 0) {
        w.requests.push_back(r);
        times.push(when);
      }
      when += o.answer_seconds + o.think_seconds * DrawExponential(rng);
    }
    w.ids.insert(w.ids.end(), chain.begin(), chain.end());
    if (w.ids.size() > kIdsMax)
      return absl::ResourceExhaustedError("the mix has too many blocks; lower requests or lengths");
  }
  std::stable_sort(w.requests.begin(), w.requests.end(),
                   [](const SimRequest& a, const SimRequest& b) { return a.at < b.at; });
  w.requests.resize(o.requests);
  return w;
}

absl::StatusOr<std::vector<TenantShare>> ParseTenantShares(std::string_view text) {
  std::vector<TenantShare> out;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const std::pair<std::string, std::string> pair = absl::StrSplit(part, absl::MaxSplits(':', 1));
    TenantShare share{pair.first, 1};
    if (share.name.empty()) return absl::InvalidArgumentError("tenants: a name is empty; write a:3,b:1");
    if (!pair.second.empty() &&
        (!absl::SimpleAtod(pair.second, &share.weight) || !(share.weight > 0) || share.weight > 1e9)) {
      return absl::InvalidArgumentError(absl::StrCat("tenants: the weight of ", share.name, " is '",
                                                     pair.second, "'; it must be a number above 0"));
    }
    out.push_back(std::move(share));
  }
  return out;
}

}  // namespace tidepool
