#include "server/gateway/embedding_group.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace tidepool {

// The sink of one sequence. There are neither deltas nor logprobs.
class EmbeddingGroup::Member final : public OutputSink {
 public:
  Member(std::shared_ptr<EmbeddingGroup> group, size_t input) : group_(std::move(group)), input_(input) {}

  void OnAdmitted(const Admission&) override { group_->OnAdmitted(input_); }
  void OnPromptLogprobs(std::vector<PromptScore>) override {}
  bool OnDelta(uint32_t, OutputDelta, const TokenUsage&) override { return true; }
  bool Restart(uint32_t) override { return true; }  // nobody has seen anything of it
  void OnChoiceEnd(uint32_t, const ChoiceEnd& end, const TokenUsage&) override {
    group_->OnVector(input_, end.pooled);
  }
  int Status(const Outcome& outcome) override { return outcome.error ? outcome.error->status : 200; }
  void OnDone(const Outcome& outcome) override { group_->OnDone(input_, outcome); }

 private:
  const std::shared_ptr<EmbeddingGroup> group_;
  const size_t input_;
};

EmbeddingGroup::EmbeddingGroup(EmbeddingRequest request, Options options)
    : inputs_(request.inputs.size()),
      options_(std::move(options)),
      request_(std::move(request)),
      runs_(inputs_) {
  outcome_.vectors.resize(inputs_);
}

std::shared_ptr<ChoiceRun> EmbeddingGroup::Make(size_t input) {
  return options_.make(std::make_shared<Member>(shared_from_this(), input));
}

void EmbeddingGroup::Start() {
  std::shared_ptr<ChoiceRun> first = Make(0);
  {
    std::lock_guard lock(mu_);
    runs_[0] = first;
  }
  first->BeginWith([self = shared_from_this()] { return self->Prepare(); });
}

std::variant<PreparedPrompt, ApiError> EmbeddingGroup::Prepare() {
  // Nobody else looks at the request before its first sequence is admitted.
  auto prepared = options_.prepare(request_);
  if (auto* error = std::get_if<ApiError>(&prepared)) return std::move(*error);
  std::lock_guard lock(mu_);
  tokens_ = std::move(std::get<TokenLists>(prepared));
  request_.inputs.clear();
  PreparedPrompt out;
  for (const std::vector<int32_t>& ids : tokens_) out.charged_tokens += static_cast<uint32_t>(ids.size());
  outcome_.prompt_tokens = out.charged_tokens;
  out.ids = std::move(tokens_[0]);
  return out;
}

void EmbeddingGroup::OnAdmitted(size_t input) {
  if (input > 0) return;
  {
    std::lock_guard lock(mu_);
    admitted_ = true;
  }
  BeginMore();
}

void EmbeddingGroup::BeginMore() {
  while (true) {
    size_t input;
    std::vector<int32_t> ids;
    {
      std::lock_guard lock(mu_);
      if (done_ || !admitted_ || next_ == inputs_ || open_ >= kSequences) return;
      input = next_++;
      ++open_;
      ids = std::move(tokens_[input]);
    }
    std::shared_ptr<ChoiceRun> run = Make(input);
    std::optional<ErrorKind> why;
    bool done;
    {
      std::lock_guard lock(mu_);
      why = cancelled_;
      done = done_;
      if (!done) runs_[input] = run;
    }
    if (done) return run->Abandon();
    // A Cancel that came before did not see this one; it ends with its first step.
    if (why) run->Cancel(*why);
    run->BeginAfter(std::move(ids), {});
  }
}

void EmbeddingGroup::Cancel(const ErrorKind& why) {
  std::vector<std::shared_ptr<ChoiceRun>> begun;
  {
    std::lock_guard lock(mu_);
    if (done_ || cancelled_) return;
    cancelled_ = why;
    for (const auto& run : runs_) {
      if (run != nullptr) begun.push_back(run);
    }
  }
  // The request ended once, however many sequences it had.
  for (size_t i = 0; i < begun.size(); ++i) {
    i == 0 ? begun[i]->Cancel(why) : begun[i]->CancelUncounted(why);
  }
}

void EmbeddingGroup::OnVector(size_t input, std::vector<float> vector) {
  std::lock_guard lock(mu_);
  outcome_.vectors[input] = std::move(vector);
}

void EmbeddingGroup::OnDone(size_t input, const Outcome& outcome) {
  std::shared_ptr<ChoiceRun> ended;
  std::vector<std::shared_ptr<ChoiceRun>> others;
  EmbeddingsOutcome all;
  {
    std::lock_guard lock(mu_);
    // Out of the cycle of run, sink and group; kept until the lock is given back.
    ended = std::exchange(runs_[input], nullptr);
    if (done_) return;
    --open_;
    outcome_.cached_tokens += outcome.usage.cached_tokens;
    if (outcome.error) {
      done_ = true;
      for (auto& run : runs_) {
        if (run != nullptr) others.push_back(std::exchange(run, nullptr));
      }
      all.error = outcome.error;
    } else if (open_ == 0 && next_ == inputs_) {
      done_ = true;
      all = std::move(outcome_);
    }
  }
  if (all.error || !all.vectors.empty()) {
    const std::optional<ApiError> error = all.error;
    options_.done(std::move(all));
    if (!error) return;
    const ErrorKind why{error->code, error->status};
    for (const auto& run : others) run->CancelUncounted(why);
    return;
  }
  BeginMore();
}

}  // namespace tidepool
