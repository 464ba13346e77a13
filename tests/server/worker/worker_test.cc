// Real workers, real gRPC and UCX, in one process, around a scheduler that only listens.
#include "server/worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>
#include <thread>

#include "server/rpc/rpc.h"
#include "server/structured/grammar_builder.h"
#include "server/worker/constraint_factory.h"
#include "tests/server/model/tiny_model.h"
#include "tidepool/v1/cluster.grpc.pb.h"

namespace tidepool {
namespace {

using ::testing::HasSubstr;

constexpr char kToken[] = "cluster-secret";

// The smallest tokenizer.json that loads: the worker wants its digest, and what its tokens spell for
// grammars.
constexpr char kTokenizer[] = R"({"version":"1.0","added_tokens":[],"normalizer":null,
  "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
  "post_processor":null,"decoder":{"type":"ByteLevel"},
  "model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]}})";

// A model directory.
class ServedModel {
 public:
  ServedModel() {
    model_.Write(dir_.path());
    WriteFile(dir_.File("tokenizer.json"), kTokenizer);
  }
  std::string dir() const { return dir_.path(); }
  uint32_t vocab() const { return static_cast<uint32_t>(model_.vocab); }
  // Of float32 KV.
  uint64_t block_bytes(uint32_t block_tokens) const {
    return uint64_t{4} * model_.layers * 2 * model_.kv_heads * model_.head_dim * block_tokens;
  }

 private:
  TempDir dir_;
  TinyModel model_;
};

// Remembers what workers report; accepts everybody.
class ListeningScheduler final : public v1::Scheduler::Service {
 public:
  grpc::Status Report(grpc::ServerContext* rpc, const v1::WorkerReport* report, v1::ReportReply*) override {
    if (absl::Status s = CheckClusterToken(*rpc, kToken); !s.ok()) return ToGrpc(s);
    std::lock_guard lock(mu_);
    addresses_[report->address().worker_id()] = report->address();
    last_[report->address().worker_id()] = *report;
    return grpc::Status::OK;
  }
  // Until the last report of `id` is as `holds` wants it.
  bool WaitFor(const std::string& id, const std::function<bool(const v1::WorkerReport&)>& holds) {
    for (int i = 0; i < 6000; ++i) {
      {
        std::lock_guard lock(mu_);
        if (auto it = last_.find(id); it != last_.end() && holds(it->second)) return true;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return false;
  }
  void Forget() {
    std::lock_guard lock(mu_);
    addresses_.clear();
  }
  v1::WorkerAddress AddressOf(const std::string& id) {
    for (int i = 0; i < 1000; ++i) {
      {
        std::lock_guard lock(mu_);
        if (auto it = addresses_.find(id); it != addresses_.end()) return it->second;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ADD_FAILURE() << id << " never reported";
    return {};
  }

 private:
  std::mutex mu_;
  std::map<std::string, v1::WorkerAddress> addresses_;
  std::map<std::string, v1::WorkerReport> last_;
};

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<v1::PromptLogprob> prompt_logprobs;
  std::string finish_reason;
  v1::RequestPath path;
  std::vector<float> embedding;
  grpc::Status status;
};

// CompiledGrammar::bytes() of a regular expression.
std::string Grammar(std::string_view regex) {
  GrammarBuilder builder;
  auto node = builder.Regex(regex);
  EXPECT_TRUE(node.ok()) << node.status();
  auto grammar = builder.Build(*node);
  EXPECT_TRUE(grammar.ok()) << grammar.status();
  return (*grammar)->bytes();
}

class WorkerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto rpc = StartRpcServer("127.0.0.1:0", &scheduler_);
    ASSERT_TRUE(rpc.ok()) << rpc.status();
    scheduler_rpc_ = std::move(rpc).value();
  }

  Config MakeConfig(const std::string& role, const std::string& id) {
    Config config;
    config.model.path = model_.dir();
    config.engine.threads = 1;
    config.engine.max_step_tokens = 32;  // chunks smaller than the prompts here
    config.engine.batch_invariant = true;
    config.kv.block_tokens = 16;
    config.kv.host_bytes = 4 << 20;
    config.kv.load = "always";  // such a model computes anything faster than a fetch begins
    config.transport.share_arena = false;
    config.worker.role = role;
    config.worker.id = id;
    config.worker.report_interval = absl::Milliseconds(20);
    config.cluster.scheduler = "127.0.0.1:" + std::to_string(scheduler_rpc_.port);
    config.cluster.token = kToken;
    return config;
  }

  WorkerServer& StartWorker(const Config& config) {
    metrics_.push_back(std::make_unique<MetricRegistry>());
    auto worker = WorkerServer::Start(config, *metrics_.back());
    EXPECT_TRUE(worker.ok()) << worker.status();
    workers_.push_back(std::move(worker).value());
    return *workers_.back();
  }
  WorkerServer& StartWorker(const std::string& role, const std::string& id) {
    return StartWorker(MakeConfig(role, id));
  }

  std::unique_ptr<v1::Worker::Stub> StubOf(const std::string& id) {
    return v1::Worker::NewStub(channels_.Get(scheduler_.AddressOf(id).grpc()));
  }

  v1::DescribeReply Describe(const std::string& id) {
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    v1::DescribeReply reply;
    const grpc::Status status = StubOf(id)->Describe(&context, {}, &reply);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return reply;
  }

  v1::WorkerGenerateRequest MakeRequest(std::vector<int32_t> prompt, uint32_t max_tokens) {
    v1::WorkerGenerateRequest request;
    request.set_request_id("r" + std::to_string(next_id_++));
    request.set_salt("tenant");
    request.mutable_prompt()->Assign(prompt.begin(), prompt.end());
    request.set_max_tokens(max_tokens);
    request.mutable_sampling()->set_temperature(0);
    request.mutable_sampling()->set_top_p(1);
    return request;
  }

  // A prompt of pseudo-random tokens.
  std::vector<int32_t> Prompt(size_t n, uint64_t seed) {
    Rng rng(seed);
    std::vector<int32_t> out(n);
    for (int32_t& t : out) t = static_cast<int32_t>(rng.Below(model_.vocab()));
    return out;
  }

  Answer Ask(const std::string& worker, const v1::WorkerGenerateRequest& request) {
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    SetTimeout(context, absl::Seconds(60));
    auto stub = StubOf(worker);
    auto reader = stub->Generate(&context, request);
    Answer answer;
    v1::WorkerGenerateEvent event;
    while (reader->Read(&event)) {
      for (const auto& score : event.prompt_logprobs()) {
        EXPECT_TRUE(answer.tokens.empty()) << "the prompt's logprobs come first";
        answer.prompt_logprobs.push_back(score);
      }
      for (const auto& token : event.tokens()) {
        EXPECT_EQ(token.index(), request.emitted_tokens() + answer.tokens.size()) << "indices are contiguous";
        answer.tokens.push_back(token.id());
        answer.logprobs.push_back(token.logprob());
      }
      if (!event.finish_reason().empty()) answer.finish_reason = event.finish_reason();
      if (event.has_path()) answer.path = event.path();
      answer.embedding.assign(event.embedding().begin(), event.embedding().end());
    }
    answer.status = reader->Finish();
    return answer;
  }

  // All slots, leases, offers and queues of `id` are back where an idle worker has them.
  void ExpectIdle(const std::string& id) {
    v1::DescribeReply now;
    for (int i = 0; i < 500; ++i) {
      now = Describe(id);
      if (now.slots_leased() == 0 && now.offers() == 0 && now.running() == 0 && now.waiting() == 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(now.slots_leased(), 0u) << id;
    EXPECT_EQ(now.offers(), 0u) << id;
    EXPECT_EQ(now.running(), 0u) << id;
    EXPECT_EQ(now.waiting(), 0u) << id;
    EXPECT_EQ(now.slots_free(), now.slots_total()) << id;
    EXPECT_EQ(now.slots_quarantined(), 0u) << id;
  }

  ServedModel model_;
  ListeningScheduler scheduler_;
  RpcServer scheduler_rpc_;
  ChannelCache channels_;
  std::vector<std::unique_ptr<MetricRegistry>> metrics_;
  std::vector<std::unique_ptr<WorkerServer>> workers_;
  int next_id_ = 0;
};

TEST_F(WorkerTest, DisaggregatedAnswerEqualsAggregated) {
  StartWorker("both", "alone");
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  // Shorter than a block, exactly one, exactly two, with a tail, and of several chunks.
  for (const size_t n : {5, 16, 32, 33, 47, 100}) {
    auto request = MakeRequest(Prompt(n, n), 24);
    const Answer aggregated = Ask("alone", request);
    ASSERT_TRUE(aggregated.status.ok()) << aggregated.status.error_message();
    EXPECT_EQ(aggregated.path.prefill_worker(), "alone");
    *request.mutable_prefill() = scheduler_.AddressOf("p");
    const Answer split = Ask("d", request);
    ASSERT_TRUE(split.status.ok()) << split.status.error_message();
    EXPECT_EQ(split.tokens, aggregated.tokens) << "prompt of " << n;
    EXPECT_EQ(split.tokens.size(), 24u);
    EXPECT_EQ(split.finish_reason, "length");
    if (n > 16) {
      EXPECT_EQ(split.path.prefill_worker(), "p");
      EXPECT_EQ(split.path.decode_worker(), "d");
      EXPECT_EQ(split.path.fetched_blocks(), (n + 15) / 16) << "sealed blocks and the tail";
      EXPECT_EQ(split.path.fetched_bytes(), split.path.fetched_blocks() * model_.block_bytes(16));
      EXPECT_EQ(split.path.transport(), "ucx");
    }
  }
  for (const char* id : {"alone", "p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, OnOneHostBlocksAreReadWhereTheyWereComputed) {
  for (const auto& [role, id] : std::vector<std::pair<std::string, std::string>>{
           {"both", "alone"}, {"prefill", "p"}, {"decode", "d"}}) {
    Config config = MakeConfig(role, id);
    config.transport.share_arena = true;
    StartWorker(config);
  }
  for (const size_t n : {17, 32, 47, 100, 100}) {  // the last time, the prompt's blocks are there already
    auto request = MakeRequest(Prompt(n, n), 24);
    const Answer aggregated = Ask("alone", request);
    ASSERT_TRUE(aggregated.status.ok()) << aggregated.status.error_message();
    *request.mutable_prefill() = scheduler_.AddressOf("p");
    const Answer split = Ask("d", request);
    ASSERT_TRUE(split.status.ok()) << split.status.error_message();
    EXPECT_EQ(split.tokens, aggregated.tokens) << "prompt of " << n;
    EXPECT_EQ(split.path.fetched_blocks(), (n + 15) / 16) << "sealed blocks and the tail";
    EXPECT_EQ(split.path.transport(), "arena");
  }
  for (const char* id : {"alone", "p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, SampledAnswerDoesNotDependOnWhoPrefills) {
  StartWorker("both", "alone");
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  auto request = MakeRequest(Prompt(50, 1), 30);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(77);
  const Answer aggregated = Ask("alone", request);
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  EXPECT_EQ(Ask("d", request).tokens, aggregated.tokens);
}

// Whatever changes the draw changes the first token on the prefill worker as it would on the decode worker,
// and the later ones on the decode worker as if it had drawn the first.
TEST_F(WorkerTest, EveryParameterDrawsAlikeWhoeverPrefills) {
  StartWorker("both", "alone");
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  const std::vector<int32_t> prompt = Prompt(50, 1);
  const auto plain = Ask("alone", MakeRequest(prompt, 30)).tokens;
  const std::vector<std::function<void(v1::Sampling&)>> cases = {
      [&](v1::Sampling& s) { s.set_repetition_penalty(1.8f); },
      [&](v1::Sampling& s) { s.set_presence_penalty(2); },
      [&](v1::Sampling& s) { s.set_frequency_penalty(2); },
      [&](v1::Sampling& s) {
        auto& bias = *s.add_logit_bias();
        bias.set_id(plain[0]);
        bias.set_bias(-100);
      },
      [&](v1::Sampling& s) { s.add_bad_words()->add_ids(plain[0]); },
      [&](v1::Sampling& s) {
        // Completed by the second token: the decode worker has to know the first.
        auto& word = *s.add_bad_words();
        word.add_ids(plain[0]);
        word.add_ids(plain[1]);
      },
      [&](v1::Sampling& s) {
        for (int32_t id = 0; id < 9; ++id) s.add_allowed_token_ids(id);
      },
      [&](v1::Sampling& s) {
        s.add_stop_token_ids(plain[0]);
        s.set_min_tokens(10);
      },
      [&](v1::Sampling& s) {
        s.set_temperature(1.1f);
        s.set_typical_p(0.7f);
        s.set_min_p(0.01f);
        s.set_repetition_penalty(1.2f);
        s.set_seed(5);
        s.set_top_logprobs(4);
      },
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    auto request = MakeRequest(prompt, 30);
    request.set_salt("case " + std::to_string(i));  // so that the prompt is prefilled again
    cases[i](*request.mutable_sampling());
    const Answer aggregated = Ask("alone", request);
    ASSERT_TRUE(aggregated.status.ok()) << aggregated.status.error_message();
    EXPECT_NE(aggregated.tokens, plain) << "case " << i << " changes something";
    *request.mutable_prefill() = scheduler_.AddressOf("p");
    const Answer split = Ask("d", request);
    EXPECT_EQ(split.path.prefill_worker(), "p");
    EXPECT_EQ(split.tokens, aggregated.tokens) << "case " << i;
    EXPECT_EQ(split.logprobs, aggregated.logprobs) << "case " << i;
  }
}

TEST_F(WorkerTest, StructuredAnswerMatchesItsGrammarWhoeverPrefills) {
  StartWorker("both", "alone");
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  // Token 0 spells a, token 1 b.
  for (const float temperature : {0.0f, 1.0f}) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      auto request = MakeRequest(Prompt(50, seed), 30);
      request.set_salt("case " + std::to_string(seed) + " " + std::to_string(temperature));
      v1::Sampling& sampling = *request.mutable_sampling();
      sampling.set_temperature(temperature);
      sampling.set_seed(seed);
      sampling.set_grammar(Grammar("[ab]{3}(aab|bba)"));
      sampling.add_stop_token_ids(9);
      const Answer aggregated = Ask("alone", request);
      ASSERT_TRUE(aggregated.status.ok()) << aggregated.status.error_message();
      EXPECT_EQ(aggregated.finish_reason, "stop") << "complete: nothing more can follow";
      ASSERT_EQ(aggregated.tokens.size(), 6u);
      std::string text;
      for (int32_t id : aggregated.tokens) text += id == 0 ? 'a' : id == 1 ? 'b' : '?';
      EXPECT_THAT(text, ::testing::MatchesRegex("[ab][ab][ab](aab|bba)"));
      *request.mutable_prefill() = scheduler_.AddressOf("p");
      const Answer split = Ask("d", request);
      ASSERT_TRUE(split.status.ok()) << split.status.error_message();
      EXPECT_EQ(split.path.prefill_worker(), "p") << "its first token is drawn there";
      EXPECT_EQ(split.tokens, aggregated.tokens);
      EXPECT_EQ(split.finish_reason, "stop");
    }
  }
  for (const char* id : {"alone", "p", "d"}) ExpectIdle(id);
  const std::string text = metrics_[0]->Render();
  EXPECT_THAT(text,
              HasSubstr(R"(tidepool_worker_structured_cache_events_total{cache="grammar",event="miss"} 8)"))
      << "one tenant's grammars are not found by another";
}

// What a gateway asks after a decode worker has died in the middle: wherever that was, whatever decides the
// draws and whoever prefills, the answer goes on as if nothing had happened.
TEST_F(WorkerTest, AnAnswerGoesOnBehindWhatAnEarlierAttemptHasEmitted) {
  StartWorker("both", "alone");
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  const std::vector<std::function<void(v1::WorkerGenerateRequest&)>> cases = {
      [](v1::WorkerGenerateRequest&) {},
      [](v1::WorkerGenerateRequest& r) {
        r.mutable_sampling()->set_temperature(1);
        r.mutable_sampling()->set_seed(7);
      },
      [](v1::WorkerGenerateRequest& r) {
        r.mutable_sampling()->set_repetition_penalty(1.8f);
        r.mutable_sampling()->set_frequency_penalty(0.7f);
        r.mutable_sampling()->set_presence_penalty(0.7f);
      },
      [](v1::WorkerGenerateRequest& r) {
        r.mutable_sampling()->set_temperature(1);
        r.mutable_sampling()->set_seed(3);
        r.mutable_sampling()->set_top_logprobs(2);
        for (int32_t id = 0; id < 40; ++id) {
          auto& word = *r.mutable_sampling()->add_bad_words();
          word.add_ids(id);
          word.add_ids(id + 1);
        }
      },
      [](v1::WorkerGenerateRequest& r) {
        r.mutable_sampling()->set_temperature(1);
        r.mutable_sampling()->set_seed(5);
        r.mutable_sampling()->set_min_tokens(20);
        for (int32_t id = 0; id < 60; ++id) r.mutable_sampling()->add_stop_token_ids(id);
      },
      [](v1::WorkerGenerateRequest& r) {
        r.mutable_sampling()->set_temperature(1);
        r.mutable_sampling()->set_seed(9);
        r.mutable_sampling()->set_grammar(Grammar("[ab]{18}(aab|bba)"));
      },
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    auto request = MakeRequest(Prompt(50, i), 30);
    cases[i](request);
    const Answer whole = Ask("alone", request);
    ASSERT_TRUE(whole.status.ok()) << whole.status.error_message();
    ASSERT_GE(whole.tokens.size(), 20u) << "case " << i;
    for (const size_t cut :
         {size_t{1}, size_t{14}, size_t{19}, whole.tokens.size() - 1, whole.tokens.size()}) {
      for (const bool split : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << "case " << i << ", " << cut << " emitted" << (split ? ", split" : ""));
        auto rest = request;
        rest.set_request_id("again" + std::to_string(next_id_++));
        rest.set_attempt(2);
        rest.mutable_prompt()->Add(whole.tokens.begin(),
                                   whole.tokens.begin() + static_cast<std::ptrdiff_t>(cut));
        rest.set_emitted_tokens(static_cast<uint32_t>(cut));
        if (split) *rest.mutable_prefill() = scheduler_.AddressOf("p");
        const Answer more = Ask(split ? "d" : "alone", rest);
        ASSERT_TRUE(more.status.ok()) << more.status.error_message();
        EXPECT_EQ(more.tokens,
                  std::vector(whole.tokens.begin() + static_cast<std::ptrdiff_t>(cut), whole.tokens.end()));
        EXPECT_EQ(more.finish_reason, whole.finish_reason);
      }
    }
  }
  for (const char* id : {"alone", "p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, EmittedTokensThatCannotBeAreRefusedByName) {
  StartWorker("both", "alone");
  auto request = MakeRequest(Prompt(20, 1), 8);
  const auto message = [&] { return Ask("alone", request).status.error_message(); };
  request.set_emitted_tokens(20);
  EXPECT_THAT(message(), HasSubstr("emitted_tokens is 20"));
  request.set_emitted_tokens(9);
  EXPECT_THAT(message(), HasSubstr("at most max_tokens, 8"));
  request.set_emitted_tokens(4);
  request.set_prompt_logprobs(0);
  EXPECT_THAT(message(), HasSubstr("prompt_logprobs"));
  request.clear_prompt_logprobs();
  request.mutable_sampling()->set_grammar(Grammar("zzzz"));
  EXPECT_THAT(message(), HasSubstr("emitted_tokens do not follow"));
}

TEST_F(WorkerTest, GrammarThatEndsBeforeItsFirstTokenIsAnEmptyAnswer) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  auto request = MakeRequest(Prompt(50, 1), 30);
  request.mutable_sampling()->set_grammar(Grammar(""));
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  const Answer answer = Ask("d", request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.finish_reason, "stop");
  EXPECT_TRUE(answer.tokens.empty());
  for (const char* id : {"p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, GrammarThatIsNoneIsRefusedBeforeAnythingIsComputed) {
  StartWorker("both", "d");
  const std::string good = Grammar("[ab]{3}");
  std::string damaged = good;
  damaged[damaged.size() / 2] ^= 1;
  for (const std::string& bad :
       {std::string("x"), damaged, std::string(ConstraintFactory::kGrammarBytesMax + 1, 'x')}) {
    auto request = MakeRequest(Prompt(20, 1), 8);
    request.mutable_sampling()->set_grammar(bad);
    const Answer answer = Ask("d", request);
    EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(answer.status.error_message(), HasSubstr("sampling.grammar"));
    EXPECT_TRUE(answer.tokens.empty());
  }
  // One that the vocabulary cannot spell fails by itself.
  auto stuck = MakeRequest(Prompt(20, 1), 8);
  stuck.mutable_sampling()->set_grammar(Grammar("ab1"));
  const Answer answer = Ask("d", stuck);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION)
      << answer.status.error_message();
  EXPECT_TRUE(Ask("d", MakeRequest(Prompt(20, 1), 8)).status.ok());
  ExpectIdle("d");
}

TEST_F(WorkerTest, PooledPromptIsOneVectorWhoeverShouldPrefill) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  auto request = MakeRequest(Prompt(70, 3), 0);
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  std::map<v1::Pooling, std::vector<float>> vectors;
  for (const v1::Pooling pooling : {v1::POOLING_LAST, v1::POOLING_MEAN, v1::POOLING_LAST}) {
    request.set_request_id("pooled " + std::to_string(next_id_++));
    request.set_pooling(pooling);
    const Answer answer = Ask("d", request);
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.finish_reason, "pooled");
    EXPECT_TRUE(answer.tokens.empty());
    EXPECT_EQ(answer.path.prefill_worker(), "d");
    EXPECT_EQ(answer.path.cached_tokens(), vectors.size() < 2 ? 0u : 64u)
        << "the last one's needs its own token computed; the mean all of them";
    const auto [seen, fresh] = vectors.emplace(pooling, answer.embedding);
    EXPECT_EQ(seen->second, answer.embedding) << "reuse of blocks changes nothing";
    ASSERT_FALSE(answer.embedding.empty());
  }
  EXPECT_NE(vectors[v1::POOLING_LAST], vectors[v1::POOLING_MEAN]);

  request.set_request_id("unit");
  request.set_normalize(true);
  const Answer unit = Ask("d", request);
  double squares = 0;
  for (float x : unit.embedding) squares += double{x} * x;
  EXPECT_NEAR(squares, 1, 1e-6);

  request.set_request_id("with an answer");
  request.set_max_tokens(3);
  EXPECT_EQ(Ask("d", request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_request_id("scored");
  request.set_max_tokens(0);
  request.set_prompt_logprobs(1);
  EXPECT_EQ(Ask("d", request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  for (const char* id : {"p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, BatchRequestLeavesAQuarterOfThePoolToOnlineOnes) {
  Config config = MakeConfig("both", "d");
  config.model.max_model_len = 256;
  config.kv.host_bytes = 20 * model_.block_bytes(16);
  StartWorker(config);
  ASSERT_EQ(Describe("d").slots_total(), 20u);
  // Of 10 blocks, which leave more than the reserve of 5.
  auto batch = MakeRequest(Prompt(30, 2), 130);
  batch.set_request_class(v1::REQUEST_CLASS_BATCH);
  const Answer answer = Ask("d", batch);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tokens.size(), 130u);
  // One that takes more than three quarters runs once it is alone.
  auto large = MakeRequest(Prompt(30, 3), 220);
  large.set_request_class(v1::REQUEST_CLASS_BATCH);
  EXPECT_EQ(Ask("d", large).tokens.size(), 220u);
  ExpectIdle("d");
}

TEST_F(WorkerTest, PromptLogprobsAreComputedOnTheDecodeWorkerWhoeverShouldPrefill) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  const std::vector<int32_t> prompt = Prompt(70, 3);
  auto request = MakeRequest(prompt, 5);
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  const Answer plain = Ask("d", request);
  ASSERT_TRUE(plain.status.ok()) << plain.status.error_message();
  request.set_request_id("scored");
  request.set_prompt_logprobs(3);
  const Answer scored = Ask("d", request);
  ASSERT_TRUE(scored.status.ok()) << scored.status.error_message();
  EXPECT_EQ(scored.tokens, plain.tokens);
  EXPECT_EQ(scored.path.prefill_worker(), "d");
  EXPECT_EQ(scored.path.cached_tokens(), 0u) << "logits of blocks from the pool are nowhere";
  ASSERT_EQ(scored.prompt_logprobs.size(), prompt.size() - 1);

  // Each is what the answer's own logprobs say when the prompt ends right before it.
  for (const size_t at : {size_t{1}, size_t{16}, size_t{33}, prompt.size() - 1}) {
    auto shorter = MakeRequest({prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(at)}, 1);
    shorter.mutable_sampling()->set_top_logprobs(0);
    shorter.mutable_sampling()->add_allowed_token_ids(prompt[at]);  // forces the draw, not its logprob
    const Answer next = Ask("d", shorter);
    ASSERT_EQ(next.tokens, std::vector<int32_t>{prompt[at]});
    EXPECT_EQ(scored.prompt_logprobs[at - 1].logprob(), next.logprobs[0]) << at;
    EXPECT_EQ(scored.prompt_logprobs[at - 1].top_size(), 3);
  }
  request.set_request_id("too many");
  request.set_prompt_logprobs(21);
  EXPECT_EQ(Ask("d", request).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  for (const char* id : {"p", "d"}) ExpectIdle(id);
}

TEST_F(WorkerTest, SecondTurnReusesPromptAndAnswer) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  StartWorker("both", "cold");
  auto first = MakeRequest(Prompt(40, 3), 24);
  *first.mutable_prefill() = scheduler_.AddressOf("p");
  const Answer one = Ask("d", first);
  ASSERT_TRUE(one.status.ok()) << one.status.error_message();

  std::vector<int32_t> conversation(first.prompt().begin(), first.prompt().end());
  conversation.insert(conversation.end(), one.tokens.begin(), one.tokens.end());
  const auto question = Prompt(20, 4);
  conversation.insert(conversation.end(), question.begin(), question.end());
  auto second = MakeRequest(conversation, 16);
  const Answer reference = Ask("cold", second);
  EXPECT_EQ(reference.path.cached_tokens(), 0u);

  second.set_request_id("second-here");
  const Answer here = Ask("d", second);
  EXPECT_EQ(here.tokens, reference.tokens) << "reuse must not change the answer";
  EXPECT_EQ(here.path.cached_tokens(), 48u) << "63 tokens have KV; three whole blocks of them";

  // On a worker that never saw the conversation, through its holder.
  StartWorker("both", "other");
  second.set_request_id("second-there");
  auto* holder = second.add_holders();
  *holder->mutable_worker() = scheduler_.AddressOf("d");
  holder->set_end(3);
  const Answer there = Ask("other", second);
  EXPECT_EQ(there.tokens, reference.tokens);
  EXPECT_EQ(there.path.cached_tokens(), 48u);
  EXPECT_EQ(there.path.fetched_blocks(), 3u);
}

TEST_F(WorkerTest, OnOneHostTheHandoffIsReadInPlace) {
  StartWorker("both", "alone");
  for (const auto& [role, id] : {std::pair("prefill", "p"), std::pair("decode", "d")}) {
    Config config = MakeConfig(role, id);
    config.transport.share_arena = true;
    StartWorker(config);
  }
  for (const size_t n : {33, 47, 100}) {
    auto request = MakeRequest(Prompt(n, n), 24);
    const Answer aggregated = Ask("alone", request);
    *request.mutable_prefill() = scheduler_.AddressOf("p");
    const Answer split = Ask("d", request);
    ASSERT_TRUE(split.status.ok()) << split.status.error_message();
    EXPECT_EQ(split.tokens, aggregated.tokens) << "prompt of " << n;
    EXPECT_EQ(split.path.prefill_worker(), "p");
    EXPECT_EQ(split.path.fetched_blocks(), (n + 15) / 16);
    EXPECT_EQ(split.path.transport(), "arena");
    // And again, with what is here and there.
    request.set_request_id("again " + std::to_string(n));
    EXPECT_EQ(Ask("d", request).tokens, aggregated.tokens);
  }
  for (const char* id : {"alone", "p", "d"}) ExpectIdle(id);
}

// The last chunk is sent as it is computed, or as a whole: the same answer, with and without an earlier
// chunk, a tail, and blocks that the decode worker has.
TEST_F(WorkerTest, StreamedLayersGiveTheSameAnswer) {
  StartWorker("both", "alone");
  StartWorker("decode", "d");
  for (const bool streaming : {true, false}) {
    Config config = MakeConfig("prefill", streaming ? "streaming" : "whole");
    config.transport.layer_streaming = streaming;
    StartWorker(config);
  }
  for (const size_t n : {17, 20, 32, 33, 48, 100}) {
    for (const std::string prefill : {"streaming", "whole"}) {
      auto request = MakeRequest(Prompt(n, 1000 + n), 12);
      request.set_salt("salt " + prefill);
      const Answer reference = Ask("alone", request);
      *request.mutable_prefill() = scheduler_.AddressOf(prefill);
      const Answer answer = Ask("d", request);
      ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
      EXPECT_EQ(answer.tokens, reference.tokens) << n << " by " << prefill;
      EXPECT_EQ(answer.path.prefill_worker(), prefill);
      EXPECT_EQ(answer.path.fetched_blocks(), (n + 15) / 16);
      // The next turn: a longer prompt whose beginning the decode worker has.
      auto longer = MakeRequest(Prompt(n, 1000 + n), 12);
      for (int32_t id : Prompt(40, 7)) longer.add_prompt(id);
      longer.set_salt(request.salt());
      const Answer again = Ask("alone", longer);
      *longer.mutable_prefill() = scheduler_.AddressOf(prefill);
      longer.set_request_id(longer.request_id() + "-split");
      EXPECT_EQ(Ask("d", longer).tokens, again.tokens) << n << " by " << prefill;
    }
  }
  for (const char* id : {"alone", "streaming", "whole", "d"}) ExpectIdle(id);
}

class WorkerDiskTest : public WorkerTest {
 protected:
  Config MakeDiskConfig(const std::string& role, const std::string& id) {
    Config config = MakeConfig(role, id);
    config.kv.disk.path = dir_.path();
    config.kv.disk.bytes = 4 << 20;
    return config;
  }
  // Shuts the youngest worker down, as SIGTERM does.
  void StopLast() {
    workers_.back()->Shutdown(absl::Seconds(30));
    workers_.pop_back();
    scheduler_.Forget();
  }
  // Until the disk tier of the youngest worker has read what it holds.
  void WaitDisk(size_t blocks) {
    Gauge& objects = metrics_.back()->AddGauge("tidepool_pool_objects", "", {{"tier", "disk"}});
    for (int i = 0; i < 3000; ++i) {
      metrics_.back()->Render();  // runs what sets it
      if (objects.value() >= static_cast<double>(blocks)) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ADD_FAILURE() << "fewer than " << blocks << " blocks on the disk: " << objects.value();
  }
  TempDir dir_;
};

TEST_F(WorkerDiskTest, ARestartedWorkerAnswersFromItsDisk) {
  StartWorker(MakeDiskConfig("both", "w"));
  auto request = MakeRequest(Prompt(100, 1), 24);
  const Answer first = Ask("w", request);
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  EXPECT_EQ(first.path.cached_tokens(), 0u);
  StopLast();

  StartWorker(MakeDiskConfig("both", "w2"));  // another id is another directory
  request.set_request_id("elsewhere");
  EXPECT_EQ(Ask("w2", request).path.cached_tokens(), 0u);
  StopLast();

  StartWorker(MakeDiskConfig("both", "w"));
  WaitDisk(7);
  request.set_request_id("again");
  const Answer again = Ask("w", request);
  ASSERT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_EQ(again.tokens, first.tokens);
  EXPECT_EQ(again.path.cached_tokens(), 96u);
  EXPECT_EQ(again.path.cached_disk_tokens(), 96u);
  // The answer's blocks, too: 123 tokens have KV.
  auto next = MakeRequest(Prompt(100, 1), 8);
  for (int32_t id : first.tokens) next.add_prompt(id);
  next.add_prompt(1);
  const Answer turn = Ask("w", next);
  EXPECT_EQ(turn.path.cached_tokens(), 112u);
  // Another tenant's prompt is another prompt.
  request.set_request_id("other");
  request.set_salt("another tenant");
  EXPECT_EQ(Ask("w", request).path.cached_tokens(), 0u);
  ExpectIdle("w");
}

TEST_F(WorkerDiskTest, APeersDiskServesThePrefill) {
  StartWorker(MakeDiskConfig("both", "w"));
  auto request = MakeRequest(Prompt(100, 1), 24);
  const Answer first = Ask("w", request);
  StopLast();
  StartWorker(MakeDiskConfig("both", "w"));
  WaitDisk(7);
  StartWorker("both", "other");
  request.set_request_id("there");
  auto* holder = request.add_holders();
  *holder->mutable_worker() = scheduler_.AddressOf("w");
  holder->set_end(6);
  holder->set_tier(v1::KV_TIER_DISK);
  const Answer there = Ask("other", request);
  EXPECT_EQ(there.tokens, first.tokens);
  EXPECT_EQ(there.path.cached_tokens(), 96u);
  EXPECT_EQ(there.path.cached_disk_tokens(), 96u);
  EXPECT_EQ(there.path.fetched_blocks(), 6u);
  for (const char* id : {"w", "other"}) ExpectIdle(id);
}

TEST_F(WorkerDiskTest, AHolderThatIsGoneCostsTimeOnly) {
  StartWorker("both", "alone");
  StartWorker("both", "gone");
  auto request = MakeRequest(Prompt(100, 1), 8);
  const Answer reference = Ask("alone", request);
  auto* holder = request.add_holders();
  *holder->mutable_worker() = scheduler_.AddressOf("gone");
  holder->set_end(6);
  StopLast();
  StartWorker(MakeDiskConfig("both", "w"));
  request.set_request_id("there");
  const Answer answer = Ask("w", request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tokens, reference.tokens);
  EXPECT_EQ(answer.path.cached_tokens(), 0u);
  ExpectIdle("w");
}

// Requests that are given up at any moment, of prefills near and far, with loads from disk and peers on their
// way. TIDEPOOL_ABORT_REQUESTS says how many.
TEST_F(WorkerDiskTest, AbortsAtEveryStateLeakNothing) {
  const char* wanted = std::getenv("TIDEPOOL_ABORT_REQUESTS");
  const int requests = wanted == nullptr ? 300 : std::atoi(wanted);
  Config prefill = MakeDiskConfig("prefill", "p"), decode = MakeDiskConfig("decode", "d");
  decode.transport.share_arena = prefill.transport.share_arena = true;
  StartWorker(prefill);
  StartWorker(decode);
  StartWorker(MakeDiskConfig("both", "far"));  // which does not share its memory
  std::atomic<int> next{0};
  std::atomic<int> answered{0}, cancelled{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < 6; ++c) {
    clients.emplace_back([&, c] {
      Rng rng(static_cast<uint64_t>(c));
      auto decode_stub = StubOf("d"), far_stub = StubOf("far");
      for (int i = next++; i < requests; i = next++) {
        v1::WorkerGenerateRequest request;
        request.set_request_id("abort " + std::to_string(i));
        request.set_salt("tenant");
        // One of a few prompts, so that there is something to be loaded, with an end of its own.
        const auto prompt = Prompt(60 + rng.Below(60), rng.Below(8));
        request.mutable_prompt()->Assign(prompt.begin(), prompt.end());
        request.add_prompt(static_cast<int32_t>(rng.Below(model_.vocab())));
        request.set_max_tokens(1 + static_cast<uint32_t>(rng.Below(40)));
        request.mutable_sampling()->set_top_p(1);
        const bool far = rng.Below(3) == 0;
        if (rng.Below(3) > 0) *request.mutable_prefill() = scheduler_.AddressOf("p");
        auto* holder = request.add_holders();
        *holder->mutable_worker() = scheduler_.AddressOf(far ? "d" : "far");
        holder->set_end(4);
        holder->set_tier(rng.Below(2) == 0 ? v1::KV_TIER_DISK : v1::KV_TIER_HOST);
        grpc::ClientContext context;
        AddClusterToken(context, kToken);
        SetTimeout(context, absl::Seconds(60));
        auto reader = (far ? far_stub : decode_stub)->Generate(&context, request);
        v1::WorkerGenerateEvent event;
        const uint64_t how = rng.Below(6);
        if (how == 0) {
          std::this_thread::sleep_for(std::chrono::microseconds(rng.Below(5000)));
          context.TryCancel();
        } else if (how < 4) {
          for (uint64_t reads = rng.Below(4); reads > 0 && reader->Read(&event); --reads) {
          }
          context.TryCancel();
        } else {
          while (reader->Read(&event)) {
          }
        }
        const grpc::Status status = reader->Finish();
        EXPECT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::CANCELLED)
            << status.error_message();
        ++(status.ok() ? answered : cancelled);
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_GT(answered, 0);
  EXPECT_GT(cancelled, 0);
  for (const char* id : {"p", "d", "far"}) ExpectIdle(id);
}

TEST_F(WorkerTest, TenantsShareNothing) {
  StartWorker("both", "w");
  auto request = MakeRequest(Prompt(64, 5), 4);
  Ask("w", request);
  request.set_request_id("again");
  EXPECT_EQ(Ask("w", request).path.cached_tokens(), 48u);
  request.set_request_id("other");
  request.set_salt("another tenant");
  EXPECT_EQ(Ask("w", request).path.cached_tokens(), 0u);
}

TEST_F(WorkerTest, DeadPrefillWorkerCostsTimeNotTheAnswer) {
  StartWorker("both", "alone");
  StartWorker("decode", "d");
  StartWorker("prefill", "p");
  auto request = MakeRequest(Prompt(100, 6), 8);
  const Answer reference = Ask("alone", request);
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  workers_.back()->Shutdown(absl::ZeroDuration());
  const Answer answer = Ask("d", request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tokens, reference.tokens);
  ExpectIdle("d");
}

TEST_F(WorkerTest, RestartedPrefillWorkerIsNotTakenForTheOldOne) {
  StartWorker("decode", "d");
  StartWorker("prefill", "p");
  auto request = MakeRequest(Prompt(100, 7), 8);
  v1::WorkerAddress old = scheduler_.AddressOf("p");
  *request.mutable_prefill() = old;
  ASSERT_TRUE(Ask("d", request).status.ok());
  // A boot id that the worker never had: what a stale placement carries after a restart.
  old.set_boot_id("00000000000000000000000000000000");
  auto stale = MakeRequest(Prompt(100, 8), 8);
  *stale.mutable_prefill() = old;
  const Answer answer = Ask("d", stale);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.path.fetched_blocks(), 0u) << "no block comes from a process that is not the named one";
  EXPECT_EQ(answer.tokens.size(), 8u);
  ExpectIdle("d");
}

TEST_F(WorkerTest, CancelFreesEverySlotOnBothWorkers) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  auto stub = StubOf("d");
  for (int i = 0; i < 20; ++i) {
    auto request = MakeRequest(Prompt(120, 100 + static_cast<uint64_t>(i)), 200);
    *request.mutable_prefill() = scheduler_.AddressOf("p");
    grpc::ClientContext context;
    AddClusterToken(context, kToken);
    auto reader = stub->Generate(&context, request);
    v1::WorkerGenerateEvent event;
    // At ever later moments: before anything came, after the first token, after more.
    for (int reads = 0; reads < i % 5; ++reads) reader->Read(&event);
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ExpectIdle("d");
  ExpectIdle("p");
}

TEST_F(WorkerTest, MoreRequestsThanSlotsWaitTheirTurn) {
  Config config = MakeConfig("both", "w");
  config.kv.host_bytes = model_.block_bytes(16) * 20;
  config.model.max_model_len = 256;
  StartWorker(config);
  std::vector<std::thread> clients;
  std::vector<Answer> answers(12);
  for (size_t i = 0; i < answers.size(); ++i) {
    auto request = MakeRequest(Prompt(60, 200 + i), 60);  // eight blocks each
    clients.emplace_back([&, i, request] { answers[i] = Ask("w", request); });
  }
  for (auto& c : clients) c.join();
  for (const Answer& a : answers) {
    EXPECT_TRUE(a.status.ok()) << a.status.error_message();
    EXPECT_EQ(a.tokens.size(), 60u);
  }
  ExpectIdle("w");
}

class WorkerPreemptionTest : public WorkerTest {
 protected:
  // A worker of 20 slots, which 256 tokens fit in, and one with room for all, to compare with.
  void StartTiny(const std::string& preemption, const std::string& role = "both") {
    StartWorker("both", "calm");
    Config config = MakeConfig(role, "tiny");
    config.kv.host_bytes = model_.block_bytes(16) * 20;
    config.model.max_model_len = 256;
    config.engine.preemption = preemption;
    config.engine.max_waiting = 64;
    StartWorker(config);
    role_ = role;
  }
  uint64_t Counted(const std::string& name, Labels labels = {}) {
    labels["role"] = role_;
    return metrics_.back()->AddCounter(name, "", labels).value();
  }
  uint64_t Preemptions() {
    return Counted("tidepool_engine_preemptions_total", {{"how", "swap"}}) +
           Counted("tidepool_engine_preemptions_total", {{"how", "recompute"}});
  }
  void ExpectNothingSwapped() {
    auto& swapped =
        metrics_.back()->AddGauge("tidepool_pool_leases", "", {{"tier", "host"}, {"kind", "swapped"}});
    // Who is preempted as it leaves gives up what was kept a little later.
    for (int i = 0; i < 500 && swapped.value() != 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(swapped.value(), 0);
    ExpectIdle("tiny");
  }
  // What a worker with room for everything answers.
  std::vector<int32_t> Calm(v1::WorkerGenerateRequest request) {
    request.set_request_id("calm " + request.request_id());
    const Answer answer = Ask("calm", request);
    EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
    return answer.tokens;
  }
  std::string role_;
};

TEST_F(WorkerPreemptionTest, ABatchRequestGivesItsSlotsUpToAnOnlineOneAndEndsAllTheSame) {
  for (const char* mode : {"auto", "recompute"}) {
    StartTiny(mode);
    auto batch = MakeRequest(Prompt(30, 1), 220);  // 16 of 20 blocks
    batch.set_request_class(v1::REQUEST_CLASS_BATCH);
    batch.mutable_sampling()->set_temperature(1);
    batch.mutable_sampling()->set_seed(7);
    batch.mutable_sampling()->set_repetition_penalty(1.2f);
    const auto online = MakeRequest(Prompt(100, 2), 20);  // 8 blocks
    const std::vector<int32_t> batch_alone = Calm(batch), online_alone = Calm(online);
    // Until the one came while the other ran: on a busy machine it may come too late.
    for (int i = 0; i < 200 && Preemptions() == 0; ++i) {
      Answer slow;
      batch.set_request_id("batch " + std::to_string(i) + mode);
      batch.set_salt(batch.request_id());  // computed again each time
      std::atomic<bool> over{false};
      std::thread client([&] {
        slow = Ask("tiny", batch);
        over = true;
      });
      while (!over && Describe("tiny").slots_leased() == 0) std::this_thread::yield();
      auto now = online;
      now.set_request_id("online " + std::to_string(i) + mode);
      const Answer fast = Ask("tiny", now);
      client.join();
      ASSERT_TRUE(fast.status.ok()) << fast.status.error_message();
      ASSERT_TRUE(slow.status.ok()) << slow.status.error_message();
      EXPECT_EQ(fast.tokens, online_alone);
      EXPECT_EQ(slow.tokens, batch_alone);
    }
    EXPECT_GT(Preemptions(), 0u);
    ExpectNothingSwapped();
    workers_.clear();
    metrics_.clear();
    scheduler_.Forget();
  }
}

TEST_F(WorkerPreemptionTest, RandomRequestsInATinyPoolAnswerAsAlone) {
  StartTiny("auto");
  Rng rng(5);
  constexpr size_t kRequests = 60;
  std::vector<v1::WorkerGenerateRequest> requests;
  std::vector<std::vector<int32_t>> alone;
  for (size_t i = 0; i < kRequests; ++i) {
    auto request =
        MakeRequest(Prompt(1 + rng.Below(150), rng.Below(20)), 1 + static_cast<uint32_t>(rng.Below(100)));
    request.set_tenant(std::string(1, static_cast<char>('a' + rng.Below(3))));
    if (rng.Chance(0.5)) request.set_request_class(v1::REQUEST_CLASS_BATCH);
    request.set_priority(static_cast<int32_t>(rng.Below(3)));
    if (rng.Chance(0.5)) {
      request.mutable_sampling()->set_temperature(1);
      request.mutable_sampling()->set_seed(i);
      request.mutable_sampling()->set_presence_penalty(0.5f);
    }
    if (rng.Chance(0.2)) request.mutable_sampling()->set_grammar(Grammar("[ab]{20,40}"));
    alone.push_back(Calm(request));
    requests.push_back(std::move(request));
  }
  std::vector<Answer> answers(kRequests);
  std::atomic<size_t> next{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < 12; ++c) {
    clients.emplace_back([&] {
      for (size_t i; (i = next++) < kRequests;) answers[i] = Ask("tiny", requests[i]);
    });
  }
  for (auto& c : clients) c.join();
  for (size_t i = 0; i < kRequests; ++i) {
    EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
    EXPECT_EQ(answers[i].tokens, alone[i]) << "request " << i;
  }
  EXPECT_GT(Preemptions(), 0u);
  ExpectNothingSwapped();
}

// Short answers were seen so far, so that little is reserved; the long ones that follow outgrow it together.
TEST_F(WorkerPreemptionTest, AnswersThatOutgrowWhatWasExpectedWaitForEachOtherAndAllEnd) {
  StartTiny("auto");
  std::vector<v1::WorkerGenerateRequest> shorts, requests;
  for (int i = 0; i < 25; ++i) {
    shorts.push_back(MakeRequest(Prompt(20, 50 + i), 200));
    shorts.back().mutable_sampling()->add_stop_token_ids(Calm(shorts.back())[1]);
  }
  std::vector<std::vector<int32_t>> alone;
  for (size_t i = 0; i < 6; ++i) {
    requests.push_back(MakeRequest(Prompt(20, 100 + i), 230));  // 16 blocks in the end, 6 at first
    alone.push_back(Calm(requests.back()));
  }
  // On a busy machine they may come one after another. What is known of a tenant's answers then is of no use.
  for (int round = 0; round < 50 && Preemptions() == 0; ++round) {
    const std::string tenant = "t" + std::to_string(round);
    for (auto request : shorts) {
      request.set_tenant(tenant);
      request.set_request_id(request.request_id() + tenant);
      const Answer answer = Ask("tiny", request);
      ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
      ASSERT_EQ(answer.finish_reason, "stop");
    }
    std::vector<Answer> answers(requests.size());
    std::vector<std::thread> clients;
    for (size_t i = 0; i < requests.size(); ++i) {
      auto request = requests[i];
      request.set_request_id(request.request_id() + "." + std::to_string(round));
      clients.emplace_back([&, i, request] { answers[i] = Ask("tiny", request); });
    }
    for (auto& c : clients) c.join();
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
      EXPECT_EQ(answers[i].tokens, alone[i]) << "request " << i;
    }
  }
  EXPECT_GT(Preemptions(), 0u) << "more of them began than could have ended together";
  ExpectNothingSwapped();
}

TEST_F(WorkerPreemptionTest, AnAttemptThatIsHereAlreadyIsRefusedAndDoesNotEndTheOther) {
  StartTiny("auto");
  const auto any = MakeRequest(Prompt(80, 1), 170);  // 16 of 20 blocks: one runs, one waits
  bool refused = false;
  for (int round = 0; round < 200 && !refused; ++round) {
    std::array<v1::WorkerGenerateRequest, 2> requests{any, any};
    std::array<Answer, 2> answers;
    std::atomic<int> over{0};
    std::vector<std::thread> clients;
    for (size_t i = 0; i < 2; ++i) {
      requests[i].set_request_id("r " + std::to_string(round) + " " + std::to_string(i));
      requests[i].set_salt(requests[i].request_id());
      clients.emplace_back([&, i] {
        answers[i] = Ask("tiny", requests[i]);
        ++over;
      });
    }
    const auto both_are_there = [&] {
      const v1::DescribeReply now = Describe("tiny");
      return now.running() > 0 && now.waiting() > 0;
    };
    bool both = false;
    while (over == 0 && !both) both = both_are_there();
    if (both) {
      for (const auto& again : requests) {
        const Answer answer = Ask("tiny", again);  // ended meanwhile: it may be asked again
        if (answer.status.ok()) continue;
        EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
        refused = true;
      }
    }
    for (auto& c : clients) c.join();
    for (const Answer& answer : answers) EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  }
  EXPECT_TRUE(refused);
  ExpectNothingSwapped();
}

TEST_F(WorkerPreemptionTest, WhatWasHandedOverInPlaceIsFoundAgain) {
  Config prefill = MakeConfig("prefill", "p");
  prefill.transport.share_arena = true;
  StartWorker(prefill);
  StartWorker("both", "calm");
  Config config = MakeConfig("decode", "tiny");
  config.transport.share_arena = true;
  config.kv.host_bytes = model_.block_bytes(16) * 20;
  config.model.max_model_len = 256;
  StartWorker(config);
  role_ = "decode";
  std::vector<v1::WorkerGenerateRequest> requests;
  std::vector<std::vector<int32_t>> alone;
  for (size_t i = 0; i < 16; ++i) {
    requests.push_back(MakeRequest(Prompt(40 + 5 * i, 300 + i), 100));
    if (i % 2 == 0) requests.back().set_request_class(v1::REQUEST_CLASS_BATCH);
    alone.push_back(Calm(requests.back()));
    *requests.back().mutable_prefill() = scheduler_.AddressOf("p");
  }
  for (int round = 0; round < 50 && Preemptions() == 0; ++round) {
    std::vector<Answer> answers(requests.size());
    std::vector<std::thread> clients;
    for (size_t i = 0; i < requests.size(); ++i) {
      auto request = requests[i];
      request.set_request_id(request.request_id() + "." + std::to_string(round));
      request.set_salt(request.request_id());
      clients.emplace_back([&, i, request] { answers[i] = Ask("tiny", request); });
    }
    for (auto& c : clients) c.join();
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
      EXPECT_EQ(answers[i].tokens, alone[i]) << "request " << i;
    }
  }
  EXPECT_GT(Preemptions(), 0u);
  ExpectNothingSwapped();
  ExpectIdle("p");
}

TEST_F(WorkerPreemptionTest, WhoLeavesWhilePreemptedLeavesNothing) {
  StartTiny("auto");
  const auto any = MakeRequest({1}, 120);
  std::atomic<int> next{0};
  std::vector<std::thread> clients;
  for (int c = 0; c < 8; ++c) {
    clients.emplace_back([&, c] {
      Rng rng(static_cast<uint64_t>(c) + 1);
      for (int i; (i = next++) < 150;) {
        auto request = any;
        const std::vector<int32_t> prompt = Prompt(20 + rng.Below(60), rng.Below(1000));
        request.mutable_prompt()->Assign(prompt.begin(), prompt.end());
        request.set_request_id("leaves " + std::to_string(i));
        if (rng.Chance(0.6)) request.set_request_class(v1::REQUEST_CLASS_BATCH);
        grpc::ClientContext context;
        AddClusterToken(context, kToken);
        SetTimeout(context, absl::Seconds(60));
        auto stub = StubOf("tiny");
        auto reader = stub->Generate(&context, request);
        v1::WorkerGenerateEvent event;
        for (uint64_t events = rng.Below(30); events > 0 && reader->Read(&event); --events) {
        }
        context.TryCancel();
        while (reader->Read(&event)) {
        }
        reader->Finish();
      }
    });
  }
  for (auto& c : clients) c.join();
  ExpectNothingSwapped();
}

TEST_F(WorkerTest, BadRequestsNameTheFieldAndHarmNobody) {
  StartWorker("both", "w");
  const auto expect = [&](const v1::WorkerGenerateRequest& request, const char* text) {
    const Answer answer = Ask("w", request);
    EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(answer.status.error_message(), HasSubstr(text));
  };
  expect(MakeRequest({}, 4), "prompt is empty");
  expect(MakeRequest({1, -1}, 4), "prompt[1]");
  expect(MakeRequest({1, static_cast<int32_t>(model_.vocab())}, 4), "outside the vocabulary");
  expect(MakeRequest({1}, 0), "max_tokens");
  expect(MakeRequest({1}, 1u << 20), "context of");
  auto nan = MakeRequest({1}, 4);
  nan.mutable_sampling()->set_temperature(std::nanf(""));
  expect(nan, "temperature is nan");
  EXPECT_TRUE(Ask("w", MakeRequest({1, 2, 3}, 4)).status.ok());
  ExpectIdle("w");
}

TEST_F(WorkerTest, StrangersAndWrongRolesAreRefused) {
  StartWorker("prefill", "p");
  grpc::ClientContext context;  // without the token
  v1::DescribeReply reply;
  EXPECT_EQ(StubOf("p")->Describe(&context, {}, &reply).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Ask("p", MakeRequest({1, 2}, 2)).status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(WorkerTest, DrainFinishesWhatRunsAndRefusesWhatComes) {
  WorkerServer& worker = StartWorker("both", "w");
  auto stub = StubOf("w");
  grpc::ClientContext context;
  AddClusterToken(context, kToken);
  SetTimeout(context, absl::Seconds(60));
  auto reader = stub->Generate(&context, MakeRequest(Prompt(30, 9), 400));
  v1::WorkerGenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  int tokens = event.tokens_size();
  worker.BeginDrain();
  EXPECT_FALSE(worker.ready());
  EXPECT_EQ(Ask("w", MakeRequest({1, 2}, 2)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  std::thread shutdown([&] { worker.Shutdown(absl::Seconds(60)); });
  while (reader->Read(&event)) tokens += event.tokens_size();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(tokens, 400);
  shutdown.join();
}

class WorkerRoleTest : public WorkerTest {
 protected:
  grpc::Status SetRole(const std::string& id, v1::Role role, v1::SetRoleReply* reply,
                       std::string_view token = kToken) {
    grpc::ClientContext context;
    AddClusterToken(context, token);
    SetTimeout(context, absl::Seconds(60));
    v1::SetRoleRequest request;
    request.set_role(role);
    return StubOf(id)->SetRole(&context, request, reply);
  }
  bool Is(const std::string& id, v1::Role role) {
    return scheduler_.WaitFor(id, [&](const v1::WorkerReport& r) {
      return r.role() == role && r.next_role() == 0 && !r.draining();
    });
  }
  v1::SetRoleReply reply_;
};

TEST_F(WorkerRoleTest, ADecodeWorkerPrefillsWhenItsStreamsHaveEndedWhole) {
  StartWorker("decode", "a");
  StartWorker("decode", "b");
  const auto request = MakeRequest(Prompt(30, 9), 400);
  const Answer undisturbed = Ask("b", request);
  ASSERT_TRUE(undisturbed.status.ok());

  auto stub = StubOf("a");
  grpc::ClientContext context;
  AddClusterToken(context, kToken);
  SetTimeout(context, absl::Seconds(60));
  auto reader = stub->Generate(&context, request);
  std::vector<int32_t> tokens;
  v1::WorkerGenerateEvent event;
  const auto take = [&] {
    for (const auto& token : event.tokens()) {
      EXPECT_EQ(token.index(), tokens.size());
      tokens.push_back(token.id());
    }
  };
  ASSERT_TRUE(reader->Read(&event));
  take();
  ASSERT_TRUE(SetRole("a", v1::ROLE_PREFILL, &reply_).ok());
  EXPECT_EQ(reply_.role(), v1::ROLE_DECODE);
  EXPECT_EQ(reply_.next_role(), v1::ROLE_PREFILL);
  // Nobody is sent there any more; who was sent before is served.
  const Answer late = Ask("a", MakeRequest({1, 2, 3}, 2));
  EXPECT_TRUE(late.status.ok()) << late.status.error_message();
  while (reader->Read(&event)) take();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(tokens, undisturbed.tokens);

  ASSERT_TRUE(Is("a", v1::ROLE_PREFILL));
  EXPECT_EQ(Describe("a").role(), v1::ROLE_PREFILL);
  auto split = MakeRequest(Prompt(100, 3), 24);
  const Answer whole = Ask("b", split);
  split.set_salt("another tenant's, so that nothing is known of it");
  *split.mutable_prefill() = scheduler_.AddressOf("a");
  const Answer answer = Ask("b", split);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tokens, whole.tokens);
  EXPECT_EQ(answer.path.prefill_worker(), "a");
  EXPECT_GT(answer.path.fetched_blocks(), 0u);
  for (const char* id : {"a", "b"}) ExpectIdle(id);
}

TEST_F(WorkerRoleTest, NobodyIsPlacedOnAWorkerThatIsAboutToChange) {
  StartWorker("decode", "a");
  auto stub = StubOf("a");
  grpc::ClientContext context;
  AddClusterToken(context, kToken);
  SetTimeout(context, absl::Seconds(60));
  auto reader = stub->Generate(&context, MakeRequest(Prompt(30, 9), 480));
  v1::WorkerGenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  ASSERT_TRUE(SetRole("a", v1::ROLE_PREFILL, &reply_).ok());
  EXPECT_TRUE(scheduler_.WaitFor("a", [](const v1::WorkerReport& r) {
    // Or it has ended already, on a fast machine that slept here.
    return (r.draining() && r.next_role() == v1::ROLE_PREFILL && r.role() == v1::ROLE_DECODE) ||
           r.role() == v1::ROLE_PREFILL;
  }));
  context.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_TRUE(Is("a", v1::ROLE_PREFILL));
}

TEST_F(WorkerRoleTest, APrefillWorkerDecodesAndItsBlocksStay) {
  StartWorker("prefill", "p");
  StartWorker("decode", "d");
  auto request = MakeRequest(Prompt(100, 1), 24);
  *request.mutable_prefill() = scheduler_.AddressOf("p");
  const Answer before = Ask("d", request);
  ASSERT_TRUE(before.status.ok());
  ASSERT_TRUE(SetRole("p", v1::ROLE_DECODE, &reply_).ok());
  ASSERT_TRUE(Is("p", v1::ROLE_DECODE));
  EXPECT_GE(Describe("p").published_blocks(), 100u / 16);
  request.clear_prefill();
  const Answer after = Ask("p", request);
  ASSERT_TRUE(after.status.ok()) << after.status.error_message();
  EXPECT_EQ(after.tokens, before.tokens);
  EXPECT_EQ(after.path.cached_tokens(), 96u) << "what it has prefilled for others";
}

TEST_F(WorkerRoleTest, BothAtOnceAndBackAgain) {
  StartWorker("prefill", "p");
  ASSERT_TRUE(SetRole("p", v1::ROLE_BOTH, &reply_).ok());
  EXPECT_EQ(reply_.role(), v1::ROLE_BOTH);
  EXPECT_EQ(reply_.next_role(), v1::ROLE_UNSPECIFIED);
  ASSERT_TRUE(Is("p", v1::ROLE_BOTH));
  EXPECT_TRUE(Ask("p", MakeRequest(Prompt(20, 1), 4)).status.ok());
  ASSERT_TRUE(SetRole("p", v1::ROLE_PREFILL, &reply_).ok());
  EXPECT_TRUE(Is("p", v1::ROLE_PREFILL));
}

TEST_F(WorkerRoleTest, OrdersThatCannotBeAreRefusedByName) {
  WorkerServer& worker = StartWorker("prefill", "p");
  EXPECT_EQ(SetRole("p", v1::ROLE_DECODE, &reply_, "wrong").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  const grpc::Status store = SetRole("p", v1::ROLE_STORE, &reply_);
  EXPECT_EQ(store.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(store.error_message(), HasSubstr("prefill, decode or both"));
  worker.BeginDrain();
  EXPECT_EQ(SetRole("p", v1::ROLE_DECODE, &reply_).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Describe("p").role(), v1::ROLE_PREFILL);
}

TEST_F(WorkerRoleTest, ADrainedWorkerWantsToEndWhenNothingRunsAndOnlyIfAsked) {
  WorkerServer& worker = StartWorker("both", "w");
  auto stub = StubOf("w");
  grpc::ClientContext context;
  AddClusterToken(context, kToken);
  SetTimeout(context, absl::Seconds(60));
  auto reader = stub->Generate(&context, MakeRequest(Prompt(30, 9), 400));
  v1::WorkerGenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  int tokens = event.tokens_size();
  const auto drain = [&](bool end) {
    grpc::ClientContext call;
    AddClusterToken(call, kToken);
    v1::DrainRequest request;
    request.set_end_process(end);
    v1::DrainReply reply;
    EXPECT_TRUE(stub->Drain(&call, request, &reply).ok());
  };
  drain(false);
  while (reader->Read(&event)) tokens += event.tokens_size();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(tokens, 400);
  ExpectIdle("w");
  EXPECT_FALSE(worker.wants_to_end());
  drain(true);
  for (int i = 0; i < 6000 && !worker.wants_to_end(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_TRUE(worker.wants_to_end());
}

TEST(Worker, NamesWhatIsWrongBeforeItListens) {
  MetricRegistry metrics;
  ServedModel model;
  Config config;
  config.model.path = model.dir();
  config.worker.role = "decoder";
  EXPECT_THAT(std::string(WorkerServer::Start(config, metrics).status().message()), HasSubstr("worker.role"));
  config.worker.role = "both";
  config.kv.host_bytes = 1;
  EXPECT_THAT(std::string(WorkerServer::Start(config, metrics).status().message()),
              HasSubstr("kv.host_bytes"));
}

}  // namespace
}  // namespace tidepool
