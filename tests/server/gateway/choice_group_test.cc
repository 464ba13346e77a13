// How the choices of one request become one answer, over runs that the test plays.
#include "server/gateway/choice_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A choice that does what the test says.
class FakeRun final : public ChoiceRun {
 public:
  explicit FakeRun(std::shared_ptr<OutputSink> s) : sink(std::move(s)) {}
  void Begin() override { began = "begin"; }
  void BeginWith(PrepareFn) override { began = "with"; }
  void BeginAfter(std::vector<int32_t> ids, std::string text) override {
    began = absl::StrCat("after ", text, " ", ids.size());
  }
  void Abandon() override { ended = "abandoned"; }
  void Cancel(const ErrorKind& why) override { ended = absl::StrCat("cancelled ", std::string(why.code)); }
  void CancelUncounted(const ErrorKind& why) override {
    ended = absl::StrCat("uncounted ", std::string(why.code));
  }

  void Admit(const std::string& text, size_t tokens) {
    prompt_tokens = static_cast<uint32_t>(tokens);
    sink->OnAdmitted({.id = "r", .prompt_ids = std::vector<int32_t>(tokens), .prompt_text = text});
  }
  bool Say(const std::string& text, float logprob = -1) {
    ++tokens;
    OutputDelta delta{.text = text, .tokens = {{.id = 1, .logprob = logprob}}};
    return sink->OnDelta(0, std::move(delta), {prompt_tokens, tokens, 0});
  }
  void End() {
    sink->OnChoiceEnd(0, {.finish_reason = "stop"}, {prompt_tokens, tokens, 0});
    sink->OnDone({.usage = {prompt_tokens, tokens, 0}});
  }
  void Fail() { sink->OnDone({.error = MakeError(errors::kInternal, "broken")}); }

  std::shared_ptr<OutputSink> sink;
  std::string began, ended;
  uint32_t prompt_tokens = 0, tokens = 0;
};

class Heard final : public OutputSink {
 public:
  void OnAdmitted(const Admission& a) override {
    std::string all = absl::StrCat("admitted ", a.prompt_text);
    for (const AdmittedPrompt& more : a.more) absl::StrAppend(&all, ",", more.text);
    log.push_back(all);
  }
  void OnPromptLogprobs(std::vector<PromptScore>) override { log.push_back("scores"); }
  bool OnDelta(uint32_t choice, OutputDelta delta, const TokenUsage& u) override {
    log.push_back(absl::StrCat(choice, ":", delta.text));
    usage = u;
    return true;
  }
  bool Restart(uint32_t choice) override {
    log.push_back(absl::StrCat("restart ", choice));
    return true;
  }
  void OnChoiceEnd(uint32_t choice, const ChoiceEnd&, const TokenUsage& u) override {
    log.push_back(absl::StrCat("end ", choice));
    usage = u;
  }
  int Status(const Outcome&) override { return 200; }
  void OnDone(const Outcome& o) override {
    log.push_back("done");
    outcome = o;
  }
  std::vector<std::string> Take() { return std::exchange(log, {}); }

  std::vector<std::string> log;
  TokenUsage usage;
  Outcome outcome;
};

class ChoiceGroupTest : public ::testing::Test {
 protected:
  void Start(uint32_t prompts, uint32_t n, uint32_t per_prompt) {
    group_ = std::make_shared<ChoiceGroup>(prompts, n, per_prompt, heard_);
    group_->Start([&](uint32_t, std::shared_ptr<OutputSink> member) {
      runs_.push_back(std::make_shared<FakeRun>(std::move(member)));
      return runs_.back();
    });
  }
  void TearDown() override {
    for (const auto& run : runs_) run->sink.reset();
  }
  std::vector<std::string> Began() {
    std::vector<std::string> out;
    for (const auto& run : runs_) out.push_back(run->began);
    return out;
  }
  std::vector<std::string> Ended() {
    std::vector<std::string> out;
    for (const auto& run : runs_) out.push_back(run->ended);
    return out;
  }

  std::shared_ptr<Heard> heard_ = std::make_shared<Heard>();
  std::shared_ptr<ChoiceGroup> group_;
  std::vector<std::shared_ptr<FakeRun>> runs_;
};

TEST_F(ChoiceGroupTest, PromptsAreNumberedOneAfterAnother) {
  Start(2, 2, 2);
  EXPECT_THAT(Began(), ElementsAre("begin", "", "begin", ""));
  runs_[2]->Admit("second", 3);
  runs_[2]->Say("x");
  EXPECT_THAT(heard_->Take(), IsEmpty()) << "the first prompt may still be refused";
  EXPECT_THAT(Began(), ElementsAre("begin", "", "begin", "after second 3"));
  runs_[0]->Admit("first", 5);
  EXPECT_THAT(heard_->Take(), ElementsAre("admitted first,second", "2:x"));
  EXPECT_EQ(heard_->usage.prompt_tokens, 8u) << "of both prompts, each once";
  runs_[0]->Say("a");
  EXPECT_THAT(Began(), ElementsAre("begin", "after first 5", "begin", "after second 3"));
  runs_[3]->Say("y");
  runs_[1]->Say("b");
  EXPECT_THAT(heard_->Take(), ElementsAre("0:a", "3:y", "1:b"));
  for (const int i : {3, 0, 2, 1}) runs_[i]->End();
  EXPECT_THAT(heard_->Take(), ElementsAre("end 3", "end 0", "end 2", "end 1", "done"));
  EXPECT_FALSE(heard_->outcome.error.has_value());
  EXPECT_EQ(heard_->outcome.usage.completion_tokens, 4u);
  EXPECT_EQ(heard_->outcome.usage.prompt_tokens, 8u);
}

TEST_F(ChoiceGroupTest, AnswerThatEndsBeforeAllPromptsAreAdmittedIsKept) {
  Start(2, 1, 1);
  runs_[1]->Admit("second", 3);
  runs_[1]->Say("x");
  runs_[1]->End();
  EXPECT_THAT(heard_->Take(), IsEmpty());
  runs_[0]->Admit("first", 5);
  EXPECT_THAT(heard_->Take(), ElementsAre("admitted first,second", "1:x", "end 1"));
  runs_[0]->Say("a");
  runs_[0]->End();
  EXPECT_THAT(heard_->Take(), ElementsAre("0:a", "end 0", "done"));
}

TEST_F(ChoiceGroupTest, RefusedPromptRefusesTheRequestAndNamesTheOne) {
  Start(2, 2, 2);
  runs_[0]->Admit("first", 5);
  runs_[0]->Say("a");
  runs_[2]->Fail();
  EXPECT_THAT(heard_->Take(), ElementsAre("done")) << "nothing had gone out";
  ASSERT_TRUE(heard_->outcome.error.has_value());
  EXPECT_THAT(heard_->outcome.error->message, HasSubstr("prompt 1"));
  EXPECT_THAT(Ended(), ElementsAre("uncounted internal_error", "uncounted internal_error", "", "abandoned"));
}

TEST_F(ChoiceGroupTest, FailureCountsOnceAndTakesTheOthersAlong) {
  Start(1, 3, 3);
  runs_[0]->Admit("p", 5);
  runs_[0]->Say("a");
  runs_[1]->Fail();
  EXPECT_THAT(Ended(), ElementsAre("uncounted internal_error", "", "uncounted internal_error"));
  EXPECT_THAT(heard_->outcome.error->message, HasSubstr("choice 1"));
  // What they say of themselves later, nobody hears.
  runs_[0]->Fail();
  EXPECT_THAT(heard_->Take(), ElementsAre("admitted p", "0:a", "done"));
}

TEST_F(ChoiceGroupTest, ClientThatLeavesCountsOnce) {
  Start(1, 3, 3);
  runs_[0]->Admit("p", 5);
  runs_[0]->Say("a");
  group_->Cancel(errors::kClientGone);
  EXPECT_THAT(Ended(),
              ElementsAre("cancelled client_gone", "uncounted client_gone", "uncounted client_gone"));
}

TEST_F(ChoiceGroupTest, BestOfChoosesAmongEachPromptsOwn) {
  Start(2, 1, 2);
  for (const int i : {0, 2}) runs_[i]->Admit(absl::StrCat("p", i / 2), 1);
  runs_[0]->Say("worse", -3);
  runs_[1]->Say("better", -1);
  runs_[2]->Say("good", -2);
  runs_[3]->Say("bad", -9);
  for (const auto& run : runs_) run->End();
  EXPECT_THAT(heard_->Take(), ElementsAre("admitted p0,p1", "0:better", "end 0", "1:good", "end 1", "done"));
}

}  // namespace
}  // namespace tidepool
