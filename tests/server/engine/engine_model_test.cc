// The engine over a real (tiny, random) transformer: the same answer, bit for bit, whatever the way.
#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/rng.h"
#include "kvstore/keys.h"
#include "server/engine/engine.h"
#include "tests/server/engine/recording_sink.h"
#include "tests/server/model/tiny_model.h"

namespace tidepool {
namespace {

constexpr uint32_t kBlock = 16;

std::shared_ptr<const Model> Tiny(const std::string& dtype) {
  TempDir dir;
  const TinyModel tiny{.hidden = 64, .heads = 8, .kv_heads = 4, .intermediate = 172};
  tiny.Write(dir.path());
  auto m = LoadModel({.path = dir.path(), .dtype = dtype}, "", {});
  EXPECT_TRUE(m.ok()) << m.status();
  return *m;
}

struct Node {
  Node(std::shared_ptr<const Model> m, EngineConfig config) : model(std::move(m)) {
    config.batch_invariant = true;
    pool = *BlockPool::Create({.layout = model->Layout(kBlock), .slots = 256, .metrics = &metrics});
    engine = *Engine::Start({.config = config,
                             .runner = std::make_unique<CpuModelRunner>(model, config, kBlock),
                             .pool = pool.get(),
                             .role = "both",
                             .metrics = &metrics});
  }
  // Leases must not outlive their pool.
  ~Node() {
    engine.reset();
    for (auto& s : sinks) s->result.blocks.clear();
  }
  SequenceSpec Spec(const std::string& id, const std::vector<int32_t>& prompt,
                    std::shared_ptr<RecordingSink>& sink) {
    sink = std::make_shared<RecordingSink>();
    sinks.push_back(sink);
    SequenceSpec spec;
    spec.request_id = id;
    spec.tokens = prompt;
    spec.blocks = *pool->Reserve((prompt.size() + kBlock - 1) / kBlock);
    spec.sampling = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .seed = 11};
    spec.max_tokens = 24;
    spec.top_logprobs = 5;
    spec.sink = sink;
    return spec;
  }
  void Submit(SequenceSpec spec) {
    const absl::Status s = engine->Submit(std::move(spec));
    ASSERT_TRUE(s.ok()) << s;
  }

  MetricRegistry metrics;
  std::shared_ptr<const Model> model;
  std::unique_ptr<BlockPool> pool;
  std::unique_ptr<Engine> engine;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
};

std::vector<int32_t> Prompt(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> out(n);
  for (auto& t : out) t = static_cast<int32_t>(rng.Below(96));
  return out;
}

// Tokens, logprobs and top logprobs, bit for bit.
void ExpectSame(const std::vector<OutputToken>& a, const std::vector<OutputToken>& b,
                const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].id, b[i].id) << what << " token " << i;
    ASSERT_EQ(a[i].logprob, b[i].logprob) << what << " token " << i;
    ASSERT_EQ(a[i].top, b[i].top) << what << " token " << i;
  }
}

class SameAnswer : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Dtypes, SameAnswer, ::testing::Values("float32", "bfloat16"));

TEST_P(SameAnswer, ByAnyStepBudgetBatchThreadsReuseAndHandoff) {
  const auto model = Tiny(GetParam());
  const auto prompt = Prompt(75, 1);
  Node alone(model, {.threads = 1, .max_batch = 1, .max_step_tokens = 512});
  std::shared_ptr<RecordingSink> sink;
  alone.Submit(alone.Spec("alone", prompt, sink));
  ASSERT_TRUE(sink->WaitFinished());
  const std::vector<OutputToken> want = sink->tokens;
  ASSERT_EQ(want.size(), 24u);

  // Prefix reuse, of each possible length.
  const auto keys = BlockKeys(BlockKey{}, prompt, kBlock);
  for (uint32_t reuse = 1; reuse <= ReusableBlocks(prompt.size(), kBlock); ++reuse) {
    SequenceSpec spec = alone.Spec("reuse", prompt, sink);
    auto prefix = alone.pool->LeasePrefix(std::span(keys).first(reuse));
    ASSERT_EQ(prefix.size(), reuse);
    std::ranges::move(prefix, spec.blocks.begin());
    spec.published_blocks = reuse;
    spec.computed_tokens = reuse * kBlock;
    alone.Submit(std::move(spec));
    ASSERT_TRUE(sink->WaitFinished());
    ExpectSame(sink->tokens, want, absl::StrCat("reuse of ", reuse));
    ASSERT_TRUE(alone.engine->WaitIdle(absl::Seconds(60)));
  }

  // Small budgets (chunked prefill), company in the batch, threads.
  for (const uint32_t threads : {1u, 2u}) {
    for (const uint32_t budget : {8u, 13u, 100u}) {
      Node node(model, {.threads = threads, .max_batch = 8, .max_step_tokens = budget});
      std::vector<std::shared_ptr<RecordingSink>> others(6);
      for (size_t i = 0; i < others.size(); ++i) {
        if (i == 3) node.Submit(node.Spec("it", prompt, sink));
        node.Submit(node.Spec(absl::StrCat("other", i), Prompt(5 + 20 * i, 50 + i), others[i]));
      }
      ASSERT_TRUE(sink->WaitFinished());
      ExpectSame(sink->tokens, want, absl::StrCat("budget ", budget, " threads ", threads));
      for (auto& o : others) ASSERT_TRUE(o->WaitFinished());
    }
  }

  // Prefilled on one engine, its blocks copied, decoded on another.
  Node prefill(model, {.threads = 2, .max_batch = 4, .max_step_tokens = 17});
  Node decode(model, {.threads = 1, .max_batch = 4, .max_step_tokens = 4});
  std::shared_ptr<RecordingSink> first;
  SequenceSpec p = prefill.Spec("p", prompt, first);
  p.prefill_only = true;
  prefill.Submit(std::move(p));
  ASSERT_TRUE(first->WaitFinished());
  SequenceSpec d = decode.Spec("d", prompt, sink);
  for (size_t i = 0; i < d.blocks.size(); ++i) {
    std::ranges::copy(first->result.blocks[i].data(), d.blocks[i].data().begin());
  }
  d.computed_tokens = static_cast<uint32_t>(prompt.size());
  d.first_token = first->tokens[0];
  decode.Submit(std::move(d));
  ASSERT_TRUE(sink->WaitFinished());
  ExpectSame(sink->tokens, want, "handoff");
}

// A weight that is NaN for one token only: that sequence ends with an error, its company as if alone.
TEST(EngineModel, NanInTheModelEndsOnlyTheSequenceThatMeetsIt) {
  TempDir dir;
  const TinyModel tiny;
  TestTensors tensors = tiny.Tensors();
  tensors["model.embed_tokens.weight"].values[7 * tiny.hidden] = std::numeric_limits<float>::quiet_NaN();
  WriteFile(dir.File("config.json"), tiny.Config().dump());
  WriteFile(dir.File("model.safetensors"), EncodeTensors(tensors, "F32"));
  auto model = LoadModel({.path = dir.path()}, "", {});
  ASSERT_TRUE(model.ok()) << model.status();
  std::vector<int32_t> clean = Prompt(20, 3);
  std::ranges::replace(clean, 7, 8);
  Node alone(*model, {.threads = 1, .max_batch = 4, .max_step_tokens = 64});
  std::shared_ptr<RecordingSink> want, good, bad;
  auto greedy = [&](Node& n, const std::string& id, const std::vector<int32_t>& prompt,
                    std::shared_ptr<RecordingSink>& s) {
    SequenceSpec spec = n.Spec(id, prompt, s);
    spec.max_tokens = 1;
    n.Submit(std::move(spec));
  };
  greedy(alone, "want", clean, want);
  ASSERT_TRUE(want->WaitFinished());
  greedy(alone, "bad", {1, 7, 2}, bad);
  greedy(alone, "good", clean, good);
  ASSERT_TRUE(bad->WaitFinished());
  ASSERT_TRUE(good->WaitFinished());
  EXPECT_EQ(bad->result.reason, FinishReason::kError);
  ExpectSame(good->tokens, want->tokens, "beside NaN");
}

}  // namespace
}  // namespace tidepool
