// The codec of /v1/embeddings, and how many inputs become one answer.
#include "server/gateway/embeddings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <deque>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/gateway/embedding_group.h"
#include "server/gateway/json.h"

namespace tidepool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Input = std::variant<std::string, std::vector<int32_t>>;

EmbeddingRequest Parsed(const std::string& body) {
  auto parsed = ParseEmbeddings(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) {
    ADD_FAILURE() << body << ": " << error->message;
    return {};
  }
  return std::get<EmbeddingRequest>(std::move(parsed));
}

ApiError Refused(const std::string& body) {
  auto parsed = ParseEmbeddings(body);
  if (auto* error = std::get_if<ApiError>(&parsed)) return *error;
  ADD_FAILURE() << body << " was taken";
  return {};
}

TEST(ParseEmbeddings, InputsComeInFourShapes) {
  EXPECT_THAT(Parsed(R"({"input":"a"})").inputs, ElementsAre(Input("a")));
  EXPECT_THAT(Parsed(R"({"input":["a","b"]})").inputs, ElementsAre(Input("a"), Input("b")));
  EXPECT_THAT(Parsed(R"({"input":[1,2]})").inputs, ElementsAre(Input(std::vector<int32_t>{1, 2})));
  EXPECT_THAT(Parsed(R"({"input":[[1],[2,3]]})").inputs,
              ElementsAre(Input(std::vector<int32_t>{1}), Input(std::vector<int32_t>{2, 3})));
}

TEST(ParseEmbeddings, DefaultsAreVllmsForDecoders) {
  const EmbeddingRequest r = Parsed(R"({"input":"a","model":"m","user":"u"})");
  EXPECT_EQ(r.pooling, Pooling::kLast);
  EXPECT_TRUE(r.normalize);
  EXPECT_FALSE(r.base64);
  EXPECT_EQ(r.model, "m");
  const EmbeddingRequest other = Parsed(
      R"({"input":"a","pooling":"mean","normalize":false,"encoding_format":"base64","dimensions":8,"priority":-2})");
  EXPECT_EQ(other.pooling, Pooling::kMean);
  EXPECT_FALSE(other.normalize);
  EXPECT_TRUE(other.base64);
  EXPECT_EQ(other.dimensions, 8u);
  EXPECT_EQ(other.priority, -2);
}

TEST(ParseEmbeddings, WrongFieldsAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({})", "input"},
      {R"({"input":7})", "input"},
      {R"({"input":[]})", "input"},
      {R"({"input":""})", "input"},
      {R"({"input":["a",""]})", "input[1]"},
      {R"({"input":["a",[1]],"encoding_format":"hex"})", "encoding_format"},
      {R"({"input":["a",7]})", "input[1]"},
      {R"({"input":[1,"a"]})", "input"},
      {R"({"input":[1.5]})", "input"},
      {R"({"input":[[]]})", "input[0]"},
      {R"({"input":"a","dimensions":0})", "dimensions"},
      {R"({"input":"a","pooling":"cls"})", "pooling"},
      {R"({"input":"a","normalize":1})", "normalize"},
      {R"({"input":"a","user":7})", "user"},
      {R"({"input":"a","priority":1001})", "priority"},
      {R"({"input":"a","messages":[{"role":"user"}]})", "messages"},
      {R"({"input":"a","truncate_prompt_tokens":7})", "truncate_prompt_tokens"},
  };
  for (const auto& [body, field] : cases) {
    const ApiError error = Refused(body);
    EXPECT_EQ(error.status, 400) << body;
    EXPECT_THAT(error.param, HasSubstr(field)) << body << ": " << error.message;
  }
  EXPECT_EQ(Refused("[1]").code, errors::kInvalidJson.code);
  OrderedJson many;
  many["input"] = std::vector<std::string>(kEmbeddingInputsMax + 1, "a");
  EXPECT_THAT(Refused(many.dump()).message, HasSubstr("2048"));
}

TEST(EmbeddingsBody, IsOpenAisAndReadsBackExactly) {
  EmbeddingsOutcome outcome;
  outcome.vectors = {{0.1f, -3e-9f, 1}, {2, 3, 16777216}};
  outcome.prompt_tokens = 12;
  auto json = ParseJson(EmbeddingsBody(outcome, "m\"x", false));
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ((*json)["object"], "list");
  EXPECT_EQ((*json)["model"], "m\"x");
  EXPECT_EQ((*json)["usage"].dump(), R"({"prompt_tokens":12,"total_tokens":12})");
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*json)["data"][i]["index"], i);
    EXPECT_EQ((*json)["data"][i]["object"], "embedding");
    for (size_t k = 0; k < 3; ++k) {
      EXPECT_EQ((*json)["data"][i]["embedding"][k].get<float>(), outcome.vectors[i][k]);
    }
  }
  json = ParseJson(EmbeddingsBody(outcome, "m", true));
  ASSERT_TRUE(json.ok()) << json.status();
  std::string bytes;
  ASSERT_TRUE(absl::Base64Unescape((*json)["data"][1]["embedding"].get<std::string>(), &bytes));
  std::vector<float> read(3);
  ASSERT_EQ(bytes.size(), 12u);
  std::memcpy(read.data(), bytes.data(), 12);
  EXPECT_EQ(read, outcome.vectors[1]);
}

std::shared_ptr<const Tokenizer> Letters() {
  auto tokenizer = Tokenizer::FromJson(R"({"version":"1.0","added_tokens":[],"normalizer":null,
    "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
    "post_processor":null,"decoder":{"type":"ByteLevel"},
    "model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]}})");
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *tokenizer;
}

TEST(TokeniseInputs, EachInputIsCheckedAgainstTheModel) {
  const auto tokenizer = Letters();
  const EmbeddingModel model{.max_model_len = 4, .vocab_size = 2, .hidden_size = 8};
  const auto lists = TokeniseInputs(Parsed(R"({"input":["ab","b"],"dimensions":8})"), *tokenizer, model);
  ASSERT_TRUE(std::holds_alternative<TokenLists>(lists));
  EXPECT_THAT(std::get<TokenLists>(lists), ElementsAre(ElementsAre(0, 1), ElementsAre(1)));
  const auto whole = TokeniseInputs(Parsed(R"({"input":"abab"})"), *tokenizer, model);
  EXPECT_TRUE(std::holds_alternative<TokenLists>(whole)) << "no answer needs room";

  const std::tuple<const char*, const char*, const char*> wrong[] = {
      {R"({"input":["a","ababa"]})", "input[1]", "maximum context length is 4"},
      {R"({"input":[[0],[2]]})", "input[1]", "vocabulary"},
      {R"({"input":"a","dimensions":4})", "dimensions", "must be 8"},
  };
  for (const auto& [body, param, message] : wrong) {
    const auto result = TokeniseInputs(Parsed(body), *tokenizer, model);
    ASSERT_TRUE(std::holds_alternative<ApiError>(result)) << body;
    EXPECT_EQ(std::get<ApiError>(result).param, param);
    EXPECT_THAT(std::get<ApiError>(result).message, HasSubstr(message));
  }
  const EmbeddingModel wide{.max_model_len = 400'000, .vocab_size = 2, .hidden_size = 1 << 20};
  EmbeddingRequest five;
  five.inputs.assign(5, "a");
  EXPECT_THAT(std::get<ApiError>(TokeniseInputs(five, *tokenizer, wide)).message, HasSubstr("4194304"));
  EmbeddingRequest tokens;
  tokens.inputs.assign(2, std::vector<int32_t>(kEmbeddingTokensMax / 2 + 1));
  const EmbeddingModel small{.max_model_len = 400'000, .vocab_size = 2, .hidden_size = 8};
  EXPECT_THAT(std::get<ApiError>(TokeniseInputs(tokens, *tokenizer, small)).message, HasSubstr("300000"));
}

// A sequence that the test plays; see choice_group_test.cc.
class FakeRun final : public ChoiceRun {
 public:
  explicit FakeRun(std::shared_ptr<OutputSink> s) : sink(std::move(s)) {}
  void Begin() override {}
  void BeginWith(PrepareFn prepare) override {
    auto prepared = prepare();
    if (auto* error = std::get_if<ApiError>(&prepared)) {
      sink->OnDone({.error = *error});
      return;
    }
    ids = std::get<PreparedPrompt>(prepared).ids;
    charged = std::get<PreparedPrompt>(prepared).charged_tokens;
  }
  void BeginAfter(std::vector<int32_t> given, std::string) override { ids = std::move(given); }
  void Abandon() override { ended = "abandoned"; }
  void Cancel(const ErrorKind&) override { ended = "cancelled"; }
  void CancelUncounted(const ErrorKind&) override { ended = "uncounted"; }

  void Give() {
    sink->OnChoiceEnd(0, {.finish_reason = "pooled", .pooled = {static_cast<float>(ids.at(0))}}, {});
    sink->OnDone({.usage = {.cached_tokens = 1}});
  }

  std::shared_ptr<OutputSink> sink;
  std::vector<int32_t> ids;
  uint32_t charged = 0;
  std::string ended;
};

class EmbeddingGroupTest : public ::testing::Test {
 protected:
  void Start(size_t inputs) {
    EmbeddingRequest request;
    request.inputs.assign(inputs, "x");
    EmbeddingGroup::Options options;
    options.make = [this](std::shared_ptr<OutputSink> member) {
      runs_.push_back(std::make_shared<FakeRun>(std::move(member)));
      return runs_.back();
    };
    options.prepare = [this](const EmbeddingRequest& r) -> std::variant<TokenLists, ApiError> {
      if (refuse_) return MakeError(errors::kInvalidRequest, "no");
      TokenLists lists;
      for (size_t i = 0; i < r.inputs.size(); ++i) lists.push_back({static_cast<int32_t>(i), 0});
      return lists;
    };
    options.done = [this](EmbeddingsOutcome o) {
      ++done_;
      outcome_ = std::move(o);
    };
    group_ = std::make_shared<EmbeddingGroup>(std::move(request), std::move(options));
    group_->Start();
  }
  void TearDown() override {
    for (const auto& run : runs_) run->sink.reset();
  }

  bool refuse_ = false;
  std::shared_ptr<EmbeddingGroup> group_;
  std::deque<std::shared_ptr<FakeRun>> runs_;
  int done_ = 0;
  EmbeddingsOutcome outcome_;
};

TEST_F(EmbeddingGroupTest, FirstGoesAheadThenSoManyAtOnceAndTheAnswerIsInOrder) {
  Start(40);
  ASSERT_EQ(runs_.size(), 1u) << "until it is admitted";
  EXPECT_EQ(runs_[0]->charged, 80u) << "all inputs are paid for";
  runs_[0]->sink->OnAdmitted({});
  ASSERT_EQ(runs_.size(), EmbeddingGroup::kSequences);
  // Ended in another order than begun, each letting one more begin.
  for (size_t n = 0; n < 40; ++n) {
    const auto open =
        std::find_if(runs_.rbegin(), runs_.rend(), [](const auto& run) { return run->ended.empty(); });
    ASSERT_NE(open, runs_.rend());
    (*open)->ended = "given";
    const auto run = *open;
    run->Give();
  }
  EXPECT_EQ(runs_.size(), 40u);
  ASSERT_EQ(done_, 1);
  ASSERT_FALSE(outcome_.error.has_value());
  for (size_t i = 0; i < 40; ++i) EXPECT_THAT(outcome_.vectors[i], ElementsAre(static_cast<float>(i)));
  EXPECT_EQ(outcome_.prompt_tokens, 80u);
  EXPECT_EQ(outcome_.cached_tokens, 40u);
}

TEST_F(EmbeddingGroupTest, OneInputIsOneSequence) {
  Start(1);
  runs_[0]->sink->OnAdmitted({});
  runs_[0]->Give();
  EXPECT_EQ(runs_.size(), 1u);
  EXPECT_EQ(done_, 1);
}

TEST_F(EmbeddingGroupTest, WrongInputIsRefusedBeforeAnythingIsComputed) {
  refuse_ = true;
  Start(5);
  EXPECT_EQ(runs_.size(), 1u);
  ASSERT_EQ(done_, 1);
  EXPECT_EQ(outcome_.error->message, "no");
}

TEST_F(EmbeddingGroupTest, OneThatFailsEndsAllOnce) {
  Start(40);
  runs_[0]->sink->OnAdmitted({});
  runs_[3]->sink->OnDone({.error = MakeError(errors::kInternal, "broken")});
  ASSERT_EQ(done_, 1);
  EXPECT_EQ(outcome_.error->message, "broken");
  for (size_t i = 0; i < runs_.size(); ++i) EXPECT_EQ(runs_[i]->ended, i == 3 ? "" : "uncounted") << i;
  runs_[5]->sink->OnDone({.error = MakeError(errors::kClientGone, "")});
  EXPECT_EQ(done_, 1);
  EXPECT_EQ(runs_.size(), EmbeddingGroup::kSequences) << "none begins any more";
}

TEST_F(EmbeddingGroupTest, ClientThatLeavesCountsOnce) {
  Start(40);
  runs_[0]->sink->OnAdmitted({});
  group_->Cancel(errors::kClientGone);
  for (size_t i = 0; i < runs_.size(); ++i)
    EXPECT_EQ(runs_[i]->ended, i == 0 ? "cancelled" : "uncounted") << i;
}

}  // namespace
}  // namespace tidepool
