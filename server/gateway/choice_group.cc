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
  int Status(const Outcome& outcome) override { return group_->Status(outcome); }
  void OnDone(const Outcome& outcome) override { group_->OnDone(choice_, outcome); }

 private:
  const std::shared_ptr<ChoiceGroup> group_;
  const uint32_t choice_;
};

ChoiceGroup::ChoiceGroup(uint32_t n, uint32_t best_of, std::shared_ptr<OutputSink> sink)
    : n_(n), choose_(best_of > n), sink_(std::move(sink)), choices_(best_of), open_(best_of) {}

void ChoiceGroup::Start(const MakeRun& make) {
  std::shared_ptr<ChoiceRun> first;
  {
    std::lock_guard lock(mu_);
    for (uint32_t i = 0; i < choices_.size(); ++i) {
      choices_[i].run = make(i, std::make_shared<Member>(shared_from_this(), i));
    }
    choices_[0].begun = true;
    first = choices_[0].run;
  }
  first->Begin();
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
  // The first that ends takes along those that have not begun.
  for (const auto& run : begun) run->Cancel(why);
}

TokenUsage ChoiceGroup::Usage() const {
  TokenUsage sum = choices_[0].usage;
  for (size_t i = 1; i < choices_.size(); ++i) sum.completion_tokens += choices_[i].usage.completion_tokens;
  return sum;
}

std::vector<std::shared_ptr<ChoiceRun>> ChoiceGroup::TakeOthers(uint32_t choice) {
  std::vector<std::shared_ptr<ChoiceRun>> others;
  if (choice != 0 || done_) return others;
  for (Choice& c : choices_) {
    if (!std::exchange(c.begun, true)) others.push_back(c.run);
  }
  return others;
}

void ChoiceGroup::BeginOthers(const std::vector<std::shared_ptr<ChoiceRun>>& others) {
  for (const auto& run : others) {
    run->BeginAfter(admission_);
    std::optional<ErrorKind> why;
    {
      std::lock_guard lock(mu_);
      why = cancelled_;
    }
    // A Cancel that came before did not see this one.
    if (why) run->Cancel(*why);
  }
}

void ChoiceGroup::OnAdmitted(uint32_t choice, const Admission& admission) {
  std::lock_guard lock(mu_);
  if (choice != 0 || done_) return;
  admission_ = admission;
  sink_->OnAdmitted(admission);
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
    if (choose_) {
      for (const DeliveredToken& token : delta.tokens) c.logprob_sum += token.logprob;
      c.kept.text += delta.text;
      std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(c.kept.tokens));
    } else if (!sink_->OnDelta(choice, std::move(delta), Usage())) {
      return false;
    }
    others = TakeOthers(choice);
  }
  BeginOthers(others);
  return true;
}

bool ChoiceGroup::Restart(uint32_t choice) {
  std::lock_guard lock(mu_);
  if (done_) return false;
  Choice& c = choices_[choice];
  if (!choose_ || choice == 0) {
    // The prompt's logprobs start again with choice 0, whatever is kept here.
    if (!sink_->Restart(choice)) return false;
  }
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
    if (!choose_) sink_->OnChoiceEnd(choice, end, Usage());
    // An answer without a token begins with its end.
    others = TakeOthers(choice);
  }
  BeginOthers(others);
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
  std::vector<uint32_t> order(choices_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return mean(choices_[a]) > mean(choices_[b]); });
  for (uint32_t i = 0; i < n_; ++i) {
    Choice& c = choices_[order[i]];
    if (!sink_->OnDelta(i, std::move(c.kept), Usage())) return;
    sink_->OnChoiceEnd(i, *c.end, Usage());
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
      if (choice > 0) all.error->message = absl::StrCat("choice ", choice, ": ", all.error->message);
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
  for (const auto& run : begun) run->Cancel(why);
}

}  // namespace tidepool
