// Traces, datasets, made-up workloads, and the prompts that come of them.
#include "server/bench/workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <set>

#include "server/bench/dataset.h"
#include "server/bench/load_runner.h"
#include "server/bench/prompt_writer.h"
#include "server/bench/trace.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

const char kData[] = "../shared/data/traces/";

#define SKIP_WITHOUT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << (path) << " is not there"

uint32_t Sum(const std::vector<PromptPiece>& pieces) {
  uint32_t sum = 0;
  for (const PromptPiece& piece : pieces) sum += piece.tokens;
  return sum;
}

TEST(TraceTest, ReadsMooncake) {
  const auto trace = ParseTrace(
      "{\"timestamp\": 1000, \"input_length\": 1100, \"output_length\": 5, \"hash_ids\": [0, 1, 2]}\n"
      "\n"
      "{\"timestamp\": 4000, \"input_length\": 600, \"output_length\": 7, \"hash_ids\": [0, 9]}\r\n",
      "t");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->format, "mooncake");
  ASSERT_EQ(trace->entries.size(), 2u);
  EXPECT_EQ(trace->entries[0].at, absl::ZeroDuration());
  EXPECT_EQ(trace->entries[1].at, absl::Seconds(3));
  EXPECT_EQ(trace->entries[0].blocks, (std::vector<uint64_t>{0, 1, 2}));
  EXPECT_EQ(trace->entries[1].input_tokens, 600u);
}

TEST(TraceTest, ReadsBurstGptByItsColumnNames) {
  const auto trace = ParseTrace(
      "Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
      "5,a,ChatGPT,472,18,490,Conversation log\n"
      "45.5,,\"GPT-4, new\",1087,230,1317,API log\n"
      "118,b,GPT-4,417,0,417,Conversation log\n",
      "t");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->format, "burstgpt");
  ASSERT_EQ(trace->entries.size(), 2u);
  EXPECT_EQ(trace->left_out, 1u);  // a failure: no answer
  EXPECT_EQ(trace->entries[1].at, absl::Seconds(40.5));
  EXPECT_EQ(trace->entries[1].input_tokens, 1087u);
  EXPECT_EQ(trace->entries[1].output_tokens, 230u);
}

TEST(TraceTest, ReadsAzure) {
  const auto trace = ParseTrace(
      "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
      "2023-11-16 18:17:04.0319600,3180,8\n",
      "t");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->format, "azure");
  EXPECT_EQ(trace->entries[1].at, absl::Milliseconds(52));
}

TEST(TraceTest, NamesTheLineThatIsWrong) {
  const std::string good = R"({"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [0]})";
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"", "t: is empty"},
      {"hello\n1\n", "t:1: is neither"},
      {good + "\n{\"timestamp\": 0}\n", "t:2: input_length"},
      {good + "\n" + R"({"timestamp": "x", "input_length": 5, "output_length": 5})", "t:2: timestamp"},
      {good + "\n" + R"({"timestamp": 1, "input_length": -5, "output_length": 5})", "t:2: input_length"},
      {good + "\n" + R"({"timestamp": 1, "input_length": 5, "output_length": 1e30})", "t:2: output_length"},
      {good + "\n" + R"({"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": [-1]})",
       "t:2: hash_ids"},
      {good + "\n{", "t:2: is not a JSON object"},
      {R"({"timestamp": 9000, "input_length": 5, "output_length": 5})"
       "\n" +
           good,
       "t:2: is earlier"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "t:2: 'yesterday'"},
      {"Timestamp,Request tokens,Response tokens\n1,2\n", "t:2: has fewer"},
      {"Timestamp,Request tokens,Response tokens\n1,2,many\n", "t:2: 'many'"},
      {"Timestamp,Request tokens,Response tokens\n1,0,0\n", "t: holds no request"},
  };
  for (const auto& [text, message] : bad) {
    const auto trace = ParseTrace(text, "t");
    EXPECT_TRUE(absl::IsInvalidArgument(trace.status())) << text;
    EXPECT_THAT(std::string(trace.status().message()), HasSubstr(message));
  }
}

TEST(TraceTest, ReplaysWithSpeedScaleAndCaps) {
  const auto trace = ParseTrace(
      "{\"timestamp\": 0, \"input_length\": 1100, \"output_length\": 50, \"hash_ids\": [0, 1, 2]}\n"
      "{\"timestamp\": 4000, \"input_length\": 1500, \"output_length\": 7, \"hash_ids\": [0, 1, 9]}\n",
      "t");
  ASSERT_TRUE(trace.ok());
  auto source =
      MakeSource(std::make_shared<const Trace>(*trace),
                 {.speed = 2, .length_scale = 0.5, .input_tokens_max = 600, .output_tokens_max = 10}, 1);
  const auto a = source->Next(), b = source->Next();
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(source->Next());
  EXPECT_EQ(b->start, absl::Seconds(2));
  EXPECT_EQ(Sum(a->turns[0].pieces), 550u);
  EXPECT_EQ(Sum(b->turns[0].pieces), 600u);  // 750, cut at its end
  EXPECT_EQ(a->turns[0].output_tokens, 10u);
  EXPECT_EQ(b->turns[0].output_tokens, 4u);
  // Two whole blocks of 256 are shared, and what follows is not.
  const auto words = PromptWriter::Ids(0, 50'000);
  const auto x = words.Tokens(a->turns[0].pieces), y = words.Tokens(b->turns[0].pieces);
  EXPECT_TRUE(std::equal(x.begin(), x.begin() + 512, y.begin()));
  EXPECT_FALSE(std::equal(x.begin() + 512, x.end(), y.begin() + 512));
}

TEST(TraceTest, PlaysTheMooncakeConversationTrace) {
  const std::string path = std::string(kData) + "mooncake/conversation_trace.jsonl";
  SKIP_WITHOUT(path);
  const auto trace = ReadTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->entries.size(), 12031u);  // the trace's README
  auto source = MakeSource(std::make_shared<const Trace>(*trace), {}, 3);
  std::map<uint64_t, size_t> seen;
  size_t requests = 0, repeated = 0, pieces = 0;
  absl::Duration last;
  while (const auto session = source->Next()) {
    const Turn& turn = session->turns[0];
    EXPECT_EQ(Sum(turn.pieces), trace->entries[requests].input_tokens);
    EXPECT_GE(*session->start, last);
    last = *session->start;
    for (const PromptPiece& piece : turn.pieces) {
      ++pieces;
      repeated += seen[piece.seed]++ > 0;
    }
    ++requests;
  }
  EXPECT_EQ(requests, 12031u);
  // The trace's ids, counted by another program (python: sum(len) - len(set)).
  std::set<uint64_t> unique;
  size_t ids = 0;
  for (const TraceEntry& entry : trace->entries) {
    ids += entry.blocks.size();
    unique.insert(entry.blocks.begin(), entry.blocks.end());
  }
  EXPECT_EQ(pieces, ids);
  EXPECT_EQ(repeated, ids - unique.size());
}

TEST(TraceTest, PlaysTheAzureTrace) {
  const std::string path = std::string(kData) + "azure/AzureLLMInferenceTrace_code.csv";
  SKIP_WITHOUT(path);
  const auto trace = ReadTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->entries.size() + trace->left_out, 8819u);  // lines but the header
  EXPECT_NEAR(absl::ToDoubleMinutes(trace->entries.back().at), 57, 3);
}

TEST(DatasetTest, ReadsEveryShape) {
  const auto records = ParseDataset(
      R"({"prompt": "p", "max_tokens": 9})"
      "\n"
      R"({"input": "i", "output_length": "33"})"
      "\n"
      R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]})"
      "\n"
      R"({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]})"
      "\n",
      "d");
  ASSERT_TRUE(records.ok()) << records.status();
  ASSERT_EQ(records->size(), 4u);
  EXPECT_EQ((*records)[0].turns[0][0].content, "p");
  EXPECT_EQ((*records)[0].output_tokens, 9u);
  EXPECT_EQ((*records)[1].output_tokens, 33u);
  EXPECT_EQ((*records)[2].turns[0].size(), 2u);
  ASSERT_EQ((*records)[3].turns.size(), 2u);
  EXPECT_EQ((*records)[3].turns[1][0].content, "c");
}

TEST(DatasetTest, NamesTheRecordThatIsWrong) {
  for (const char* text : {"", "[]", "{\"x\": 1}", "[1]", "{\"prompt\": \"a\"}\n{", "{\"messages\": []}",
                           "{\"messages\": [{\"role\": \"user\"}]}", "[{\"prompt\": 5}]"}) {
    const auto records = ParseDataset(text, "file");
    EXPECT_TRUE(absl::IsInvalidArgument(records.status())) << text;
    EXPECT_THAT(std::string(records.status().message()), HasSubstr("file"));
  }
}

TEST(DatasetTest, PlaysTheSharedFile) {
  const std::string path = std::string(kData) + "sharegpt/run.json";
  SKIP_WITHOUT(path);
  const auto records = ReadDataset(path);
  ASSERT_TRUE(records.ok()) << records.status();
  EXPECT_EQ(records->size(), 252u);
  auto shared = std::make_shared<const std::vector<DatasetRecord>>(*records);
  auto source = MakeSource(shared, {.shuffle = true}, 5);
  std::multiset<std::string> played, held;
  for (const DatasetRecord& record : *records) {
    held.insert(record.turns[0][0].content);
    played.insert(source->Next()->turns[0].messages[0].content);
  }
  EXPECT_EQ(played, held);  // every one once before any comes again
}

TEST(WorkloadTest, RandomPromptsShareNothing) {
  auto source = MakeSource(RandomWorkload{LengthSpec::Fixed(50), LengthSpec::Fixed(3)}, 1);
  std::set<uint64_t> seeds;
  for (int i = 0; i < 1000; ++i) seeds.insert(source->Next()->turns[0].pieces[0].seed);
  EXPECT_EQ(seeds.size(), 1000u);
}

TEST(WorkloadTest, SharedPrefixesAreDrawnEvenly) {
  auto source = MakeSource(SharedPrefixWorkload{4, 100, LengthSpec::Fixed(10), LengthSpec::Fixed(3)}, 2);
  std::map<uint64_t, int> groups;
  std::set<uint64_t> suffixes;
  for (int i = 0; i < 4000; ++i) {
    const Turn turn = source->Next()->turns[0];
    ASSERT_EQ(turn.pieces.size(), 2u);
    EXPECT_EQ(turn.pieces[0].tokens, 100u);
    ++groups[turn.pieces[0].seed];
    suffixes.insert(turn.pieces[1].seed);
  }
  EXPECT_EQ(groups.size(), 4u);
  for (const auto& [seed, count] : groups) EXPECT_NEAR(count, 1000, 120);
  EXPECT_EQ(suffixes.size(), 4000u);
}

TEST(WorkloadTest, OtherSeedsGiveOtherPrefixes) {
  const SharedPrefixWorkload workload{1, 100, LengthSpec::Fixed(10), LengthSpec::Fixed(3)};
  EXPECT_NE(MakeSource(workload, 1)->Next()->turns[0].pieces[0].seed,
            MakeSource(workload, 2)->Next()->turns[0].pieces[0].seed);
}

TEST(PromptWriterTest, WritesAboutTheTokensAskedFor) {
  const auto writer = PromptWriter::Words(2, 6);
  const std::vector<PromptPiece> pieces = {{1, 100}, {2, 50}};
  const std::string text = writer.Text(pieces, true);
  EXPECT_EQ(std::count(text.begin(), text.end(), ' ') + 1, 50 + 22);  // 100 / 2, and (50 - 6) / 2
  const std::string later = writer.Text(pieces, false);
  EXPECT_EQ(std::count(later.begin(), later.end(), ' ') + 1, 75);
  EXPECT_TRUE(later.starts_with(text.substr(0, text.rfind(' '))));
  EXPECT_EQ(writer.Text({{{1, 1}}}, true), writer.Text({{{1, 2}}}, true));  // never nothing
}

TEST(PromptWriterTest, DrawsIdsFromTheirRange) {
  const auto ids = PromptWriter::Ids(100, 103).Tokens(std::vector<PromptPiece>{{5, 3000}});
  EXPECT_EQ(ids.size(), 3000u);
  EXPECT_EQ(std::set<int32_t>(ids.begin(), ids.end()), (std::set<int32_t>{100, 101, 102}));
}

TEST(RequestBodyTest, CarriesTheConversation) {
  RequestShape shape;
  shape.model = "m";
  shape.chat = true;
  shape.ignore_eos = true;
  shape.extra = {{"top_k", 1}, {"max_tokens", 3}};
  Turn turn;
  turn.messages = {{"user", "second"}};
  turn.output_tokens = 9;
  const auto body =
      nlohmann::json::parse(RequestBody(shape, {{"user", "first"}, {"assistant", "a\"b"}}, turn));
  ASSERT_EQ(body["messages"].size(), 3u);
  EXPECT_EQ(body["messages"][1]["content"], "a\"b");
  EXPECT_EQ(body["messages"][2]["content"], "second");
  EXPECT_EQ(body["max_tokens"], 3);  // the extra body wins
  EXPECT_EQ(body["top_k"], 1);
  EXPECT_EQ(body["ignore_eos"], true);
  EXPECT_EQ(body["stream"], true);
  EXPECT_EQ(body["stream_options"]["include_usage"], true);
  shape.chat = false;
  EXPECT_EQ(nlohmann::json::parse(RequestBody(shape, {{"user", "first"}}, turn))["prompt"], "first\nsecond");
}

}  // namespace
}  // namespace tidepool
