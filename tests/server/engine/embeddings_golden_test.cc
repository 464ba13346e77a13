// Embeddings of every family against transformers: tests/golden/families/*/embeddings.json (tools/fidelity).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kvstore/keys.h"
#include "server/engine/engine.h"
#include "tests/server/engine/recording_sink.h"

namespace tidepool {
namespace {

using nlohmann::json;

const std::string kFamilies = "tests/golden/families/";
constexpr uint32_t kBlockTokens = 32;
// As of the logits (families_golden_test.cc): absolute up to 1 and relative beyond.
constexpr double kTolerance = 2e-4;

json ReadJson(const std::string& path) { return json::parse(std::ifstream(path)); }

std::vector<float> Floats(const json& base64, size_t n) {
  std::string bytes;
  EXPECT_TRUE(absl::Base64Unescape(base64.get_ref<const std::string&>(), &bytes));
  EXPECT_EQ(bytes.size(), n * sizeof(float));
  std::vector<float> out(n);
  std::memcpy(out.data(), bytes.data(), std::min(bytes.size(), n * sizeof(float)));
  return out;
}

std::vector<float> Normalised(std::vector<float> v) {
  double squares = 0;
  for (float x : v) squares += double{x} * x;
  for (float& x : v) x = static_cast<float>(x / std::sqrt(squares));
  return v;
}

double Difference(const std::vector<float>& got, const std::vector<float>& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(double{got[i]} - want[i]) / std::max(1.0, std::abs(double{want[i]})));
  }
  return worst;
}

class EmbeddingsGolden : public ::testing::TestWithParam<std::string> {};

TEST_P(EmbeddingsGolden, LastAndMeanAreThoseOfTransformers) {
  const std::string dir = kFamilies + GetParam();
  const json golden = ReadJson(dir + "/golden.json"), want = ReadJson(dir + "/embeddings.json");
  ModelConfig model_config{.path = dir, .dtype = "float32"};
  if (!golden["max_model_len"].is_null()) model_config.max_model_len = golden["max_model_len"];
  auto model = LoadModel(model_config, "", {});
  ASSERT_TRUE(model.ok()) << model.status();
  MetricRegistry metrics;
  auto pool =
      BlockPool::Create({.layout = (*model)->Layout(kBlockTokens), .slots = 256, .metrics = &metrics});
  ASSERT_TRUE(pool.ok()) << pool.status();
  // Chunks that end inside of blocks and prompts, prompts that share a step.
  const EngineConfig config{.threads = 2, .max_batch = 8, .max_step_tokens = 24};
  auto engine = Engine::Start({.config = config,
                               .runner = std::make_unique<CpuModelRunner>(*model, config, kBlockTokens),
                               .pool = pool->get(),
                               .role = "both",
                               .metrics = &metrics});
  ASSERT_TRUE(engine.ok()) << engine.status();

  const size_t hidden = want["hidden"];
  ASSERT_EQ(hidden, (*model)->spec.hidden);
  struct Asked {
    std::shared_ptr<RecordingSink> sink;
    std::vector<float> want;
    std::string what;
  };
  std::vector<Asked> asked;
  for (size_t i = 0; i < golden["prompts"].size(); ++i) {
    for (const bool mean : {false, true}) {
      for (const bool normalize : {false, true}) {
        SequenceSpec spec;
        spec.request_id = absl::StrCat("prompt ", i, mean ? " mean" : " last", normalize ? " unit" : "");
        spec.tokens = golden["prompts"][i]["ids"].get<std::vector<int32_t>>();
        spec.blocks = *(*pool)->Reserve((spec.tokens.size() + kBlockTokens - 1) / kBlockTokens);
        spec.pooling = mean ? SequencePooling::kMean : SequencePooling::kLast;
        spec.normalize = normalize;
        spec.sink = std::make_shared<RecordingSink>();
        std::vector<float> vector = Floats(want["prompts"][i][mean ? "mean" : "last"], hidden);
        asked.push_back({std::static_pointer_cast<RecordingSink>(spec.sink),
                         normalize ? Normalised(std::move(vector)) : std::move(vector), spec.request_id});
        ASSERT_TRUE((*engine)->Submit(std::move(spec)).ok());
      }
    }
  }
  for (const Asked& a : asked) {
    ASSERT_TRUE(a.sink->WaitFinished());
    ASSERT_EQ(a.sink->result.reason, FinishReason::kPooled) << a.sink->result.status;
    EXPECT_LT(Difference(a.sink->result.pooled, a.want), kTolerance) << a.what;
    a.sink->result.blocks.clear();
  }
}

std::vector<std::string> Cases() {
  std::vector<std::string> out;
  for (const auto& entry : std::filesystem::directory_iterator(kFamilies)) {
    if (std::filesystem::exists(entry.path() / "embeddings.json")) out.push_back(entry.path().filename());
  }
  std::sort(out.begin(), out.end());
  return out;
}

INSTANTIATE_TEST_SUITE_P(Families, EmbeddingsGolden, ::testing::ValuesIn(Cases()), [](const auto& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

TEST(EmbeddingsGolden, EveryFamilyHasItsVectors) {
  size_t families = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFamilies)) {
    if (!std::filesystem::exists(entry.path() / "golden.json")) continue;
    ++families;
    EXPECT_TRUE(std::filesystem::exists(entry.path() / "embeddings.json")) << entry.path();
  }
  EXPECT_GE(families, 20u);
}

}  // namespace
}  // namespace tidepool
