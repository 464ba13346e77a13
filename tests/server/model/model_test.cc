#include "server/model/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "server/model/fingerprint.h"
#include "tests/server/model/tiny_families.h"

namespace tidepool {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

absl::StatusOr<std::shared_ptr<const Model>> Load(const std::string& dir, const std::string& dtype = "auto",
                                                  const LoadProgress& progress = {}) {
  return LoadModel({.path = dir, .dtype = dtype}, "tokenizer", progress);
}

class ModelLoad : public ::testing::Test {
 protected:
  // The model with one tensor changed by `edit`.
  template <typename F>
  std::string ErrorWith(F edit) {
    TestTensors t = TinyModel().Tensors();
    edit(t);
    WriteFile(dir_.File("config.json"), TinyModel().Config().dump());
    WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
    const auto m = Load(dir_.path());
    EXPECT_FALSE(m.ok());
    return std::string(m.status().message());
  }
  TempDir dir_;
};

TEST_F(ModelLoad, BadCheckpointsNameTheModelTheFileAndTheTensor) {
  EXPECT_THAT(
      ErrorWith([](TestTensors& t) { t.erase("model.layers.1.mlp.up_proj.weight"); }),
      AllOf(HasSubstr(dir_.path()), HasSubstr("model.layers.1.mlp.up_proj.weight"), HasSubstr("missing")));
  EXPECT_THAT(ErrorWith([](TestTensors& t) { t.erase("model.norm.weight"); }),
              HasSubstr("model.norm.weight"));
  EXPECT_THAT(ErrorWith([](TestTensors& t) { t.erase("lm_head.weight"); }), HasSubstr("lm_head.weight"));
  EXPECT_THAT(ErrorWith([](TestTensors& t) {
                t["model.layers.0.self_attn.k_proj.weight"].shape = {32, 16};
              }),
              AllOf(HasSubstr("model.layers.0.self_attn.k_proj.weight"), HasSubstr("[32, 16]"),
                    HasSubstr("[16, 32]")));
}

TEST_F(ModelLoad, EveryFamilyLoadsAndAMissingOrMisshapenTensorIsNamed) {
  for (const auto& [family, config] : TinyFamilies()) {
    WriteRandomModel(dir_.path(), config);
    const auto m = Load(dir_.path());
    ASSERT_TRUE(m.ok()) << family << ": " << m.status();
    const TestTensors good = RandomTensors(config);
    for (const auto& [name, tensor] : good) {
      TestTensors bad = good;
      bad.erase(name);
      WriteFile(dir_.File("model.safetensors"), EncodeTensors(bad, "F32"));
      EXPECT_THAT(std::string(Load(dir_.path()).status().message()), HasSubstr(name)) << family;
      bad = good;
      bad[name].shape[0] += 1;
      bad[name].values.resize(tensor.values.size() / tensor.shape[0] * (tensor.shape[0] + 1));
      WriteFile(dir_.File("model.safetensors"), EncodeTensors(bad, "F32"));
      EXPECT_THAT(std::string(Load(dir_.path()).status().message()),
                  AllOf(HasSubstr("model.safetensors"), HasSubstr(name), HasSubstr("config.json implies")))
          << family;
    }
  }
}

TEST_F(ModelLoad, TensorsThatTheConfigDoesNotImplyAreRefusedAndForeignPartsAreNot) {
  const auto with = [&](const std::string& name) {
    return ErrorWith([&](TestTensors& t) { t[name] = {{32}, std::vector<float>(32)}; });
  };
  for (const char* name : {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.gate.weight",
                           "model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_norm.weight",
                           "model.layers.0.mlp.up_proj.weight_scale", "lm_head.bias"}) {
    EXPECT_THAT(with(name), AllOf(HasSubstr("model.safetensors"), HasSubstr(name), HasSubstr("not part of")));
  }
  TestTensors t = TinyModel().Tensors();
  for (const char* name : {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
                           "vision_tower.x.weight", "multi_modal_projector.y.weight"}) {
    t[name] = {{4}, std::vector<float>(4)};
  }
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
  EXPECT_TRUE(Load(dir_.path()).ok()) << Load(dir_.path()).status();
}

TEST_F(ModelLoad, ATiedModelsOwnHeadIsUsedWhereItDiffers) {
  const TinyModel tiny{.tie = true};
  const auto logits = [&] {
    const auto m = Load(dir_.path());
    EXPECT_TRUE(m.ok()) << m.status();
    const auto& head = (*m)->transformer.weights().lm_head[0];
    std::vector<float> x(32, 0.5f), y(96);
    ThreadPool pool(1);
    EXPECT_TRUE(head.Forward(x.data(), 1, y.data(), NumericMode::kFast, pool).ok());
    return y;
  };
  tiny.Write(dir_.path());
  const auto tied = logits();
  TestTensors t = tiny.Tensors();
  t["lm_head.weight"] = t["model.embed_tokens.weight"];
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
  EXPECT_EQ(logits(), tied);
  for (float& v : t["lm_head.weight"].values) v *= 2;
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
  EXPECT_EQ(logits()[7], 2 * tied[7]);
}

TEST_F(ModelLoad, BothPrefixesOfAMultimodalCheckpointAreRead) {
  const auto config = TinyFamilies().back().second;
  WriteRandomModel(dir_.path(), config);
  const auto base = Load(dir_.path());
  ASSERT_TRUE(base.ok()) << base.status();
  TestTensors renamed;
  for (auto& [name, tensor] : RandomTensors(config)) {
    std::string n = name;
    n.replace(0, std::string("language_model.model.").size(), "model.language_model.");
    renamed[n] = tensor;
  }
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(renamed, "F32"));
  const auto other = Load(dir_.path());
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ((*other)->transformer.weights().embedding_f32, (*base)->transformer.weights().embedding_f32);
}

TEST_F(ModelLoad, LengthsThatChangeTheRotationChangeTheFingerprintAndOthersDoNot) {
  const auto fingerprint = [&](const nlohmann::json& config, uint32_t max_model_len) {
    WriteRandomModel(dir_.path(), config);
    const auto m = LoadModel({.path = dir_.path(), .max_model_len = max_model_len}, "", {});
    EXPECT_TRUE(m.ok()) << m.status();
    return m.ok() ? (*m)->fingerprint : "";
  };
  const auto scaled = [](const nlohmann::json& scaling) {
    return FamilyConfig("LlamaForCausalLM", {{"rope_scaling", scaling}});
  };
  nlohmann::json phi3;
  for (const auto& [family, config] : TinyFamilies()) {
    if (family == "phi3") phi3 = config;
  }
  EXPECT_NE(fingerprint(phi3, 64), fingerprint(phi3, 65));
  EXPECT_EQ(fingerprint(phi3, 65), fingerprint(phi3, 512));
  const auto dynamic = scaled({{"type", "dynamic"}, {"factor", 4.0}});
  EXPECT_EQ(fingerprint(dynamic, 100), fingerprint(dynamic, 512));
  EXPECT_NE(fingerprint(dynamic, 512), fingerprint(dynamic, 513));
  EXPECT_NE(fingerprint(dynamic, 1000), fingerprint(dynamic, 2048));
  const auto linear = scaled({{"type", "linear"}, {"factor", 4.0}});
  EXPECT_EQ(fingerprint(linear, 100), fingerprint(linear, 2048));
  EXPECT_NE(fingerprint(linear, 100), fingerprint(dynamic, 100));
}

TEST_F(ModelLoad, ALongerServedLengthThanTheScalingReachesIsRefused) {
  WriteRandomModel(dir_.path(), FamilyConfig("LlamaForCausalLM",
                                             {{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}}));
  EXPECT_EQ((*Load(dir_.path()))->max_model_len, 512u);
  const auto longest = LoadModel({.path = dir_.path(), .max_model_len = 2048}, "", {});
  ASSERT_TRUE(longest.ok()) << longest.status();
  EXPECT_EQ((*longest)->transformer.max_positions(), 2048u);
  EXPECT_THAT(std::string(LoadModel({.path = dir_.path(), .max_model_len = 2049}, "", {}).status().message()),
              AllOf(HasSubstr("2049"), HasSubstr("2048"), HasSubstr("scaled RoPE")));
}

TEST_F(ModelLoad, AutoDtypeFollowsTheCheckpoint) {
  TinyModel().Write(dir_.path(), "F32");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kF32);
  EXPECT_EQ((*Load(dir_.path(), "bfloat16"))->kv_dtype, DType::kBF16);
  TinyModel().Write(dir_.path(), "BF16");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kBF16);
  EXPECT_EQ((*Load(dir_.path(), "float32"))->kv_dtype, DType::kF32);
  TinyModel().Write(dir_.path(), "F16");
  EXPECT_EQ((*Load(dir_.path()))->kv_dtype, DType::kF32);
  EXPECT_THAT(std::string(Load(dir_.path(), "int8").status().message()),
              HasSubstr("model.dtype is \"int8\""));
}

TEST_F(ModelLoad, HalfPrecisionIsWidenedExactly) {
  TinyModel().Write(dir_.path(), "F16");
  const auto half = *Load(dir_.path());
  TinyModel().Write(dir_.path(), "F32");  // the same values
  const auto full = *Load(dir_.path());
  EXPECT_EQ(half->transformer.weights().embedding_f32, full->transformer.weights().embedding_f32);
  EXPECT_EQ(half->transformer.weights().final_norm, full->transformer.weights().final_norm);
}

TEST_F(ModelLoad, ProgressRisesToTheTotal) {
  TinyModel().Write(dir_.path());
  uint64_t last = 0, total = 0;
  int calls = 0;
  ASSERT_TRUE(Load(dir_.path(), "auto", [&](uint64_t done, uint64_t all) {
                EXPECT_GT(done, last);
                last = done;
                total = all;
                ++calls;
              }).ok());
  EXPECT_EQ(last, total);
  EXPECT_GT(total, 0u);
  EXPECT_GT(calls, 10);
}

TEST_F(ModelLoad, NameAndLengthComeFromTheConfigElseFromTheModel) {
  EXPECT_EQ(ServedModelName({.path = "a/b/some-model/"}), "some-model");
  EXPECT_EQ(ServedModelName({.path = "a/some-model"}), "some-model");
  EXPECT_EQ(ServedModelName({.path = "a/some-model", .name = "mine"}), "mine");
  TinyModel().Write(dir_.path());
  EXPECT_EQ((*Load(dir_.path()))->max_model_len, 512u);
  EXPECT_EQ((*LoadModel({.path = dir_.path(), .max_model_len = 100}, "", {}))->max_model_len, 100u);
  EXPECT_THAT(std::string(LoadModel({.path = dir_.path(), .max_model_len = 513}, "", {}).status().message()),
              AllOf(HasSubstr("513"), HasSubstr("512")));
}

TEST_F(ModelLoad, FingerprintIgnoresShardingAndTellsEverythingElseApart) {
  TinyModel tiny;
  tiny.Write(dir_.path());
  const auto base = (*Load(dir_.path()))->fingerprint;
  EXPECT_EQ(base.size(), 64u);
  EXPECT_EQ((*Load(dir_.path()))->fingerprint, base);
  EXPECT_NE((*Load(dir_.path(), "bfloat16"))->fingerprint, base);
  EXPECT_NE((*LoadModel({.path = dir_.path(), .dtype = "auto"}, "another tokenizer", {}))->fingerprint, base);

  TempDir sharded;
  tiny.WriteSharded(sharded.path());
  EXPECT_EQ((*Load(sharded.path()))->fingerprint, base);

  auto config = tiny.Config();
  config["rope_theta"] = 10001.0;
  WriteFile(dir_.File("config.json"), config.dump());
  EXPECT_NE((*Load(dir_.path()))->fingerprint, base);
  config = tiny.Config();
  config["eos_token_id"] = 5;  // does not enter KV
  WriteFile(dir_.File("config.json"), config.dump());
  EXPECT_EQ((*Load(dir_.path()))->fingerprint, base);

  TestTensors t = tiny.Tensors();
  t["model.layers.1.mlp.down_proj.weight"].values[7] += 1.0f / 1024;
  WriteFile(dir_.File("model.safetensors"), EncodeTensors(t, "F32"));
  EXPECT_NE((*Load(dir_.path()))->fingerprint, base);
}

TEST(StoriesModel, AllFormsLoadAndShardingKeepsTheFingerprint) {
  const std::string dir = "../shared/data/tiny_llms/stories260K/";
  if (!std::filesystem::exists(dir)) GTEST_SKIP() << dir << " is not there";
  const auto full = Load(dir + "hf"), sharded = Load(dir + "hf-sharded"), b16 = Load(dir + "hf-bfloat16"),
             f16 = Load(dir + "hf-float16");
  ASSERT_TRUE(full.ok()) << full.status();
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  ASSERT_TRUE(b16.ok()) << b16.status();
  ASSERT_TRUE(f16.ok()) << f16.status();
  EXPECT_EQ((*full)->fingerprint, (*sharded)->fingerprint);
  EXPECT_NE((*full)->fingerprint, (*b16)->fingerprint);
  EXPECT_EQ((*b16)->kv_dtype, DType::kBF16);
  EXPECT_EQ((*f16)->kv_dtype, DType::kF32);
}

}  // namespace
}  // namespace tidepool
