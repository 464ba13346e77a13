#include "server/gateway/choice_group.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"

namespace tidepool {

// The sink of one choice.
class ChoiceGroup::Member final : public OutputSink {
 public:
  Member(std::shared_ptr<ChoiceGroup> group, uint32_t choice) : group_(std::move(group)), choice_(choice) {}

  void OnAdmitted(const Admission& admission) override { group_->OnAdmitted(choice_, admission); }
  void OnPromptLogprobs(std::vector<PromptScore> scores) override {
    group_->OnPromptLogprobs(std::move(scores));
  }
  bool OnDelta(uint32_t, OutputDelta delta, const TokenUsage& usage) override {
    return group_->OnDelta(choice_, std::move(delta), usage);
  }
  bool Restart(uint32_t) override { return group_->Restart(choice_); }
  void OnChoiceEnd(uint32_t, const ChoiceEnd& end, const TokenUsage& usage) override {
    group_->OnChoiceEnd(choice_, end, usage);
  }
  std::optional<std::vector<std::string>> CalledTools(uint32_t) override {
    return group_->CalledTools(choice_);
  }
  int Status(const Outcome& outcome) override { return group_->Status(outcome); }
  void OnDone(const Outcome& outcome) override { group_->OnDone(choice_, outcome); }

 private:
  const std::shared_ptr<ChoiceGroup> group_;
  const uint32_t choice_;
};

ChoiceGroup::ChoiceGroup(uint32_t prompts, uint32_t n, uint32_t per_prompt, std::shared_ptr<OutputSink> sink)
    : n_(n),
      per_prompt_(per_prompt),
      choose_(per_prompt > n),
      sink_(std::move(sink)),
      choices_(size_t{prompts} * per_prompt),
      admissions_(prompts),
      open_(prompts * per_prompt) {}

void ChoiceGroup::Start(const MakeRun& make) {
  {
    std::lock_guard lock(mu_);
    for (uint32_t i = 0; i < choices_.size(); ++i) {
      choices_[i].run = make(i, std::make_shared<Member>(shared_from_this(), i));
    }
  }
  for (uint32_t p = 0; p < prompts(); ++p) {
    std::shared_ptr<ChoiceRun> first;
    {
      std::lock_guard lock(mu_);
      if (done_) return;  // an earlier one was refused, and has abandoned the rest
      choices_[p * per_prompt_].begun = true;
      first = choices_[p * per_prompt_].run;
    }
    CancelIfAsked(*first);
    first->Begin();
  }
}

void ChoiceGroup::CancelIfAsked(ChoiceRun& run) {
  std::optional<ErrorKind> why;
  {
    std::lock_guard lock(mu_);
    why = cancelled_;
  }
  if (why) run.CancelUncounted(*why);
}

void ChoiceGroup::Cancel(const ErrorKind& why) {
  std::vector<std::shared_ptr<ChoiceRun>> begun;
  {
    std::lock_guard lock(mu_);
    cancelled_ = why;
    for (const Choice& c : choices_) {
      if (c.begun && c.run != nullptr) begun.push_back(c.run);
    }
  }
  // The first that ends takes along those that have not begun. The request ended once: one counts.
  for (size_t i = 0; i < begun.size(); ++i) {
    i == 0 ? begun[i]->Cancel(why) : begun[i]->CancelUncounted(why);
  }
}

TokenUsage ChoiceGroup::Usage() const {
  TokenUsage sum;
  for (uint32_t i = 0; i < choices_.size(); ++i) {
    const TokenUsage& usage = choices_[i].usage;
    sum.completion_tokens += usage.completion_tokens;
    if (!First(i)) continue;
    // Known before the prompt's first token is.
    sum.prompt_tokens += static_cast<uint32_t>(admissions_[PromptOf(i)].prompt_ids.size());
    sum.cached_tokens += usage.cached_tokens;
  }
  return sum;
}

std::vector<std::shared_ptr<ChoiceRun>> ChoiceGroup::TakeOthers(uint32_t choice) {
  std::vector<std::shared_ptr<ChoiceRun>> others;
  if (!First(choice) || done_) return others;
  for (uint32_t i = choice; i < choice + per_prompt_; ++i) {
    if (!std::exchange(choices_[i].begun, true)) others.push_back(choices_[i].run);
  }
  return others;
}

void ChoiceGroup::BeginOthers(uint32_t choice, const std::vector<std::shared_ptr<ChoiceRun>>& others) {
  const Admission& admission = admissions_[PromptOf(choice)];  // known by now, and never changed
  for (const auto& run : others) {
    CancelIfAsked(*run);
    run->BeginAfter(admission.prompt_ids, admission.prompt_text);
  }
}

void ChoiceGroup::OnAdmitted(uint32_t choice, const Admission& admission) {
  std::lock_guard lock(mu_);
  if (!First(choice) || done_) return;
  admissions_[PromptOf(choice)] = admission;
  if (++admitted_ < prompts()) return;
  Admission all = admissions_[0];
  for (uint32_t p = 1; p < prompts(); ++p) {
    all.more.push_back({admissions_[p].prompt_ids, admissions_[p].prompt_text});
  }
  sink_->OnAdmitted(all);
  if (!choose_) GiveKept();
}

bool ChoiceGroup::GiveKept() {
  for (uint32_t i = 0; i < choices_.size(); ++i) {
    Choice& c = choices_[i];
    if (!c.kept.tokens.empty() || !c.kept.text.empty()) {
      if (!sink_->OnDelta(i, std::exchange(c.kept, {}), Usage())) return false;
    }
    if (c.end) sink_->OnChoiceEnd(i, *c.end, Usage());
  }
  return true;
}

void ChoiceGroup::OnPromptLogprobs(std::vector<PromptScore> scores) {
  std::lock_guard lock(mu_);
  if (!done_) sink_->OnPromptLogprobs(std::move(scores));
}

bool ChoiceGroup::OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage) {
  std::vector<std::shared_ptr<ChoiceRun>> others;
  {
    std::lock_guard lock(mu_);
    if (done_) return false;
    Choice& c = choices_[choice];
    c.usage = usage;
    if (flows()) {
      if (!sink_->OnDelta(choice, std::move(delta), Usage())) return false;
    } else {
      for (const DeliveredToken& token : delta.tokens) c.logprob_sum += token.logprob;
      c.kept.text += delta.text;
      std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(c.kept.tokens));
    }
    others = TakeOthers(choice);
  }
  BeginOthers(choice, others);
  return true;
}

bool ChoiceGroup::Restart(uint32_t choice) {
  std::lock_guard lock(mu_);
  if (done_) return false;
  Choice& c = choices_[choice];
  // The prompt's logprobs start again with choice 0, whatever is kept here.
  const bool seen = flows() || (choice == 0 && prompts() == 1);
  if (seen && !sink_->Restart(choice)) return false;
  c.usage.completion_tokens = 0;
  c.kept = {};
  c.logprob_sum = 0;
  return true;
}

void ChoiceGroup::OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage) {
  std::vector<std::shared_ptr<ChoiceRun>> others;
  {
    std::lock_guard lock(mu_);
    if (done_) return;
    Choice& c = choices_[choice];
    c.usage = usage;
    c.end = end;
    if (flows()) sink_->OnChoiceEnd(choice, end, Usage());
    // An answer without a token begins with its end.
    others = TakeOthers(choice);
  }
  BeginOthers(choice, others);
}

std::optional<std::vector<std::string>> ChoiceGroup::CalledTools(uint32_t choice) {
  std::lock_guard lock(mu_);
  // Of what is kept back nobody knows yet.
  return flows() && !done_ ? sink_->CalledTools(choice) : std::nullopt;
}

int ChoiceGroup::Status(const Outcome& outcome) {
  std::lock_guard lock(mu_);
  return sink_->Status(outcome);
}

void ChoiceGroup::GiveBest() {
  const auto mean = [](const Choice& c) {
    return c.kept.tokens.empty() ? -std::numeric_limits<double>::infinity()
                                 : c.logprob_sum / static_cast<double>(c.kept.tokens.size());
  };
  for (uint32_t p = 0; p < prompts(); ++p) {
    std::vector<uint32_t> order(per_prompt_);
    std::iota(order.begin(), order.end(), p * per_prompt_);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return mean(choices_[a]) > mean(choices_[b]); });
    for (uint32_t i = 0; i < n_; ++i) {
      Choice& c = choices_[order[i]];
      if (!sink_->OnDelta(p * n_ + i, std::move(c.kept), Usage())) return;
      sink_->OnChoiceEnd(p * n_ + i, *c.end, Usage());
    }
  }
}

void ChoiceGroup::OnDone(uint32_t choice, const Outcome& outcome) {
  std::shared_ptr<ChoiceRun> ended;
  std::vector<std::shared_ptr<ChoiceRun>> begun, rest;
  Outcome all;
  {
    std::lock_guard lock(mu_);
    // Out of the cycle of run, sink and group; kept until the lock is given back.
    ended = std::exchange(choices_[choice].run, nullptr);
    if (done_) return;
    if (outcome.error) {
      for (Choice& c : choices_) {
        if (c.run != nullptr) (c.begun ? begun : rest).push_back(std::exchange(c.run, nullptr));
      }
      all.error = outcome.error;
      if (prompts() > 1) {
        absl::StrAppend(&all.error->message, " (prompt ", PromptOf(choice),
                        " of the request's, counted from 0)");
      } else if (choice > 0) {
        all.error->message = absl::StrCat("choice ", choice, ": ", all.error->message);
      }
    } else {
      choices_[choice].usage = outcome.usage;
      if (choice == 0) choices_[0].end->trace = outcome.trace;
      if (--open_ > 0) return;
      if (choose_) GiveBest();
    }
    done_ = true;
    all.usage = Usage();
    if (choices_[0].end) all.trace = choices_[0].end->trace;
  }
  sink_->OnDone(all);
  for (const auto& run : rest) run->Abandon();
  if (!outcome.error) return;
  const ErrorKind why{outcome.error->code, outcome.error->status};
  for (const auto& run : begun) run->CancelUncounted(why);
}

}  // namespace tidepool
