#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "server/gateway/request_runner.h"

namespace tidepool {

// A prompt that somebody else has tokenised, in the pool.
struct PreparedPrompt {
  std::vector<int32_t> ids;
  uint32_t charged_tokens = 0;  // to the tenant: those of the prompts that follow, too
};
using PrepareFn = std::function<std::variant<PreparedPrompt, ApiError>()>;

// ChoiceRun: one sequence of a request on its way, as its group sees it.
class ChoiceRun : public RequestRunner::Running {
 public:
  virtual void Begin() = 0;
  // Begin, with a prompt that `prepare` gives instead of the request's own.
  virtual void BeginWith(PrepareFn prepare) = 0;
  // Begin, with a prompt that is tokenised. What comes after the request's first sequence is admitted
  // already: it is not refused for what was checked then. `text`: as encoded, or empty.
  virtual void BeginAfter(std::vector<int32_t> ids, std::string text) = 0;
  // Never begun, and never to be: its sink hears nothing.
  virtual void Abandon() = 0;
  // Cancel, where another of its request has failed and is counted for it.
  virtual void CancelUncounted(const ErrorKind& why) = 0;
};

// ChoiceGroup: the choices of one request, those of n, best_of and several prompts, as one answer to its sink
// (see RequestRunner). Choice c of prompt p has the number p * n + c. Kept alive by its choices. Thread-safe:
// the sink's calls are made one at a time.
//
// Several prompts: nothing goes out before all of them are admitted, so that a prompt that is refused is
// refused with a proper status.
//
// best_of: of each prompt the choices with the highest mean logprob a token are given, best first (OpenAI's
// "highest log probability per token"); one without a token comes last. Nothing of them goes out before all
// have ended.
class ChoiceGroup final : public RequestRunner::Running, public std::enable_shared_from_this<ChoiceGroup> {
 public:
  // `run`: prompt * per_prompt + number of the choice among its prompt's.
  using MakeRun = std::function<std::shared_ptr<ChoiceRun>(uint32_t run, std::shared_ptr<OutputSink>)>;

  // `per_prompt` choices of each prompt are drawn, `n` of them are given.
  ChoiceGroup(uint32_t prompts, uint32_t n, uint32_t per_prompt, std::shared_ptr<OutputSink> sink);

  // Makes all choices, so that they are counted, and begins the first of each prompt.
  void Start(const MakeRun& make);
  void Cancel(const ErrorKind& why) override;

 private:
  class Member;
  struct Choice {
    std::shared_ptr<ChoiceRun> run;  // null once it is done
    bool begun = false;
    TokenUsage usage;
    std::optional<ChoiceEnd> end;
    OutputDelta kept;  // while nothing goes out
    double logprob_sum = 0;
  };

  // What a choice's sink hears.
  void OnAdmitted(uint32_t choice, const Admission& admission);
  void OnPromptLogprobs(std::vector<PromptScore> scores);
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage);
  bool Restart(uint32_t choice);
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage);
  std::optional<std::vector<std::string>> CalledTools(uint32_t choice);
  int Status(const Outcome& outcome);
  void OnDone(uint32_t choice, const Outcome& outcome);

  uint32_t prompts() const { return static_cast<uint32_t>(admissions_.size()); }
  uint32_t PromptOf(uint32_t choice) const { return choice / per_prompt_; }
  bool First(uint32_t choice) const { return choice % per_prompt_ == 0; }  // of its prompt
  // The following hold mu_.
  TokenUsage Usage() const;
  // Deltas go out as they come.
  bool flows() const { return !choose_ && admitted_ == prompts(); }
  // What came before all prompts were admitted. False: the client is gone.
  bool GiveKept();
  // Choices that are to begin now that this one has, without the lock.
  std::vector<std::shared_ptr<ChoiceRun>> TakeOthers(uint32_t choice);
  void GiveBest();

  // Begins what TakeOthers gave for this choice. Without the lock.
  void BeginOthers(uint32_t choice, const std::vector<std::shared_ptr<ChoiceRun>>& others);
  // What every choice that begins late goes through: a Cancel that came before did not see it.
  void CancelIfAsked(ChoiceRun& run);

  const uint32_t n_, per_prompt_;
  const bool choose_;  // best_of above n
  const std::shared_ptr<OutputSink> sink_;

  std::mutex mu_;
  std::vector<Choice> choices_;
  std::vector<Admission> admissions_;  // of each prompt
  uint32_t admitted_ = 0;              // of them, known
  uint32_t open_;
  std::optional<ErrorKind> cancelled_;
  bool done_ = false;
};

}  // namespace tidepool
