#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "server/gateway/request_runner.h"

namespace tidepool {

// ChoiceRun: one choice on its way, as its group sees it.
class ChoiceRun : public RequestRunner::Running {
 public:
  virtual void Begin() = 0;
  // Begin, with the prompt that another choice has tokenised. One that comes after the first is admitted
  // already: it is not refused for what was checked then.
  virtual void BeginAfter(const Admission& first) = 0;
  // Never begun, and never to be: its sink hears nothing.
  virtual void Abandon() = 0;
};

// ChoiceGroup: the choices of one request, n and best_of, as one answer to its sink (see RequestRunner).
// Kept alive by its choices. Thread-safe: the sink's calls are made one at a time.
//
// best_of: the choices with the highest mean logprob a token are given, best first (OpenAI's "highest log
// probability per token"); one without a token comes last. Nothing of them goes out before all have ended.
class ChoiceGroup final : public RequestRunner::Running, public std::enable_shared_from_this<ChoiceGroup> {
 public:
  using MakeRun = std::function<std::shared_ptr<ChoiceRun>(uint32_t choice, std::shared_ptr<OutputSink>)>;

  ChoiceGroup(uint32_t n, uint32_t best_of, std::shared_ptr<OutputSink> sink);

  // Makes all choices, so that they are counted, and begins the first.
  void Start(const MakeRun& make);
  void Cancel(const ErrorKind& why) override;

 private:
  class Member;
  struct Choice {
    std::shared_ptr<ChoiceRun> run;  // null once it is done
    bool begun = false;
    TokenUsage usage;
    std::optional<ChoiceEnd> end;
    OutputDelta kept;  // with best_of
    double logprob_sum = 0;
  };

  // What a choice's sink hears.
  void OnAdmitted(uint32_t choice, const Admission& admission);
  void OnPromptLogprobs(std::vector<PromptScore> scores);
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& usage);
  bool Restart(uint32_t choice);
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd& end, const TokenUsage& usage);
  int Status(const Outcome& outcome);
  void OnDone(uint32_t choice, const Outcome& outcome);

  // The following hold mu_.
  TokenUsage Usage() const;
  // Choices that are to begin now, without the lock.
  std::vector<std::shared_ptr<ChoiceRun>> TakeOthers(uint32_t choice);
  void GiveBest();

  // Begins what TakeOthers gave. Without the lock.
  void BeginOthers(const std::vector<std::shared_ptr<ChoiceRun>>& others);

  const uint32_t n_;
  const bool choose_;  // best_of above n
  const std::shared_ptr<OutputSink> sink_;

  std::mutex mu_;
  std::vector<Choice> choices_;
  Admission admission_;
  uint32_t open_;
  std::optional<ErrorKind> cancelled_;
  bool done_ = false;
};

}  // namespace tidepool
