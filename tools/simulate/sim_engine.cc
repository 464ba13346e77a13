#include "tools/simulate/sim_engine.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "base/status.h"
#include "server/bench/random.h"

namespace tidepool {

namespace {
absl::Time At(SimTime t) { return absl::UnixEpoch() + absl::Nanoseconds(t); }

// A group's gaps grow evenly: so many values stand for them.
constexpr uint64_t kGapParts = 4;
}  // namespace

SimEngine::SimEngine(const WorkerProfile& profile, uint64_t seed, WeightedHistogram* gaps,
                     FairQueue::Order order)
    : profile_(profile),
      core_({.max_batch = profile.max_batch, .max_step_tokens = profile.max_step_tokens, .order = order}),
      rng_(seed),
      gaps_(gaps) {}

void SimEngine::AddPrefill(uint64_t id, uint32_t cached, uint32_t fresh, const Owner& owner, SimTime now) {
  NoteTenant(owner.tenant, now);
  sequences_[id] = {.cached = cached, .fresh = fresh, .batch_class = owner.batch_class};
  if (owner.batch_class) ++batch_;
  core_.Add({.id = id,
             .context = cached,
             .pending = fresh,
             .tenant = owner.tenant,
             .priority = owner.priority,
             .batch_class = owner.batch_class},
            At(now));
}

void SimEngine::AddDecode(uint64_t id, uint32_t context, uint32_t tokens, const Owner& owner,
                          SimTime last_token) {
  NoteTenant(owner.tenant, last_token);
  Sequence s;
  s.batch_class = owner.batch_class;
  s.begun = true;
  s.prefilling = false;
  s.left = tokens;
  s.context = context;
  s.last_token = last_token;
  sequences_[id] = s;
  if (owner.batch_class) ++batch_;
  core_.Add({.id = id,
             .context = context,
             .prefilled = true,
             .tenant = owner.tenant,
             .priority = owner.priority,
             .batch_class = owner.batch_class},
            At(last_token));
}

void SimEngine::Decode(uint64_t id, uint32_t tokens, SimTime now) {
  Sequence& s = sequences_.at(id);
  TP_CHECK(!s.prefilling && !s.active && tokens > 0);
  s.left = tokens;
  s.context = uint64_t{s.cached} + s.fresh;
  s.last_token = now;
  core_.Continue(id);
  Activate(id, s);
}

void SimEngine::Remove(uint64_t id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  Sequence& s = it->second;
  if (s.active) Deactivate(id, s);
  if (s.begun && s.prefilling) --prefilling_;
  if (s.batch_class) --batch_;
  core_.Remove(id);
  sequences_.erase(it);
}

void SimEngine::Activate(uint64_t id, Sequence& s) {
  s.active = true;
  s.finish_at = steps_ + s.left;
  s.told_at = steps_;
  s.context_base = static_cast<int64_t>(s.context) - static_cast<int64_t>(steps_);
  ++active_;
  context_ += s.context;
  finishing_.emplace_back(s.finish_at, id);
  std::push_heap(finishing_.begin(), finishing_.end(), std::greater<>());
}

void SimEngine::Deactivate(uint64_t id, Sequence& s) {
  TellOutputs(id, s, steps_);
  s.active = false;
  s.left = static_cast<uint32_t>(s.finish_at - steps_);
  s.context = static_cast<uint64_t>(s.context_base + static_cast<int64_t>(steps_));
  --active_;
  context_ -= s.context;
}

void SimEngine::TellOutputs(uint64_t id, Sequence& s, uint64_t steps) {
  if (s.told_at >= steps) return;
  core_.CountOutput(id, static_cast<uint32_t>(steps - s.told_at));
  s.told_at = steps;
}

void SimEngine::TellAll(SimTime now) {
  if (!several_tenants_) return;
  const uint64_t steps = steps_ + (group_ && end_ != kIdle ? GroupStepsBy(now) : 0);
  for (auto& [id, s] : sequences_) {
    if (s.active) TellOutputs(id, s, steps);
  }
}

void SimEngine::NoteTenant(std::string_view tenant, SimTime now) {
  if (tenant_.empty()) tenant_ = tenant;
  several_tenants_ = several_tenants_ || tenant != tenant_;
  TellAll(now);  // a tenant that comes back is lifted to what the others were given
}

double SimEngine::Jitter() { return profile_.jitter > 0 ? std::exp(profile_.jitter * DrawNormal(rng_)) : 1; }

// Whether the next step could hold anything but one token of each sequence that decodes.
bool SimEngine::NeedsStep() const {
  if (prefilling_ > 0) return true;
  if (core_.waiting() == 0) return false;
  const bool place = core_.running() < profile_.max_batch;
  const bool online_waits = core_.waiting() > core_.waiting_batch_class();
  return place || (online_waits && batch_ > core_.waiting_batch_class());
}

void SimEngine::Kick(SimTime now, std::vector<uint64_t>& begun) {
  if (end_ != kIdle) {
    if (group_ && NeedsStep()) CutGroup(now);
    return;
  }
  if (NeedsStep()) BeginStep(now, begun);
  if (end_ == kIdle && active_ > 0) BeginGroup(now);
}

void SimEngine::BeginStep(SimTime now, std::vector<uint64_t>& begun) {
  if (core_.waiting() > 0) TellAll(now);
  plan_ = core_.Step(At(now));
  if (plan_.empty()) return;
  uint64_t fresh = 0, decodes = 0, joining_context = 0;
  uint32_t active = 0;
  double pairs = 0;
  for (const PlanItem& item : plan_) {
    Sequence& s = sequences_.at(item.id);
    if (item.decode) {
      ++decodes;
      if (s.active) {
        ++active;
      } else {
        joining_context += s.context;
      }
      continue;
    }
    if (!s.begun) {
      s.begun = true;
      ++prefilling_;
      begun.push_back(item.id);
    }
    fresh += item.tokens;
    pairs += static_cast<double>(item.tokens) *
             (static_cast<double>(s.cached) + s.computed + static_cast<double>(item.tokens) / 2);
  }
  if (active < active_) SuspendMissing();
  const double work = profile_.token_seconds * static_cast<double>(fresh) +
                      profile_.sequence_seconds * static_cast<double>(decodes);
  step_seconds_ = Jitter() * (profile_.overhead_seconds + std::max(profile_.weights_seconds, work) +
                              profile_.pair_seconds * pairs +
                              profile_.context_seconds * static_cast<double>(context_ + joining_context));
  group_ = false;
  began_ = now;
  end_ = now + std::max<SimTime>(1, FromSeconds(step_seconds_));
}

void SimEngine::SuspendMissing() {
  std::vector<uint64_t> planned;
  for (const PlanItem& item : plan_) planned.push_back(item.id);
  std::sort(planned.begin(), planned.end());
  for (const auto& [finish_at, id] : finishing_) {
    const auto it = sequences_.find(id);
    if (it == sequences_.end() || !it->second.active || it->second.finish_at != finish_at) continue;
    if (!std::binary_search(planned.begin(), planned.end(), id)) {
      Deactivate(id, it->second);
      it->second.last_token = began_;
    }
  }
}

void SimEngine::BeginGroup(SimTime now) {
  // Stale entries go before the next finish is looked at.
  while (!finishing_.empty()) {
    const auto it = sequences_.find(finishing_.front().second);
    if (it != sequences_.end() && it->second.active && it->second.finish_at == finishing_.front().first)
      break;
    std::pop_heap(finishing_.begin(), finishing_.end(), std::greater<>());
    finishing_.pop_back();
  }
  TP_CHECK(!finishing_.empty() && finishing_.front().first > steps_);
  group_ = true;
  group_steps_ = finishing_.front().first - steps_;
  group_active_ = active_;
  const double jitter = Jitter();
  group_first_ = jitter * profile_.DecodeStepSeconds(active_, context_);
  group_growth_ = jitter * profile_.context_seconds * active_;
  began_ = now;
  end_ = now + std::max<SimTime>(1, FromSeconds(GroupSeconds(group_steps_)));
}

double SimEngine::GroupSeconds(uint64_t steps) const {
  const auto k = static_cast<double>(steps);
  return k * group_first_ + group_growth_ * k * (k - 1) / 2;
}

uint64_t SimEngine::GroupStepsBy(SimTime now) const {
  const double elapsed = ToSeconds(now - began_);
  // growth/2 * k^2 + (first - growth/2) * k = elapsed
  const double a = group_growth_ / 2, b = group_first_ - a;
  const double k = a > 0 ? (-b + std::sqrt(b * b + 4 * a * elapsed)) / (2 * a) : elapsed / group_first_;
  return std::min(group_steps_, static_cast<uint64_t>(std::max(0.0, k + 1e-9)));
}

void SimEngine::CutGroup(SimTime now) {
  const uint64_t steps = GroupStepsBy(now) + 1;  // the one at hand ends first
  if (steps >= group_steps_) return;
  group_steps_ = steps;
  end_ = std::max(now, began_ + FromSeconds(GroupSeconds(steps)));
}

void SimEngine::End(Outcome& out) {
  TP_CHECK(end_ != kIdle);
  began_ = std::exchange(end_, kIdle);  // when the tokens of this step came
  group_ ? EndGroup(out) : EndStep(out);
}

void SimEngine::EndGroup(Outcome& out) {
  steps_ += group_steps_;
  context_ += uint64_t{active_} * group_steps_;
  last_decode_ = {.batch = group_active_,
                  .context_tokens = context_,
                  .seconds = group_first_ + group_growth_ * static_cast<double>(group_steps_ - 1)};
  const uint64_t parts = std::min(group_steps_, kGapParts);
  for (uint64_t p = 0; p < parts; ++p) {
    const uint64_t begin = group_steps_ * p / parts, end = group_steps_ * (p + 1) / parts;
    const double middle = (static_cast<double>(begin) + static_cast<double>(end) - 1) / 2;
    gaps_->Add(group_first_ + group_growth_ * middle,
               static_cast<double>(end - begin) * static_cast<double>(group_active_));
  }
  while (!finishing_.empty() && finishing_.front().first <= steps_) {
    const auto [finish_at, id] = finishing_.front();
    std::pop_heap(finishing_.begin(), finishing_.end(), std::greater<>());
    finishing_.pop_back();
    const auto it = sequences_.find(id);
    if (it == sequences_.end() || !it->second.active || it->second.finish_at != finish_at) continue;
    out.finished.push_back(id);
    Remove(id);
  }
}

void SimEngine::EndStep(Outcome& out) {
  uint64_t tokens = 0;
  for (const PlanItem& item : plan_) tokens += item.tokens;
  last_decode_ = {};
  ++steps_;
  context_ += active_;
  uint32_t gaps = 0;
  for (const PlanItem& item : plan_) {
    const auto it = sequences_.find(item.id);
    if (it == sequences_.end()) continue;
    Sequence& s = it->second;
    if (!item.decode) {
      s.computed += item.tokens;
      s.compute_seconds += step_seconds_ * item.tokens / static_cast<double>(tokens);
      if (!item.last) continue;
      s.prefilling = false;
      --prefilling_;
      out.prefilled.push_back(
          {item.id, {.new_tokens = s.fresh, .cached_tokens = s.cached, .seconds = s.compute_seconds}});
      continue;
    }
    if (s.active) {
      ++gaps;
      if (s.finish_at > steps_) {
        ++s.told_at;
        core_.Continue(item.id);
        continue;
      }
    } else {
      gaps_->Add(ToSeconds(began_ - s.last_token));
      ++s.context;
      if (--s.left > 0) {
        core_.Continue(item.id);
        Activate(item.id, s);
        continue;
      }
    }
    out.finished.push_back(item.id);
    Remove(item.id);
  }
  gaps_->Add(step_seconds_, gaps);
}

uint32_t SimEngine::TokensLeft(uint64_t id, SimTime now) const {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return 0;
  const Sequence& s = it->second;
  if (!s.active) return s.left;
  const uint64_t steps = steps_ + (group_ && end_ != kIdle ? GroupStepsBy(now) : 0);
  return s.finish_at > steps ? static_cast<uint32_t>(s.finish_at - steps) : 1;
}

uint64_t SimEngine::context_tokens(SimTime now) const {
  return context_ + (group_ && end_ != kIdle ? uint64_t{active_} * GroupStepsBy(now) : 0);
}

double SimEngine::StepSeconds(SimTime now) const {
  return active_ == 0 ? 0 : profile_.DecodeStepSeconds(active_, context_tokens(now));
}

DecodeSample SimEngine::Sample(SimTime now) const {
  if (!group_ || end_ == kIdle || group_active_ == 0) return {};
  const uint64_t steps = GroupStepsBy(now);
  return {.batch = group_active_,
          .context_tokens = context_ + uint64_t{active_} * steps,
          .seconds = group_first_ + group_growth_ * static_cast<double>(steps)};
}

}  // namespace tidepool
