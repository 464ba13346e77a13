#include "scheduler/elasticity.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>

namespace tidepool {

namespace {

constexpr std::string_view kModeNames[] = {"off", "advise", "act"};
// What is refused may be counted as so many times what is served, at most.
constexpr double kServedShareMin = 0.1;
// Of the ITL objective, beside what a step takes by itself.
constexpr double kRoomMin = 0.1;
// A change back within so many times the wait for it says that the load swings.
constexpr double kReversalWaits = 4;
constexpr uint32_t kDoublingsMax = 5;

Role EffectiveRole(const ElasticityLoad::Worker& w) { return w.next_role.value_or(w.role); }

std::string_view Other(Role kind) { return kind == Role::kPrefill ? "decode" : "prefill"; }

std::string Percent(double pressure) {
  char buf[32];
  std::snprintf(buf, sizeof buf, "%.0f%%", std::min(pressure, 99.99) * 100);
  return buf;
}

}  // namespace

std::string_view ElasticityModeName(ElasticityMode mode) { return kModeNames[static_cast<size_t>(mode)]; }

std::optional<ElasticityMode> ParseElasticityMode(std::string_view name) {
  for (size_t i = 0; i < kElasticityModes; ++i) {
    if (kModeNames[i] == name) return static_cast<ElasticityMode>(i);
  }
  return std::nullopt;
}

void ElasticityCore::Observe(const ElasticityLoad& load, uint32_t decode, absl::Time now) {
  const double n_decode = std::max(decode, 1u);
  const bool first = !ticked_at_;
  const double seconds = first ? 0 : absl::ToDoubleSeconds(now - *ticked_at_);
  ticked_at_ = now;
  // The share of the new value after `seconds`.
  const double tau = std::max(absl::ToDoubleSeconds(options_.dwell) / 2, 1e-3);
  const double gain = first ? 1 : 1 - std::exp(-seconds / tau);
  const auto move = [&](double& value, double to) { value += gain * (to - value); };

  const double ttft = load.slo_ttft_seconds > 0 ? load.slo_ttft_seconds : options_.queue_seconds;
  const double backlog = load.prefill_queue_seconds / ttft;
  const double arrived = load.decisions.prefill_seconds - counts_.prefill_seconds;
  // A burst that is shorter than the TTFT objective is what queues are for.
  const double slower = first ? 1 : 1 - std::exp(-seconds / std::max(tau, ttft));
  const double refused = load.decisions.refused_prefill_seconds - counts_.refused_prefill_seconds;
  const auto arrive = [&](double& value, double come) {
    const double rate = seconds > 0 ? std::max(come, 0.0) / seconds : 0;
    value += slower * (rate - value);
  };
  arrive(demand_.arriving, arrived);
  arrive(demand_.refused, refused);
  move(demand_.backlog, backlog);
  move(demand_.decode_extra, std::max(0.0, load.decode_step_seconds - load.decode_floor_seconds));
  if (decode > 0) move(demand_.decode_floor, load.decode_floor_seconds / n_decode);
  move(demand_.memory, load.decode_memory);

  const auto since = [](uint64_t is, uint64_t was) { return static_cast<double>(is - std::min(is, was)); };
  const double placed = first ? 0 : since(load.decisions.placed, counts_.placed);
  const double no_prefill = first ? 0 : since(load.decisions.refused_prefill, counts_.refused_prefill);
  const double no_decode = first ? 0 : since(load.decisions.refused_decode, counts_.refused_decode);
  counts_ = load.decisions;
  const double all = placed + no_prefill + no_decode;
  if (all > 0) {
    move(demand_.served_share, placed / all);
    move(demand_.refused_prefill, no_prefill / all);
    move(demand_.refused_decode, no_decode / all);
  } else {
    move(demand_.served_share, 1);
    move(demand_.refused_prefill, 0);
    move(demand_.refused_decode, 0);
  }

  const double offered = 1 / std::max(demand_.served_share, kServedShareMin);
  // Whoever is refused asks again, and nobody knows that it is the same one.
  const double again = std::min(demand_.refused, demand_.arriving * (1 / kServedShareMin - 1));
  asked_ = {demand_.arriving + again + demand_.backlog, demand_.decode_extra * offered,
            demand_.memory * offered};
  const double forget = std::exp(-seconds / (tau * 2 * std::max(options_.back, 1.0)));
  const auto hold = [&](double& peak, double value) {
    peak = std::max(value, value + forget * (peak - value));
  };
  hold(peak_.prefill, asked_.prefill);
  hold(peak_.decode_extra, asked_.decode_extra);
  hold(peak_.memory, asked_.memory);
}

double ElasticityCore::PrefillPressure(const Asked& asked, uint32_t workers, uint32_t now) const {
  double demand = asked.prefill;
  if (demand_.refused_prefill > options_.refused_share) demand = std::max<double>(demand, now);
  return demand / std::max(workers, 1u);
}

double ElasticityCore::DecodePressure(const Asked& asked, uint32_t workers, uint32_t now,
                                      double slo_itl) const {
  const double n = std::max(workers, 1u);
  double pressure = asked.memory / n;
  if (slo_itl > 0) {
    // Where hardly a single sequence keeps the objective, no number of workers makes room for many.
    const double room = std::max(slo_itl - demand_.decode_floor, kRoomMin * slo_itl);
    pressure = std::max(pressure, asked.decode_extra / n / room);
  }
  if (demand_.refused_decode > options_.refused_share) pressure = std::max(pressure, now / n);
  return pressure;
}

absl::Duration ElasticityCore::BackAfter() const {
  return options_.back * options_.dwell * (1u << std::min(reversals_, kDoublingsMax));
}

bool ElasticityCore::NoteChanges(const ElasticityLoad& load, absl::Time now) {
  bool changing = false;
  std::map<std::string, Role> roles;
  for (const ElasticityLoad::Worker& w : load.workers) {
    const Role role = EffectiveRole(w);
    const auto before = roles_.find(w.id);
    const bool changed = before != roles_.end() && before->second != role;
    if (changed || w.next_role) {
      if (changed && changed_to_ != Role::kBoth && role != Role::kBoth && role != changed_to_)
        reversals_ = now - changed_at_ < kReversalWaits * BackAfter() ? reversals_ + 1 : 0;
      changed_at_ = now;
      if (role != Role::kBoth) changed_to_ = role;
      if (w.id == ordered_ && role == advised_) ordered_.clear();
    }
    changing = changing || w.next_role;
    roles.emplace(w.id, role);
  }
  roles_ = std::move(roles);
  if (!ordered_.empty() && (now - ordered_at_ > options_.confirm || !roles_.contains(ordered_)))
    ordered_.clear();
  return changing || !ordered_.empty();
}

void ElasticityCore::Track(double pressure, const ElasticityOptions& options, absl::Time now,
                           std::optional<absl::Time>& since) {
  if (pressure < options.low) since.reset();
  if (pressure > options.high && !since) since = now;
}

const ElasticityLoad::Worker* ElasticityCore::Choose(const ElasticityLoad& load, Role kind,
                                                     absl::Time now) const {
  const ElasticityLoad::Worker* best = nullptr;
  for (const ElasticityLoad::Worker& w : load.workers) {
    if (!w.ready || w.next_role || w.role != kind) continue;
    if (const auto it = left_alone_.find(w.id); it != left_alone_.end() && now < it->second) continue;
    if (best == nullptr || std::tie(w.work, w.id) < std::tie(best->work, best->id)) best = &w;
  }
  return best;
}

void ElasticityCore::OnOrdered(const std::string& worker, bool taken, absl::Time now) {
  std::erase_if(left_alone_, [&](const auto& entry) { return entry.second <= now; });
  if (taken) {
    ordered_ = worker;
    ordered_at_ = now;
  } else {
    left_alone_[worker] = now + options_.back * options_.dwell;
  }
}

void ElasticityCore::Repair(const ElasticityLoad& load, absl::Time now, ElasticityAdvice& out) {
  out.wanted_prefill = out.prefill - 1;
  out.wanted_decode = 1;
  out.reason = "No worker decodes";
  if (!ordered_.empty()) {
    out.reason += "; " + ordered_ + " was told to change.";
    return;
  }
  // Those that have never been here may be about to start.
  const absl::Time due = seen_decode_ ? now : *no_decode_since_ + BackAfter();
  if (now < due) {
    out.reason += ": if none comes, a prefill worker should become a decode worker in " +
                  absl::FormatDuration(absl::Ceil(due - now, absl::Seconds(1))) + ".";
    return;
  }
  const ElasticityLoad::Worker* worker = nullptr;
  for (const ElasticityLoad::Worker& w : load.workers) {
    if (w.role != Role::kDecode || !w.next_role) continue;
    if (const auto it = left_alone_.find(w.id); it != left_alone_.end() && now < it->second) continue;
    worker = &w;
    break;
  }
  const bool back = worker != nullptr;
  if (!back) worker = Choose(load, Role::kPrefill, now);
  if (worker == nullptr) {
    out.reason += ", and no worker would change now.";
    return;
  }
  out.worker = worker->id;
  out.role = advised_ = Role::kDecode;
  out.reason +=
      ": " + worker->id + (back ? " should stay a decode worker." : " should become a decode worker.");
}

ElasticityAdvice ElasticityCore::Tick(const ElasticityLoad& load, absl::Time now) {
  ElasticityAdvice out;
  uint32_t ready_decode = 0, ready_both = 0;
  for (const ElasticityLoad::Worker& w : load.workers) {
    if (!w.ready && !w.next_role) continue;
    const Role role = EffectiveRole(w);
    out.prefill += role == Role::kPrefill ? 1 : 0;
    out.decode += role == Role::kDecode ? 1 : 0;
    ready_decode += w.ready && role == Role::kDecode ? 1 : 0;
    ready_both += w.ready && role == Role::kBoth ? 1 : 0;
    seen_decode_ = seen_decode_ || w.role == Role::kDecode;
  }
  if (out.decode > 0 || ready_both > 0 || out.prefill == 0) {
    no_decode_since_.reset();
  } else if (!no_decode_since_) {
    no_decode_since_ = now;
  }
  const bool changing = NoteChanges(load, now);
  Observe(load, ready_decode, now);
  const uint32_t n = out.prefill + out.decode;
  out.wanted_prefill = out.prefill;
  out.wanted_decode = out.decode;
  if (out.prefill == 0 || out.decode == 0) {
    prefill_short_since_.reset();
    decode_short_since_.reset();
    if (no_decode_since_ && out.prefill >= 2) {
      Repair(load, now, out);
      return out;
    }
    out.reason = n == 0 ? "There are no workers of one kind only, whose number could be weighed."
                        : "All workers of one kind only are of the same kind; there is nothing to weigh.";
    return out;
  }
  const double itl = load.slo_itl_seconds;
  const auto prefill = [&](uint32_t p) { return PrefillPressure(asked_, p, out.prefill); };
  const auto decode = [&](uint32_t d) { return DecodePressure(asked_, d, out.decode, itl); };
  out.prefill_pressure = prefill(out.prefill);
  out.decode_pressure = decode(out.decode);
  // The nearest of those that are as good: what is there is as good as what is not.
  double least = std::max(out.prefill_pressure, out.decode_pressure);
  for (uint32_t p = 1; p < n; ++p) {
    const double worse = std::max(prefill(p), decode(n - p));
    const auto away = [&](uint32_t q) { return q > out.prefill ? q - out.prefill : out.prefill - q; };
    constexpr double kSame = 1e-9;
    if (worse > least + kSame) continue;
    if (worse > least - kSame && away(p) >= away(out.wanted_prefill)) continue;
    least = worse;
    out.wanted_prefill = p;
  }
  out.wanted_decode = n - out.wanted_prefill;
  Track(out.prefill_pressure, options_, now, prefill_short_since_);
  Track(out.decode_pressure, options_, now, decode_short_since_);

  const std::string state = "Prefill is asked for " + Percent(out.prefill_pressure) +
                            " of what its workers can do within the objectives, decode for " +
                            Percent(out.decode_pressure);
  const std::optional<absl::Time>&since_p = prefill_short_since_, &since_d = decode_short_since_;
  if (!since_p && !since_d) {
    out.reason = state + ": neither is short.";
    return out;
  }
  const bool both = since_p && since_d;
  const bool to_prefill = both ? out.prefill_pressure > out.decode_pressure : since_p.has_value();
  const Role wanted = to_prefill ? Role::kPrefill : Role::kDecode;
  const std::string name(RoleName(wanted)), other(Other(wanted));
  const auto wait = [&](absl::Duration left) {
    return " in " + absl::FormatDuration(absl::Ceil(left, absl::Seconds(1)));
  };
  if (changing) {
    out.reason = state + "; a worker is changing already, and one does at a time.";
    return out;
  }
  const uint32_t givers = to_prefill ? out.decode : out.prefill;
  if (givers < 2) {
    out.reason = state + ": " + name + " is short, but the last " + other + " worker stays.";
    return out;
  }
  const double left = to_prefill ? decode(givers - 1) : prefill(givers - 1);
  // It would not get one back at once: what was asked of it of late it must be able to do without.
  const double peak = to_prefill ? DecodePressure(peak_, givers - 1, givers, itl)
                                 : PrefillPressure(peak_, givers - 1, givers);
  const double taker = to_prefill ? out.prefill_pressure : out.decode_pressure;
  const bool spare = !both && left <= options_.spare && peak <= options_.high;
  if (!spare && left * options_.far > taker) {
    out.reason = both ? state + ": both are short, which more workers would mend."
                      : state + ": " + name + " is short, but with one worker less " + other +
                            " would be at " + Percent(left) + ", and of late at up to " + Percent(peak) + ".";
    return out;
  }
  absl::Time due = (to_prefill ? *since_p : *since_d) + options_.dwell;
  if (changed_to_ != Role::kBoth)
    due =
        std::max(due, changed_at_ + (changed_to_ == wanted ? options_.again * options_.dwell : BackAfter()));
  if (now < due) {
    out.reason = state + ": if it stays so, a " + other + " worker should become a " + name + " worker" +
                 wait(due - now) + ".";
    return out;
  }
  const ElasticityLoad::Worker* worker = Choose(load, to_prefill ? Role::kDecode : Role::kPrefill, now);
  if (worker == nullptr) {
    out.reason = state + ": " + name + " is short, but no " + other + " worker would change now.";
    return out;
  }
  out.worker = worker->id;
  out.role = advised_ = wanted;
  out.reason = state + ": " + worker->id + " should become a " + name + " worker.";
  return out;
}

}  // namespace tidepool
